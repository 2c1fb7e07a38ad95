"""The decoder-only transformer: OLMo 2's block, with a depth mechanism in it.

Axes: B batch, T tokens, D model width, V vocabulary, L layers. The first L-1 layers are stacked parameters under one
loop; the last stands apart, because it writes nothing to the depth stream and has no extra projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.model.attention import Attention, default_positions
from moda_jax.model.depth_mechanism import make_mechanism
from moda_jax.model.depth_scan import PartedBlock, depth_scan
from moda_jax.model.depth_stream import DepthStream, Entry
from moda_jax.model.layers import Embedding, Projection, RMSNorm, SwiGLU
from moda_jax.model.precision import compute_dtype
from moda_jax.parallel.mesh import constrain, current_mesh
from moda_jax.parallel.parameters import gather_layer
from pallas_kernels.norm import beside

Array = jax.Array


class Block(nnx.Module):
    """One layer: attention and FFN sub-layers around the residual stream, in parts so that the loop can cut it at the
    op.

    post-norm (OLMo 2): x + norm(attention(x)), then x + norm(ffn(x)); pre-norm: x + attention(norm(x)), then x +
    ffn(norm(x)).

    Args:
        config: of the whole model.
        writes: the layer writes to the depth stream (all but the last do).
        rngs: source of the parameters.
    """

    def __init__(self, config: TransformerConfig, *, writes: bool, rngs: nnx.Rngs) -> None:
        dtype = compute_dtype(config.dtype)
        self.config = config
        self.attention = Attention(
            config.width, config.num_heads, config.num_kv_heads, config.head_dim, qk_norm=config.qk_norm,
            rope_theta=config.rope_theta, norm_epsilon=config.norm_epsilon,
            initializer_range=config.initializer_range, implementation=config.attention_implementation, dtype=dtype,
            rngs=rngs,
        )  # fmt: skip
        self.attention_norm = _norm(config)
        self.ffn = SwiGLU(
            config.width, config.ffn_width, keep_hidden=config.remat != "ffn",
            initializer_range=config.initializer_range, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.ffn_norm = _norm(config)
        self.depth = make_mechanism(config, writes=writes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Array, stream: DepthStream, positions: Array, segment_ids: Array | None
    ) -> tuple[Array, DepthStream]:
        """The whole layer. x: [B, T, D]; positions, segment_ids: [B, T] int32."""
        x = self.depth.read(x, stream)
        query, key, value = self.before(x, positions)
        attended = self.depth.operate(
            query, key, value, stream, segment_ids=segment_ids, implementation=self.config.attention_implementation
        )
        x, entries = self.after(x, key, value, attended, positions)
        return x, self.depth.write(stream, entries)

    def before(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [B, T, D] to the op's query [B, T, N, H], key and value [B, T, K, H]."""
        return self.attention.project(self._attention_input(x), positions)

    def after(
        self, x: Array, key: Array, value: Array, attended: Array, positions: Array
    ) -> tuple[Array, tuple[Entry, ...]]:
        """The rest of the layer, from the op's output [B, T, N, H]: (residual stream, depth entries)."""
        post = self.config.norm == "post"
        entries = self.depth.attention_entries(self.attention, self._attention_input(x), key, value, positions)
        y = self.attention.output(attended)
        x = constrain(x + (self.attention_norm(y) if post else y), "batch", "tokens", "channels")
        inputs = x if post else self.ffn_norm(x)
        entries += self.depth.ffn_entries(self.attention, inputs, positions)
        entries = jax.tree.map(lambda e: constrain(e, "batch", "tokens", "kv_heads", "head_dim"), entries)
        y = self.ffn(inputs)
        return constrain(x + (self.ffn_norm(y) if post else y), "batch", "tokens", "channels"), entries

    def _attention_input(self, x: Array) -> Array:
        """What the attention sub-layer's first matmul receives."""
        return x if self.config.norm == "post" else self.attention_norm(x)


