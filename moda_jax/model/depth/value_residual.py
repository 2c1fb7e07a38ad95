"""Value residual (ResFormer): from the second layer on, the first layer's value is mixed into a layer's own.

    v_l <- a_l v_1 + b_l v_l,    l = 2..L, before attention

v_1 is the first layer's raw projection. a and b are fixed, or learned for every layer from the same start.

Source: arXiv 2410.17897. Axes: B batch, T tokens, K key/value heads, H head_dim, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moda_jax.model.depth.mechanism import ATTENTION, VALUE, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import Read
from moda_jax.model.depth.stream import Entry, Stream, empty_slots
from moda_jax.model.initial_keys import InitialKeys

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
from moda_jax.parameter import parameter

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueStream(Stream):
    """Values.

    Attributes:
        value: [B, T, S, K, H].
        length: int32 scalar, filled slots, see `Stream`.
    """

    axes: ClassVar[tuple[tuple[str, ...], ...]] = (("kv_heads", "head_dim"),)

    value: Array
    length: Array | np.int32


@dataclasses.dataclass(frozen=True)
class FirstValue(Read):
    """A `ValueStream`'s first slot. Request: (). Result: [B, T, K, H]; zeros while it is empty."""

    def forward(self, request: tuple, stream: ValueStream, shared: tuple) -> tuple[Array, None]:
        """The slot as it is."""
        return jnp.where(stream.length > 0, stream.value[:, :, 0], 0), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """The result's gradient, added to the slot's."""
        (dvalue,) = dbuffers
        share = jnp.where(stream.length > 0, dresult, 0).astype(dvalue.dtype)
        return request, (dvalue.at[:, :, 0].add(share),)


class MixingWeights(nnx.Module):
    """A layer's a and b (`gate`, [2] float32)."""

    def __init__(self, first: float, own: float) -> None:
        self.gate = parameter(jnp.array([first, own], jnp.float32), None)


class ValueResidual(DepthMechanism):
    """The stream holds v_1, one slot; the carry is the residual stream.

    Args:
        config: of the model.
        last: nobody reads what the last layer would write.
    """

    stream_type: ClassVar[type[Stream]] = ValueStream
    numbered: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("pre", "post", "post_sum")

    def __init__(self, config: TransformerConfig, *, last: bool) -> None:
        section = config.value_residual
        self.fixed = (section.first, section.own)
        self.last = last
        self.weights = MixingWeights(*self.fixed) if section.learned else None

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> ValueResidual:
        del rngs
        return cls(config, last=last)

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return 1

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        return 2 * (config.num_layers - 1) if config.value_residual.learned else 0

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of K H in every layer but the first."""
        return 4 * config.num_kv_heads * config.head_dim * cls.slots_read(config)

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        return config.num_layers - 1

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return {VALUE: FirstValue()}

    @classmethod
    def used_sizes(cls, config: TransformerConfig, name: str, layer: int) -> tuple[int]:
        """The first layer mixes nothing."""
        return (0,) if layer == 0 else (2,)

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, ValueStream]:
        slots = empty_slots(x, self.slots(config), (config.num_kv_heads, config.head_dim))
        return x, ValueStream(slots, np.int32(0)).constrained()

    def value_request(self, query: Array, key: Array, value: Array, *others: object) -> tuple:
        return ()

    def mixed(
        self, query: Array, key: Array, value: Array, result: Array, layer: Array | int
    ) -> tuple[Array, Array, Array]:
        first, own = self.fixed if self.weights is None else self.weights.gate[...]
        mixture = first * result.astype(jnp.float32) + own * value.astype(jnp.float32)
        return query, key, jnp.where(layer == 0, value, mixture.astype(value.dtype))

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The first layer's value."""
        if sublayer.site != ATTENTION or self.last:
            return ()
        return (Entry((sublayer.value,), jnp.asarray(sublayer.layer == 0)),)
