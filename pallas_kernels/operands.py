"""The values that travel from the public op to the kernels, and back.

Axes: B batch, T queries, U keys, S depth slots, N query heads, K key/value heads, G = N / K, H head_dim. Query head n
reads key/value head n // G. `pallas_kernels.validation` checks what a user passes once; here nothing is checked.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys of the sequence a query sees: those for which all holds that is given.

    Attributes:
        causal: key position <= query position.
        query_positions, key_positions: int32 [B, T] and [B, U]; None: 0..T-1 and 0..U-1. Nothing but `causal` asks.
        query_segment_ids, key_segment_ids: int32 [B, T] and [B, U], both or neither: they are equal.
        key_length: int32 [B]: the key's index is less.
        finite_beyond: keys and values at indices >= key_length are finite, so that an implementation may multiply them
            by 0; else they may be NaN, and have to be cleared.
    """

    causal: bool = dataclasses.field(default=False, metadata=_STATIC)
    query_positions: Array | None = None
    key_positions: Array | None = None
    query_segment_ids: Array | None = None
    key_segment_ids: Array | None = None
    key_length: Array | None = None
    finite_beyond: bool = dataclasses.field(default=False, metadata=_STATIC)

    def cleared(self, array: Array, axis: int = 1) -> Array:
        """Keys or values [B, ..., U, ...] with U at `axis`, with zeros at or beyond the key length."""
        if self.key_length is None or self.finite_beyond:
            return array
        sizes = [1] * array.ndim
        sizes[axis] = array.shape[axis]
        index = jnp.arange(array.shape[axis], dtype=jnp.int32).reshape(sizes)
        filled = index < self.key_length.reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.where(filled, array, jnp.zeros_like(array))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthKV:
    """What earlier layers wrote at each query's own token, and the window of slots that queries see.

    Attributes:
        key, value: [B, T, S, K, H], in the query's dtype or in float8_e4m3fn; their gradients have the query's. Slots
            outside of the window may hold anything, NaN included.
        start, length: the window [start, length), ints or int32 scalars within 0..S; None: 0, and S.
        deferred: of the backward, int or int32 scalar: seen slots before this one get no gradient from the call, which
            gives the query's all the same. Whoever asks for this adds them later, those of many calls at once. None: 0.
        chunk: C, at least 1: a query also sees the slots of the earlier tokens of its chunk of C tokens, see
            `pallas_kernels.depth_chunks`. A document is a run of one id of the mask's `query_segment_ids`.
    """

    key: Array
    value: Array
    start: int | Array | None = None
    length: int | Array | None = None
    deferred: int | Array | None = None
    chunk: int = dataclasses.field(default=1, metadata=_STATIC)

    @property
    def slots(self) -> int:
        """S, also of slots that are not seen."""
        return self.key.shape[2]

    @property
    def empty(self) -> bool:
        """True if it is known while tracing that the window is empty."""
        length = self.slots if self.length is None else self.length
        if self.slots == 0 or (_known(length) and length <= 0):
            return True
        return _known(self.start) and _known(length) and self.start >= length

    def seen(self, slots: Array) -> Array | bool:
        """Whether slots, by their int32 numbers, are in the window; True where that is known of all."""
        seen = True
        if self.length is not None:
            seen = slots < self.length
        if self.start is not None:
            seen = seen & (slots >= self.start)
        return seen

    def gets_gradient(self, slots: Array) -> Array | bool:
        """Whether slots, by their int32 numbers, are seen and not deferred; True where that is known of all."""
        return self.seen(slots) if self.deferred is None else self.seen(slots) & (slots >= self.deferred)

    def is_seen(self) -> Array:
        """[S] bool."""
        return jnp.broadcast_to(self.seen(jnp.arange(self.slots, dtype=jnp.int32)), (self.slots,))

    def any_seen(self) -> Array | bool:
        """Whether the window holds a slot; a bool where that is known while tracing."""
        if self.length is None and self.start is None:
            return self.slots > 0
        start = 0 if self.start is None else self.start
        return (self.slots if self.length is None else self.length) > start


def _known(number: int | Array | None) -> bool:
    return isinstance(number, int | np.integer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """Queries, and all that one block of attention shows them: keys of the sequence, slots of their own token, or both.

    Attributes:
        query: [B, T, N, H].
        key, value: [B, U, K, H], the query's dtype; None: no sequence part.
        mask: of the sequence part.
        depth: the depth part; None: there is none.
        scale: multiplies the logits.
        query_gradient: whether the backward gives the query's gradient; False: None in its place.
    """

    query: Array
    key: Array | None = None
    value: Array | None = None
    mask: Mask = Mask()
    depth: DepthKV | None = None
    scale: float = dataclasses.field(default=1.0, metadata=_STATIC)
    query_gradient: bool = dataclasses.field(default=True, metadata=_STATIC)

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.depth.key.shape[3] if self.key is None else self.key.shape[2]

    @property
    def slots(self) -> int:
        """S; 0 without a depth part."""
        return 0 if self.depth is None else self.depth.slots

    @property
    def sees_slots(self) -> bool:
        """False if it is known while tracing that no slot is seen."""
        return self.depth is not None and not self.depth.empty


class Upstream(NamedTuple):
    """What the gradients of a block need from outside.

    Attributes:
        dout: [B, T, N, H], gradient of the merged output.
        lse, delta: [B, T, N] float32, of the whole softmax: see `pallas_kernels.parts`.
    """

    dout: Array
    lse: Array
    delta: Array


class Gradients(NamedTuple):
    """Of a `Call`'s arrays, each in the query's dtype; None where the call has no such array or does not want it.

    Attributes:
        query, key, value: like the call's.
        depth_key, depth_value: like the depth part's, zero in slots that are not seen or deferred; or the sums, in the
            buffers' dtype, if buffers were given.
    """

    query: Array | None
    key: Array | None = None
    value: Array | None = None
    depth_key: Array | None = None
    depth_value: Array | None = None
