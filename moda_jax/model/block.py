"""One layer of the transformer: attention and FFN sub-layers, with a depth mechanism between them and the carry.

Axes: B batch, T tokens, D model width, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.model.attention import Attention
from moda_jax.model.depth.cut_layer import Cut, Layer, Part, Values, run_layer
from moda_jax.model.depth.mechanism import ATTENTION, FFN, VALUE, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import SoftmaxAttention, second_of_shared
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.depth.stream import Entry, Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import GELUNetwork, LayerNorm, RMSNorm, SwiGLU
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.parameters import LayerGather
from moda_jax.parameter import ParameterKinds
from pallas_kernels.norm import beside

Array = jax.Array
PyTree = Any


class Block(nnx.Module):
    """One layer, in parts so that the loop can cut it at its operations on the stream.

    post-norm (OLMo 2): x + norm(attention(x)), then x + norm(ffn(x)); pre-norm: x + attention(norm(x)), then x +
    ffn(norm(x)); post-norm of the sum: norm(x + attention(x)), then norm(x + ffn(x)). What x is, and what else happens
    to it, is the depth mechanism's. With stochastic depth a row of the batch loses f(x) at random, see `drop_rates`.

    Args:
        config: of the whole model.
        last: the layer is the last one.
        rngs: source of the parameters.
    """

    def __init__(self, config: TransformerConfig, *, last: bool, rngs: nnx.Rngs | InitialKeys) -> None:
        dtype, keys = compute_dtype(config.dtype), InitialKeys.of(rngs)
        self.config = config
        self.attention = Attention(
            config.width, config.num_heads, config.num_kv_heads, config.head_dim, qk_norm=config.qk_norm,
            qk_norm_per_head=config.qk_norm_per_head, rope_theta=config.rope_theta, norm_epsilon=config.norm_epsilon,
            bias=config.biases, initializer_range=config.initializer_range,
            implementation=config.attention_implementation, dtype=dtype, rngs=keys.at("attention"),
        )  # fmt: skip
        self.attention_norm = layer_norm(config)
        self.ffn = _ffn(config, dtype, keys.at("ffn"))
        self.ffn_norm = layer_norm(config)
        self.depth: DepthMechanism = find_mechanism(config.depth).build(config, last=last, rngs=keys.at("depth"))
        self.kinds = ParameterKinds.of(nnx.state(self, nnx.Param))

    def __call__(
        self,
        x: PyTree,
        stream: Stream,
        positions: Array,
        segment_ids: Array | None,
        number: Array | int | None = None,
    ) -> tuple[PyTree, Stream]:
        """The whole layer. x: the carry, [B, T, D]; positions, segment_ids: [B, T] int32; number: the layer's."""
        layer, params = self.cut()
        return run_layer(layer, params, x, stream, number, (positions, segment_ids))

    def cut(self) -> tuple[Layer, nnx.State]:
        """The layer as the loop takes it, and its parameters."""
        graph, params = nnx.split(self)
        return _layer(graph, self.kinds, self.config, type(self.depth), self.depth.writes_own_key_value), params

    # The parts: dicts of values to dicts of values, see `_layer`.

    def ask(
        self, values: Values, positions: Array, segment_ids: Array | None, kept: Array | None = None
    ) -> tuple[Values, tuple[Entry, ...]]:
        """What the attention sub-layer's operation is asked with."""
        request = self.depth.request(ATTENTION, values["x"], values.get("layer"))
        return {"attention_request": request}, ()

    def project(
        self, values: Values, positions: Array, segment_ids: Array | None, kept: Array | None = None
    ) -> tuple[Values, tuple[Entry, ...]]:
        """x to query [B, T, N, H], key and value [B, T, K, H]."""
        inputs, context = self._input(ATTENTION, values, values["x"])
        inputs, *others = inputs if isinstance(inputs, tuple) else (inputs,)
        query, key, value = self.attention.project(inputs, positions, *others)
        given = {"query": query, "key": key, "value": value}
        if self.depth.has_context:
            given["attention_context"] = context
        if VALUE in type(self.depth).operations(self.config):
            given["value_request"] = self.depth.value_request(
                query, key, value, values.get("layer"), self.attention, positions
            )
        return given, ()

    def mix(
        self, values: Values, positions: Array, segment_ids: Array | None, kept: Array | None = None
    ) -> tuple[Values, tuple[Entry, ...]]:
        """Query, key and value as the softmax gets them."""
        query, key, value = self.depth.mixed(
            values["query"], values["key"], values["value"], values["value_result"], values.get("layer")
        )
        return {"mixed_query": query, "mixed_key": key, "mixed_value": value}, ()

    def finish_attention(
        self, values: Values, positions: Array, segment_ids: Array | None, kept: Array | None = None
    ) -> tuple[Values, tuple[Entry, ...]]:
        """From the softmax's output to the carry behind the attention sub-layer, and what the FFN's operation needs."""
        carry, entries = self._after_attention(values, positions, kept)
        return {"middle": carry, "ffn_request": self.depth.request(FFN, carry, values.get("layer"))}, entries

    def finish(
        self, values: Values, positions: Array, segment_ids: Array | None, kept: Array | None = None
    ) -> tuple[Values, tuple[Entry, ...]]:
        """From the softmax's output to the end of the layer."""
        carry, entries = self._after_attention(values, positions, kept)
        output, more = self._after_middle(carry, values, positions, kept)
        return {"output": output}, entries + more

    def finish_ffn(
        self, values: Values, positions: Array, segment_ids: Array | None, kept: Array | None = None
    ) -> tuple[Values, tuple[Entry, ...]]:
        """The FFN sub-layer."""
        output, entries = self._after_middle(values["middle"], values, positions, kept)
        return {"output": output}, entries

    def _input(self, site: str, values: Values, carry: PyTree) -> tuple[Array | tuple[Array, Array, Array], PyTree]:
        """What a sub-layer's first matmul receives, [B, T, D] or three of them, and the mechanism's context."""
        x, context = self.depth.input(site, carry, values.get(f"{site}_result"), values.get("layer"))
        if self.config.norm == "pre":
            norm = self._norm(site)
            if isinstance(x, tuple):
                norms = norm, self.depth.key_input_norm, self.depth.value_input_norm
                x = tuple(norm(part) for norm, part in zip(norms, x, strict=True))
            else:
                x = norm(x)
        return x, context

    def _norm(self, site: str) -> RMSNorm:
        return self.attention_norm if site == ATTENTION else self.ffn_norm

    def _behind(
        self,
        site: str,
        carry: PyTree,
        context: PyTree,
        output: Array,
        number: Array | int | None,
        kept: Array | None,
    ) -> tuple[Array, PyTree]:
        """A sub-layer's output, and the carry behind it, with the norms that stand there."""
        norm = self._norm(site)
        output = norm(output) if self.config.norm == "post" else output
        if kept is not None:
            output = output * self._share_kept(site, number, kept).astype(output.dtype)
        carry = self.depth.residual(site, carry, context, output, number)
        return output, norm(carry) if self.config.norm == "post_sum" else carry

    def _share_kept(self, site: str, number: Array | int, kept: Array) -> Array:
        """What a sub-layer's output is multiplied with, [B, 1, 1] float32: 0, or what keeps its mean."""
        mine = jax.lax.dynamic_index_in_dim(kept, number, keepdims=False)[0 if site == ATTENTION else 1]  # [B]
        rate = drop_rates(self.config)[number]
        return jnp.where(mine, 1.0 / (1.0 - rate), 0.0)[:, None, None]

    def _after_attention(
        self, values: Values, positions: Array, kept: Array | None
    ) -> tuple[PyTree, tuple[Entry, ...]]:
        x, prefix = values["x"], "mixed_" if "mixed_key" in values else ""

        def run() -> tuple[Array, PyTree]:
            attended = values["attended"]
            if type(self.depth).merges(self.config):
                attended = self.depth.attended(*attended, values["value_result"], values.get("layer"))
            y = self.attention.output(attended)
            return self._behind(ATTENTION, x, values.get("attention_context"), y, values.get("layer"), kept)

        sublayer = SubLayer(
            ATTENTION, self.attention, lambda: self._input(ATTENTION, values, x)[0], values[f"{prefix}key"],
            values[f"{prefix}value"], run, positions, values.get("layer"),
        )  # fmt: skip
        entries = self._entries(sublayer)
        return sublayer.carry, entries

    def _after_middle(
        self, carry: PyTree, values: Values, positions: Array, kept: Array | None
    ) -> tuple[PyTree, tuple[Entry, ...]]:
        inputs, context = self._input(FFN, values, carry)

        def run() -> tuple[Array, PyTree]:
            return self._behind(FFN, carry, context, self.ffn(inputs), values.get("layer"), kept)

        sublayer = SubLayer(FFN, self.attention, lambda: inputs, None, None, run, positions, values.get("layer"))
        entries = self._entries(sublayer)
        return sublayer.carry, entries

    def _entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        entries = self.depth.entries(sublayer)
        if sublayer.site == ATTENTION and self.depth.writes_own_key_value:
            # What stands in that slot is taken for the softmax's own by the backward and in decoding.
            own = (
                entries
                and entries[0].when is None
                and all(map(operator.is_, entries[0].values, (sublayer.key, sublayer.value)))
            )
            if not own:
                raise ValueError(
                    f"model.depth={self.config.depth!r}: writes_own_key_value is True, expected the key and value of "
                    f"the sub-layer themselves as the first entry of {type(self.depth).__name__}.entries"
                )
        stream_type = type(self.depth).stream_type
        return tuple(stream_type.constrained_entry(entry) for entry in entries)


