"""MoDA's attention as one layer, for any model.

Axes: B batch, T tokens, D model width, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config_checks import require
from moda_jax.depth_config import MoDASection
from moda_jax.model.attention import Attention, default_positions
from moda_jax.model.attention_cache import AttentionCache
from moda_jax.model.depth.mechanism import ATTENTION, FFN, SubLayer
from moda_jax.model.depth.moda import MixtureOfDepths
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.stream import DepthStream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.numerics.precision import compute_dtype
from pallas_kernels import moda_attention

Array = jax.Array


class MoDAAttention(Attention):
    """Mixture-of-depths attention as one layer, for any model: reads the depth stream, then appends its own KV to it.

        y_t = W_o softmax([q_t . K[0..t], q_t . K_depth[t, :length]] / sqrt(H)) [V[0..t]; V_depth[t, :length]]

    With `chunk=C` the slots of the earlier tokens of t's chunk of C tokens, counted from each document's first, join.
    With `causal=False` a token sees the whole sequence, and depth as before.

    Differentiating a stack of these layers with plain autodiff is right, but keeps one copy of the depth stream per
    layer (memory grows with the square of the depth). `depth_scan` runs the same stack with one buffer.

    Args:
        width, num_heads, num_kv_heads, head_dim: D, N, K, H; K divides N.
        ffn_kv: holds the projection that `write_ffn` needs (the paper's default variant).
        attention_kv: writes a projection of the input instead of the layer's own KV.
        causal: a token sees the sequence up to itself; False: all of it, and `decode` is refused.
        chunk: C, see above; 1: a token reads its own slots. More needs `causal`, and `decode` is refused.
        qk_norm, qk_norm_per_head, rope_theta, norm_epsilon, bias, initializer_range: as in `Attention`.
        implementation: of the op, see `pallas_kernels.moda_attention`; None: the best for the device.
        dtype: compute dtype; None: bfloat16 on a GPU, float32 elsewhere.
        rngs: source of the kernels.

    Source: arXiv 2603.15619, section 3.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        ffn_kv: bool = False,
        attention_kv: bool = False,
        causal: bool = True,
        chunk: int = 1,
        qk_norm: bool = True,
        qk_norm_per_head: bool = False,
        rope_theta: float | None = 500000.0,
        norm_epsilon: float = 1e-6,
        bias: bool = False,
        initializer_range: float = 0.02,
        implementation: str | None = None,
        dtype: jnp.dtype | str | None = None,
        rngs: nnx.Rngs | InitialKeys,
    ) -> None:
        require(isinstance(chunk, int) and chunk > 0, "chunk", chunk, "a number of tokens, at least 1")
        require(causal or chunk == 1, "chunk", chunk, "1 with causal=False: what a chunk shows are earlier tokens")
        dtype, keys = compute_dtype(dtype), InitialKeys.of(rngs)
        super().__init__(
            width, num_heads, num_kv_heads, head_dim, qk_norm=qk_norm, qk_norm_per_head=qk_norm_per_head,
            rope_theta=rope_theta, norm_epsilon=norm_epsilon, bias=bias, initializer_range=initializer_range,
            implementation=implementation, dtype=dtype, rngs=keys,
        )  # fmt: skip
        self.implementation, self.causal, self.chunk = implementation, causal, chunk
        self.depth = MixtureOfDepths(
            width, num_heads, num_kv_heads, head_dim,
            section=MoDASection(ffn_kv=ffn_kv, attn_kv=attention_kv, chunk=chunk),
            initializer_range=initializer_range, dtype=dtype, rngs=keys.at("depth"),
        )  # fmt: skip

    def __call__(
        self,
        x: Array,
        stream: DepthStream,
        segment_ids: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, DepthStream]:
        """Attends over the sequence and the depth stream, then writes this layer's entry.

        Args:
            x: [B, T, D].
            stream: what earlier layers wrote.
            segment_ids: [B, T] int32; a token sees the sequence KV of its own segment only. The depth part needs no
                mask.
            positions: [B, T] int32 for the rotary embedding; None: 0..T-1.

        Returns:
            y [B, T, D] and the stream with one more entry.

        Raises:
            ValueError: a full stream (when its length is concrete), a stream of another shape or dtype than the layer
                reads and writes, or shapes that do not fit.
        """
        self._check_stream(x, stream)
        positions = default_positions(x) if positions is None else positions
        query, key, value = self.project(x, positions)
        operation = SoftmaxAttention(
            True, segment_ids=_only, implementation=self.implementation, causal=self.causal, chunk=self.chunk
        )
        y = self.output(operation((query, key, value), stream, (segment_ids,)))
        return y, self._written(ATTENTION, x, stream, positions, key, value)

    def decode(
        self, x: Array, stream: DepthStream, cache: AttentionCache, positions: Array | None = None
    ) -> tuple[Array, DepthStream, AttentionCache]:
        """The next tokens of a text whose earlier tokens are in the cache: a prompt's, or one at a time.

        As a call over the whole text gives for these tokens. For inference: the cache is not meant to be differentiated
        through a loop.

        Args:
            x: [B, T, D], the T tokens behind those in the cache.
            stream: what earlier layers wrote for these tokens.
            cache: this layer's own.
            positions: [B, T] int32 for the rotary embedding; None: `cache.places(T)`. `write_ffn` wants the same ones.

        Returns:
            y [B, T, D], the stream with one more entry, and the cache with T more tokens in each row.

        Raises:
            ValueError: a full stream or cache (when its length is concrete), or shapes that do not fit; or a layer with
                `causal=False`, whose tokens change with every one that comes; or with a `chunk`, of whose earlier
                tokens the stream has no slots.
        """
        if not self.causal:
            raise ValueError("MoDAAttention.decode: the layer was built with causal=False, expected causal=True")
        if self.chunk > 1:
            raise ValueError(f"MoDAAttention.decode: the layer was built with chunk={self.chunk}, expected chunk=1")
        places = cache.places(x.shape[1])
        positions = places if positions is None else positions
        query, key, value = self.project(x, positions)
        cache = cache.append(key, value)
        depth_key, depth_value = (stream.key, stream.value) if stream.slots else (None, None)
        attended = moda_attention(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), depth_key, depth_value,
            depth_length=stream.length if stream.slots else None, query_positions=places, key_length=cache.length,
            implementation=self.implementation,
        )  # fmt: skip
        return self.output(attended), self._written(ATTENTION, x, stream, positions, key, value), cache

    def write_ffn(self, inputs: Array, stream: DepthStream, positions: Array | None = None) -> DepthStream:
        """The stream after the FFN sub-layer's entry, projected from its input `inputs` [B, T, D].

        Raises:
            ValueError: the layer was built without `ffn_kv=True`, or a stream that does not fit, as for the call.
        """
        self._check_stream(inputs, stream)
        if self.depth.ffn_kv is None:
            raise ValueError("MoDAAttention.write_ffn: the layer was built with ffn_kv=False, expected ffn_kv=True")
        positions = default_positions(inputs) if positions is None else positions
        return self._written(FFN, inputs, stream, positions)

    def _check_stream(self, x: Array, stream: DepthStream) -> None:
        """Raises ValueError unless the stream stands beside the tokens of x, in the layer's heads and compute dtype.

        It is not cast: that would be a copy of the whole buffer in every layer.
        """
        _, heads, head_dim = self.key.kernel.shape
        expected = (*x.shape[:2], stream.slots, heads, head_dim)
        for name, array in (("key", stream.key), ("value", stream.value)):
            if array.shape != expected or array.dtype != self.key.dtype:
                raise ValueError(
                    f"stream.{name} is {array.dtype}{list(array.shape)}: expected the layer's compute dtype "
                    f"{jnp.dtype(self.key.dtype)} and [B, T, S, K, H] = {list(expected)}, as of "
                    f"DepthStream.empty(..., dtype={str(jnp.dtype(self.key.dtype))!r})"
                )

    def _written(
        self,
        site: str,
        inputs: Array,
        stream: DepthStream,
        positions: Array,
        key: Array | None = None,
        value: Array | None = None,
    ) -> DepthStream:
        """The stream with what the mechanism writes behind a sub-layer."""
        sublayer = SubLayer(site, self, lambda: inputs, key, value, lambda: (inputs, inputs), positions, None)
        for entry in self.depth.entries(sublayer):
            stream = stream.append(*entry.values)
        return stream


def _only(segment_ids: Array | None) -> Array | None:
    """The segment ids, which are all that the operation is given here."""
    return segment_ids