class Transformer(nnx.Module):
    """A causal language model: `depth="none"` is OLMo 2, `depth="moda"` adds the depth stream (arXiv 2603.15619).

    Args:
        config: see `TransformerConfig`.
        rngs: source of the parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        dtype = compute_dtype(config.dtype)
        self.config = config
        self.embedding = Embedding(
            config.vocab_size, config.width, initializer_range=config.initializer_range, dtype=dtype, rngs=rngs
        )
        self.layers = _stacked_blocks(config, rngs) if config.num_layers > 1 else None
        self.last_layer = Block(config, writes=False, rngs=rngs)
        self.final_norm = _norm(config)
        self.head = None if config.tie_embeddings else _untied_head(config, dtype, rngs)

    def __call__(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """Next-token logits.

        Args:
            tokens: [B, T] int32, T at most `config.max_sequence_length`.
            segment_ids: [B, T] int32; tokens of different segments do not see each other. None: one segment.
            positions: [B, T] int32, for the rotary embedding. None: 0..T-1.

        Returns:
            [B, T, V] float32.

        Raises:
            ValueError: wrong ranks or dtypes, or a sequence that is too long.
        """
        return self.logits(self.hidden(tokens, segment_ids, positions))

    def hidden(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """The final norm's output [B, T, D], which `logits` projects. Arguments as in `__call__`."""
        self._check_inputs(tokens, segment_ids, positions)
        config = self.config
        mesh = current_mesh()
        if positions is None and mesh is not None and mesh.shape["context"] > 1:
            raise ValueError("positions: expected an array: tokens lie in balanced order under mesh.context > 1")
        x = self.embedding(tokens)  # [B, T, D]
        positions = default_positions(x) if positions is None else positions
        stream = DepthStream.empty(*tokens.shape, config.depth_slots, config.num_kv_heads, config.head_dim, x.dtype)
        stream = stream.constrained()
        if self.layers is not None:
            x, stream = self._run_layers(x, stream, positions, segment_ids)
        x, _ = _gathered(self.last_layer)(x, stream, positions, segment_ids)
        return self.final_norm(x)

    def output_table(self) -> Array:
        """[V, D] float32, the rows that `logits` multiplies `hidden` with: the embedding, or an untied head's."""
        return self.embedding.table[...] if self.head is None else self.head.kernel[...].T

    def logits(self, hidden: Array) -> Array:
        """hidden [B, T, D] to [B, T, V] float32."""
        with jax.named_scope("logits"):
            return self.embedding.logits(hidden) if self.head is None else self.head(hidden)

    def _run_layers(self, x, stream, positions, segment_ids):
        """The first L-1 layers, by the loop that keeps one depth buffer."""
        graph, params = nnx.split(self.layers)
        # Matrices are cast before the loop, not in every layer: the loop reads half the bytes, and keeps no casts.
        params = jax.tree.map(lambda p: p.astype(x.dtype) if p.ndim > 2 else p, params)
        config = self.config

        depth = self.layers.depth
        layer = _layer_function(
            graph, depth.reads_in_operator, depth.entries_per_layer, depth.writes_own_key_value,
            config.attention_implementation,
        )  # fmt: skip
        return depth_scan(
            layer, params, x, stream, positions, segment_ids,
            remat=config.remat, unroll=config.layer_loop == "unroll", gradient_dtype=config.depth_gradient_dtype,
        )  # fmt: skip

    def _check_inputs(self, tokens, segment_ids, positions) -> None:
        for name, array in (("tokens", tokens), ("segment_ids", segment_ids), ("positions", positions)):
            if array is None:
                continue
            if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name}: got shape {array.shape} and dtype {array.dtype}, expected integers [B, T]")
            if array.shape != tokens.shape:
                raise ValueError(f"{name}: got shape {array.shape}, expected the tokens' {tokens.shape}")
        longest = self.config.max_sequence_length
        if tokens.shape[1] > longest:
            raise ValueError(f"tokens: got {tokens.shape[1]} tokens, expected at most max_sequence_length={longest}")


@functools.lru_cache(maxsize=64)  # the same functions for the same model: JAX then knows that it has traced them
def _layer_function(
    graph: nnx.GraphDef,
    reads_in_operator: bool,
    entries_per_layer: int,
    writes_own_key_value: bool,
    implementation: str | None,
) -> Callable | PartedBlock:
    """One stacked layer as `depth_scan` takes it: cut at the op if its mechanism reads the stream nowhere else."""

    def whole(params, x, stream, positions, segment_ids):
        return nnx.merge(graph, gather_layer(params))(x, stream, positions, segment_ids)

    def before(params, x, positions, segment_ids):
        return nnx.merge(graph, params).before(x, positions)

    def after(params, x, key, value, attended, positions, segment_ids):
        return nnx.merge(graph, params).after(x, key, value, attended, positions)

    if not reads_in_operator:
        return whole
    return PartedBlock(
        before, after, entries_per_layer, writes_own_key_value, prepare=gather_layer,
        segment_ids=lambda positions, segment_ids: segment_ids, implementation=implementation,
    )  # fmt: skip


def _gathered(layer: Block) -> Block:
    """The layer with its parameters whole over fsdp, gathered in the compute dtype; itself on one device."""
    if current_mesh() is None:
        return layer
    graph, params = nnx.split(layer)
    dtype = compute_dtype(layer.config.dtype)
    params = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)
    return nnx.merge(graph, gather_layer(params))


def _norm(config: TransformerConfig) -> RMSNorm:
    implementation = beside(config.attention_implementation)
    return RMSNorm(config.width, epsilon=config.norm_epsilon, implementation=implementation)


def _untied_head(config: TransformerConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> Projection:
    """The output projection of a model whose embedding is not tied to it: logits in float32."""
    return Projection(
        "btd,dv->btv", (config.width, config.vocab_size),
        initializer_range=config.initializer_range, dtype=dtype, out_dtype=jnp.float32, rngs=rngs,
    )  # fmt: skip


def _stacked_blocks(config: TransformerConfig, rngs: nnx.Rngs) -> Block:
    """L-1 blocks as one, a leading layer axis on every parameter."""

    @nnx.split_rngs(splits=config.num_layers - 1)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, writes=True, rngs=rngs)

    return build(rngs)