@dataclasses.dataclass(frozen=True)
class _Method:
    """A part of the block as a function of its parameters. Compared by value."""

    graph: nnx.GraphDef
    name: str

    def __call__(self, params: PyTree, values: Values, *shared: PyTree) -> tuple[Values, tuple[Entry, ...]]:
        return getattr(nnx.merge(self.graph, params), self.name)(values, *shared)


@functools.lru_cache(maxsize=64)  # the same layer for the same model: JAX then knows that it has traced it
def _layer(
    graph: nnx.GraphDef, kinds: ParameterKinds, config: TransformerConfig, mechanism: type[DepthMechanism],
    writes_own_key_value: bool,
) -> Layer:  # fmt: skip
    """The block cut where its mechanism reads, and at the softmax."""
    operations = mechanism.operations(config)
    numbered = ("layer",) if mechanism.is_numbered(config) or config.stochastic_depth else ()
    context = ("attention_context",) if mechanism.has_context else ()
    attention_result = ("attention_result",) if ATTENTION in operations else ()
    merges = mechanism.merges(config)
    softmax = SoftmaxAttention(
        mechanism.softmax_slots(config), segment_ids=second_of_shared,
        implementation=config.attention_implementation, with_lse=merges, causal=config.causal,
        window=mechanism.softmax_window(config), chunk=mechanism.softmax_chunk(config),
    )  # fmt: skip

    def part(name: str, takes: tuple[str, ...], gives: tuple[str, ...]) -> Part:
        return Part(_Method(graph, name), (*takes, *numbered), gives)

    parts, cuts = [], []
    if ATTENTION in operations:
        parts.append(part("ask", ("x",), ("attention_request",)))
        cuts.append(Cut(operations[ATTENTION], ("attention_request",), "attention_result"))
    heads = ("query", "key", "value")
    if VALUE in operations:
        parts.append(part("project", ("x", *attention_result), (*heads, *context, "value_request")))
        cuts.append(Cut(operations[VALUE], ("value_request",), "value_result"))
        mixed = tuple(f"mixed_{name}" for name in heads)
        parts.append(part("mix", (*heads, "value_result"), mixed))
        heads = mixed
    else:
        parts.append(part("project", ("x", *attention_result), (*heads, *context)))
    cuts.append(Cut(softmax, heads, "attended"))
    takes = ("x", *attention_result, *context, *heads[1:], "attended", *(("value_result",) if merges else ()))
    if FFN in operations:
        parts.append(part("finish_attention", takes, ("middle", "ffn_request")))
        cuts.append(Cut(operations[FFN], ("ffn_request",), "ffn_result"))
        parts.append(part("finish_ffn", ("middle", "ffn_result"), ("output",)))
    else:
        parts.append(part("finish", takes, ("output",)))
    reread = ((heads[1], 0, 0), (heads[2], 1, 0)) if writes_own_key_value else ()
    return Layer(tuple(parts), tuple(cuts), reread, prepare=LayerGather(kinds))


def drop_rates(config: TransformerConfig) -> Array:
    """Stochastic depth (arXiv 1603.09382): the rate by layer, [L] float32, from 0 evenly up to the config's."""
    return jnp.linspace(0.0, config.stochastic_depth, config.num_layers, dtype=jnp.float32)


def _ffn(config: TransformerConfig, dtype: jnp.dtype, rngs: InitialKeys) -> SwiGLU | GELUNetwork:
    options = {"initializer_range": config.initializer_range, "dtype": dtype, "rngs": rngs}
    options["keep_hidden"] = config.remat != "ffn"
    if config.ffn == "gelu":
        implementation = beside(config.attention_implementation)
        return GELUNetwork(config.width, config.ffn_width, bias=config.biases, implementation=implementation, **options)
    return SwiGLU(config.width, config.ffn_width, **options)


def layer_norm(config: TransformerConfig) -> RMSNorm:
    """A norm over the width, with the backward that fits the config's attention."""
    implementation = beside(config.attention_implementation)
    kind = RMSNorm if config.norm_kind == "rms" else LayerNorm
    return kind(config.width, epsilon=config.norm_epsilon, implementation=implementation)
