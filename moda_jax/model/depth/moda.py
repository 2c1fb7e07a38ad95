"""MoDA: sequence KV and depth KV under one softmax; each layer appends its keys and values (arXiv 2603.15619)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from moda_jax.model.depth.mechanism import ATTENTION, FFN, DepthMechanism, SubLayer
from moda_jax.model.depth.stream import DepthStream, Entry, Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import Projection
from moda_jax.numerics.precision import compute_dtype

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array


class MixtureOfDepths(DepthMechanism):
    """Mixture-of-depths attention (paper section 3.2). The last layer writes nothing and has no projections.

    Args:
        width, num_kv_heads, head_dim: of the layer.
        ffn_kv: the FFN sub-layer writes an entry too, a linear projection of its input (table 3 row 4).
        attention_kv: the attention sub-layer writes a projection of its input instead of its own KV (row 5).
        writes: False for a layer that reads only (the last): no entries, no projections.
        initializer_range: standard deviation of the projections at the start.
        dtype: compute dtype.
        rngs: source of the projections.
    """

    stream_type: ClassVar[type[Stream]] = DepthStream
    softmax_slots: ClassVar[bool] = True
    # [2 * K * H, D] in a file, keys before values.
    tensors: ClassVar[dict[str, tuple[str, int]]] = {
        "ffn_kv.kernel": ("ffn_kv_proj.weight", 1),
        "attention_kv.kernel": ("attention_kv_proj.weight", 1),
    }

    def __init__(
        self,
        width: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        ffn_kv: bool,
        attention_kv: bool,
        writes: bool = True,
        initializer_range: float,
        dtype: jnp.dtype,
        rngs: InitialKeys,
    ) -> None:
        def projection(name: str) -> Projection:
            return Projection(
                "btd,dckh->btckh", (width, 2, num_kv_heads, head_dim),
                initializer_range=initializer_range, dtype=dtype, rngs=rngs.at(name),
            )  # fmt: skip

        self.writes_own_key_value = writes and not attention_kv
        self.ffn_kv = projection("ffn_kv") if writes and ffn_kv else None
        self.attention_kv = projection("attention_kv") if writes and attention_kv else None

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> MixtureOfDepths:
        return cls(
            config.width, config.num_kv_heads, config.head_dim, ffn_kv=config.moda.ffn_kv,
            attention_kv=config.moda.attn_kv, writes=not last, initializer_range=config.initializer_range,
            dtype=compute_dtype(config.dtype), rngs=rngs,
        )  # fmt: skip

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return (config.num_layers - 1) * len(cls.entry_sites(config))

    @classmethod
    def entry_sites(cls, config: TransformerConfig) -> tuple[str, ...]:
        return (ATTENTION, FFN) if config.moda.ffn_kv else (ATTENTION,)

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        """The projections of all layers but the last."""
        per_layer = int(config.moda.ffn_kv) + int(config.moda.attn_kv)
        return (config.num_layers - 1) * per_layer * config.width * 2 * config.num_kv_heads * config.head_dim

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        return cls.parameters(config)

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of 2 N H FLOPs a slot; layer l (from 0) meets l x entries of them."""
        slots_met = len(cls.entry_sites(config)) * config.num_layers * (config.num_layers - 1) // 2
        return 4 * config.num_heads * config.head_dim * slots_met

    @classmethod
    def added(cls, name: str, parameter: Array) -> Array:
        """A projection [L, D, 2, K, H] whose values are 0: an entry then adds nothing."""
        return parameter * jnp.array([1.0, 0.0])[:, None, None]

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, DepthStream]:
        slots = self.slots(config) + spare
        return x, DepthStream.like(x, slots, config.num_kv_heads, config.head_dim).constrained()

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The sequence key and value themselves, or the projection that replaces them; the FFN's, projected."""
        if sublayer.site == ATTENTION and self.writes_own_key_value:
            return (Entry((sublayer.key, sublayer.value)),)
        projection = self.attention_kv if sublayer.site == ATTENTION else self.ffn_kv
        if projection is None:
            return ()
        projected = projection(sublayer.inputs())  # [B, T, 2, K, H]
        # The key gets the layer's own key norm and rotation, as its own keys do.
        key = sublayer.attention.place_key(projected[:, :, 0], sublayer.positions)
        return (Entry((key, projected[:, :, 1])),)
