"""MoDA: sequence KV and depth KV under one softmax; each layer appends its keys and values (arXiv 2603.15619).

As in the paper, and by default, depth keys are what the writing layer's attention uses, a token reads all slots of its
own, and one op computes the softmax. The options of `MoDASection` change what is stored, which slots of which tokens
are read, and how the two parts are put together. Where the op knows no such thing it computes the sequence's part
alone, the slots are read before it (`slot_reads`), and the parts are merged by their log-sum-exps, which is the same
softmax:

    out = (e^s out_s + sum_k e^(d_k + bias_k) out_k) / (e^s + sum_k e^(d_k + bias_k) + e^null)

s, d_k the log-sum-exps of the sequence and of the slots of kind k. Null slot and biases start as 0, the scores too; the
gate of separate softmaxes starts as 1/2.

Axes: B batch, T tokens, S slots, N query heads, K key/value heads, G = N / K, H head_dim, E kinds of entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config_checks import require
from moda_jax.model.depth.mechanism import ATTENTION, FFN, VALUE, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.rounded_stream import RoundedDepthStream
from moda_jax.model.depth.slot_reads import SlotAttention
from moda_jax.model.depth.stream import DepthStream, Entry, Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import Projection
from moda_jax.model.rotary import rotate
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parameter import parameter

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
    from moda_jax.depth_config import MoDASection
    from moda_jax.model.attention import Attention

Array = jax.Array


class Learned(nnx.Module):
    """Numbers that start as 0, float32 and not decayed."""

    def __init__(self, *shape: int, axes: tuple[str | None, ...]) -> None:
        self.offset = parameter(jnp.zeros(shape, jnp.float32), *axes)


class MixtureOfDepths(DepthMechanism):
    """Mixture-of-depths attention (paper section 3.2). The last layer writes nothing and has no projections.

    Args:
        width, num_heads, num_kv_heads, head_dim: of the layer.
        section: the options.
        slots: of the model, with `section.read="top"`.
        last: the layer reads only: no entries, no projections.
        initializer_range: standard deviation of the projections at the start.
        dtype: compute dtype.
        rngs: source of the projections.
    """

    stream_type: ClassVar[type[Stream]] = DepthStream
    norms: ClassVar[tuple[str, ...]] = ("pre", "post", "post_sum")
    # [2 * K * H, D] in a file, keys before values.
    tensors: ClassVar[dict[str, tuple[str, int]]] = {
        "ffn_kv.kernel": ("ffn_kv_proj.weight", 1),
        "attention_kv.kernel": ("attention_kv_proj.weight", 1),
    }

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        section: MoDASection,
        slots: int = 0,
        last: bool = False,
        initializer_range: float,
        dtype: jnp.dtype,
        rngs: InitialKeys,
    ) -> None:
        def projection(name: str) -> Projection:
            return Projection(
                "btd,dckh->btckh", (width, 2, num_kv_heads, head_dim),
                initializer_range=initializer_range, dtype=dtype, rngs=rngs.at(name),
            )  # fmt: skip

        self.key, self.query_rotated = section.key, section.query_rotated
        self.last = last
        self.stride = section.read_stride if section.read == "stride" else 1
        exact = section.entry_dtype is None  # slots hold the key and the value themselves
        own = section.key == "own" and self.stride == 1 and not section.attn_kv
        self.writes_own_key_value = own and exact and not last
        self.ffn_kv = projection("ffn_kv") if section.ffn_kv and not last else None
        self.attention_kv = projection("attention_kv") if section.attn_kv and not last else None
        self.null_slot = Learned(num_heads, axes=("heads",)) if section.null_slot else None
        kinds = 1 + int(section.ffn_kv)
        self.entry_bias = Learned(kinds, num_heads, axes=(None, "heads")) if section.entry_bias else None
        self.softmax_gate = Learned(num_heads, axes=("heads",)) if section.softmax == "separate" else None
        self.slot_scores = Learned(slots, axes=(None,)) if section.read == "top" else None

    @classmethod
    def check(cls, config: TransformerConfig) -> None:
        super().check(config)
        section, slots = config.moda, cls.slots(config)
        if section.read in ("window", "hybrid", "top"):
            require(
                section.read_slots <= slots, "model.moda.read_slots", section.read_slots,
                f"at most the model's {slots} depth slots",
            )  # fmt: skip
        if section.read == "stride":
            require(
                section.read_stride < config.num_layers, "model.moda.read_stride", section.read_stride,
                f"less than model.num_layers={config.num_layers}",
            )  # fmt: skip
        require(
            section.chunk <= config.max_sequence_length, "model.moda.chunk", section.chunk,
            f"at most model.max_sequence_length={config.max_sequence_length} tokens",
        )  # fmt: skip
        require(
            section.chunk == 1 or config.causal, "model.moda.chunk", section.chunk,
            "1 with model.causal=False: what a chunk shows are earlier tokens",
        )  # fmt: skip

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> MixtureOfDepths:
        return cls(
            config.width, config.num_heads, config.num_kv_heads, config.head_dim, section=config.moda,
            slots=cls.slots(config), last=last, initializer_range=config.initializer_range,
            dtype=compute_dtype(config.dtype), rngs=rngs,
        )  # fmt: skip

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return len(_writers(config)) * len(cls.entry_sites(config))

    @classmethod
    def is_numbered(cls, config: TransformerConfig) -> bool:
        """Some layers write and others do not: only then the number matters."""
        return config.moda.read == "stride"

    @classmethod
    def softmax_slots(cls, config: TransformerConfig) -> bool:
        return config.moda.one_softmax

    @classmethod
    def softmax_window(cls, config: TransformerConfig) -> int | None:
        return config.moda.read_slots if config.moda.read == "window" else None

    @classmethod
    def softmax_chunk(cls, config: TransformerConfig) -> int:
        return config.moda.chunk

    @classmethod
    def merges(cls, config: TransformerConfig) -> bool:
        return not config.moda.one_softmax

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        section = config.moda
        if section.one_softmax:
            return {}
        bounded = section.read in ("window", "hybrid", "top")
        read = SlotAttention(
            section.read if bounded else "all", section.read_slots if bounded else None,
            section.read_first if section.read == "hybrid" else 0,
            len(cls.entry_sites(config)) if section.entry_bias else 1, config.attention_implementation,
        )  # fmt: skip
        return {VALUE: read}

    @classmethod
    def entry_sites(cls, config: TransformerConfig) -> tuple[str, ...]:
        return (ATTENTION, FFN) if config.moda.ffn_kv else (ATTENTION,)

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        """The projections of all layers that write; the null slot of all; the rest of all that have slots to read."""
        section, heads = config.moda, config.num_heads
        found = cls.matrix_parameters(config)
        found += config.num_layers * heads if section.null_slot else 0
        readers = config.num_layers - 1
        found += readers * heads * len(cls.entry_sites(config)) if section.entry_bias else 0
        found += readers * heads if section.softmax == "separate" else 0
        return found + (
            sum(_filled(config, layer) for layer in range(config.num_layers)) if section.read == "top" else 0
        )

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        per_layer = int(config.moda.ffn_kv) + int(config.moda.attn_kv)
        return len(_writers(config)) * per_layer * config.width * 2 * config.num_kv_heads * config.head_dim

    @classmethod
    def used_sizes(cls, config: TransformerConfig, name: str, layer: int) -> tuple[int, ...] | None:
        """The first layer has no slots to weigh; scores are of filled slots; who writes nothing projects nothing."""
        if name == "slot_scores.offset":
            return (_filled(config, layer),)
        if name.endswith("kernel") and layer not in _writers(config):
            return (0, 0, 0, 0)
        if layer == 0 and name == "entry_bias.offset":
            return (0, 0)
        return (0,) if layer == 0 and name == "softmax_gate.offset" else None

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of 2 N H FLOPs a slot that is read, of (C + 1) / 2 tokens on average."""
        return 2 * config.num_heads * config.head_dim * cls.slots_read(config) * (config.moda.chunk + 1)

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        """Of its own token, whose slots move once for a whole chunk at the least."""
        section = config.moda
        most = section.read_slots if section.read in ("window", "hybrid", "top") else cls.slots(config)
        return sum(min(_filled(config, layer), most) for layer in range(config.num_layers))

    @classmethod
    def added(cls, name: str, parameter: Array) -> Array:
        """A projection [L, D, 2, K, H] whose values are 0: an entry then adds nothing."""
        return parameter * jnp.array([1.0, 0.0])[:, None, None] if name.endswith("kernel") else parameter

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, DepthStream]:
        sizes = self.slots(config) + spare, config.num_kv_heads, config.head_dim
        if config.moda.entry_dtype is None:
            return x, DepthStream.like(x, *sizes).constrained()
        return x, RoundedDepthStream.like(x, *sizes, narrow=config.moda.entry_dtype).constrained()

    def value_request(
        self, query: Array, key: Array, value: Array, layer: Array | int, attention: Attention, positions: Array
    ) -> tuple[Array, Array | None]:
        """The query as it meets depth keys, and the slots' scores."""
        if not self.query_rotated and attention.rope_theta is not None:
            query = rotate(query, -positions, attention.rope_theta)
        if self.key == "reader_norm" and attention.key_norm is not None:  # (q, w * k / rms) = (w * q, k / rms)
            scale = attention.key_norm.scale_of_heads(key.shape[2])[None, None, :, None]
            grouped = query.reshape(*key.shape[:3], -1, key.shape[3]).astype(jnp.float32)  # [B, T, K, G, H]
            query = (grouped * scale).reshape(query.shape).astype(query.dtype)
        return query, None if self.slot_scores is None else self.slot_scores.offset[...]

    def attended(self, out: Array, lse: Array, result: tuple, layer: Array | int) -> Array:
        """The parts as one; without a filled slot, the sequence's alone."""
        wide = out.astype(jnp.float32)
        if self.softmax_gate is not None:
            ((depth, depth_lse),) = result
            share = jax.nn.sigmoid(self.softmax_gate.offset[...])[None, None]
            share = jnp.where(jnp.isfinite(depth_lse), share, 0.0)[..., None]
            return ((1.0 - share) * wide + share * depth.astype(jnp.float32)).astype(out.dtype)
        parts, logits = [wide], [lse]
        for kind, (depth, depth_lse) in enumerate(result):
            bias = 0.0 if self.entry_bias is None else self.entry_bias.offset[kind][None, None]
            parts.append(depth.astype(jnp.float32))
            logits.append(depth_lse + bias)
        if self.null_slot is not None:
            logits.append(jnp.broadcast_to(self.null_slot.offset[...][None, None], lse.shape))
        weights = jax.nn.softmax(jnp.stack(logits), axis=0)[..., None]  # the sequence's log-sum-exp is finite
        return sum(weight * part for weight, part in zip(weights, parts, strict=False)).astype(out.dtype)

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The sequence key and value themselves, or the projection that replaces them; the FFN's, projected."""
        if sublayer.site == ATTENTION and self.writes_own_key_value:
            return (Entry((sublayer.key, sublayer.value)),)
        if self.last or (sublayer.site == FFN and self.ffn_kv is None):
            return ()
        when = None if self.stride == 1 else jnp.asarray(sublayer.layer % self.stride == 0)
        projection = self.attention_kv if sublayer.site == ATTENTION else self.ffn_kv
        if projection is not None:
            projected = projection(sublayer.inputs())  # [B, T, 2, K, H]
            return (Entry((self._placed(projected[:, :, 0], sublayer), projected[:, :, 1]), when),)
        if self.key == "own":
            return (Entry((sublayer.key, sublayer.value), when),)
        return (Entry((self._placed(sublayer.attention.key(sublayer.inputs()), sublayer), sublayer.value), when),)

    def _placed(self, key: Array, sublayer: SubLayer) -> Array:
        """A raw key [B, T, K, H] as it is stored."""
        attention, norm = sublayer.attention, sublayer.attention.key_norm
        if self.key == "own":  # as the layer's own keys
            return attention.place_key(key, sublayer.positions)
        if norm is None:
            return key
        if self.key == "writer_norm":
            return norm(key, sublayer.positions, None)
        return norm.without_scale(key)


def _writers(config: TransformerConfig) -> range:
    """The layers that write."""
    return range(0, config.num_layers - 1, config.moda.read_stride if config.moda.read == "stride" else 1)


def _filled(config: TransformerConfig, layer: int) -> int:
    """Slots that a layer finds filled."""
    return len(MixtureOfDepths.entry_sites(config)) * len([writer for writer in _writers(config) if writer < layer])
