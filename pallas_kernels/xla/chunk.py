"""The depth part of queries that also see the slots of the earlier tokens of their chunk, forward and backward.

The query at t sees the slots of the tokens t, t - 1, ..., t - reach + 1. Seen from those, token s has the queries of
tokens s, s + 1, s + 2, ...: they stand beside its own as further heads, `depth.py` takes them as it takes any heads,
and at t the parts are merged by their log-sum-exps. So slots and their gradients stay where they are; queries, outputs
and their gradients are shifted along the tokens, some shifts at once, so that at most HEADS heads stand beside a KV
head.

Work: C T S products, of which about half are beyond a chunk's end and dropped. Bytes: the slots are read once for every
HEADS / G shifts.

Axes: B batch, T tokens, J shifts at once, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.depth_chunks import reach
from pallas_kernels.operands import Call, Upstream
from pallas_kernels.parts import Part
from pallas_kernels.xla import depth
from pallas_kernels.xla.blocks import MASKED, loop

HEADS = 16  # of a KV head and token at once: shifts times G, as far as that allows


def forward(call: Call) -> Part:
    """The depth part, in float32."""
    shifts, slots = _Shifts(call), dataclasses.replace(call.depth, chunk=1)

    def some(i: Array | int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = state  # [B, T, N], [B, T, N], [B, T, N, H]
        part = depth.forward(shifts.ahead(call.query, i), slots, call.scale)
        lse = shifts.back(part.lse, i, MASKED)  # [B, T, J, N]
        empty = (lse < MASKED) | ~shifts.seen(i)[..., None]  # by the mask, or there is no slot at all: -inf
        lse = jnp.where(empty, MASKED, lse)
        new_top = jnp.maximum(top, jnp.max(lse, axis=2))
        weights = jnp.where(empty, 0.0, jnp.exp(lse - new_top[:, :, None]))
        decay = jnp.exp(top - new_top)
        acc = acc * decay[..., None] + jnp.sum(weights[..., None] * shifts.back(part.out, i), axis=2)
        return new_top, total * decay + jnp.sum(weights, axis=2), acc

    nothing = jnp.zeros_like(call.query, jnp.float32)
    row = nothing[..., 0]
    top, total, acc = loop(shifts.count, some, (jnp.full_like(row, MASKED), row, nothing))
    empty = total == 0
    out = acc / jnp.where(empty, 1.0, total)[..., None]
    return Part(out, jnp.where(empty, 0.0, top) + jnp.log(total))  # -inf where empty


def backward(call: Call, upstream: Upstream, buffers: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """(dquery float32, and the two buffers with the gradients of key and value added), as `depth.backward`."""
    shifts, slots = _Shifts(call), dataclasses.replace(call.depth, chunk=1)

    def some(i: Array | int, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dquery, *buffers = sums
        ahead = Upstream(
            shifts.ahead(upstream.dout, i),
            shifts.ahead(upstream.lse, i, hidden=-MASKED),  # no probability, and no gradient
            shifts.ahead(upstream.delta, i),
        )
        more, *buffers = depth.backward(shifts.ahead(call.query, i), slots, ahead, call.scale, tuple(buffers))
        return dquery + jnp.sum(shifts.back(more, i), axis=2), *buffers

    return loop(shifts.count, some, (jnp.zeros_like(call.query, jnp.float32), *buffers))


class _Shifts:
    """The shifts 0..C-1 between a query and a token whose slots it sees, in `count` steps of `size`.

    Args:
        call: with a depth part.

    Raises:
        NotImplementedError: the queries' tokens are split over mesh axes that are explicit.
    """

    def __init__(self, call: Call) -> None:
        sharding = jax.typeof(call.query).sharding
        if len(sharding.spec) > 1 and sharding.spec[1] is not None:  # in the type: explicit axes
            raise NotImplementedError(
                f"xla: depth_chunk={call.depth.chunk} with tokens over explicit mesh axes {sharding.spec[1]!r}: "
                "those of a chunk lie on different devices; automatic axes are supported"
            )
        self._tokens, heads = call.query.shape[1:3]
        self._kv_heads = call.num_kv_heads
        chunk = min(call.depth.chunk, self._tokens)
        self.count = -(-chunk // max(HEADS * self._kv_heads // heads, 1))
        self.size = -(-chunk // self.count)  # what is beyond C nobody sees
        self._reach = reach(call.depth.chunk, self._tokens, call.mask.query_segment_ids)

    def seen(self, i: Array | int) -> Array:
        """[B or 1, T, J] bool: whether the query at t sees the slots of the token so many before it."""
        return self._numbers(i) < self._reach[..., None]

    def ahead(self, array: Array, i: Array | int, hidden: float = 0.0) -> Array:
        """What stands at the queries that see token s, [B, T, N, ...] -> [B, T, K J G, ...]; `hidden` where none does.

        The shift is the middle axis of the heads, so that all stand beside their KV head.
        """
        ahead = self._shifted(array, i, forwards=True)  # [B, T, J, N, ...]
        seen = self._numbers(i) < self._shifted(self._reach, i, forwards=True)  # [B or 1, T, J]
        ahead = jnp.where(_beside(seen, ahead), ahead, jnp.asarray(hidden, array.dtype))
        ahead = ahead.reshape(*ahead.shape[:3], self._kv_heads, -1, *ahead.shape[4:])  # [B, T, J, K, G, ...]
        return jnp.swapaxes(ahead, 2, 3).reshape(*ahead.shape[:2], -1, *ahead.shape[5:])

    def back(self, array: Array, i: Array | int, hidden: float = 0.0) -> Array:
        """At query t what tokens t - j made of it, [B, T, K J G, ...] -> [B, T, J, N, ...]; `hidden` where unseen."""
        array = array.reshape(*array.shape[:2], self._kv_heads, self.size, -1, *array.shape[3:])
        array = jnp.swapaxes(array, 2, 3).reshape(*array.shape[:2], self.size, -1, *array.shape[5:])
        back = self._shifted(array, i, forwards=False)
        seen = self.seen(i)  # not by a product with 0: what is not seen may be NaN
        return jnp.where(_beside(seen, back), back, jnp.asarray(hidden, array.dtype))

    def _numbers(self, i: Array | int) -> Array:
        """[1, 1, J] int32: the shifts of a step."""
        return (i * self.size + jnp.arange(self.size, dtype=jnp.int32))[None, None]

    def _shifted(self, array: Array, i: Array | int, *, forwards: bool) -> Array:
        """[B, T, J, ...], at t what `array` has j tokens later: [B, T, ...]; or j tokens before, of its own j: [B, T,
        J, ...]. Beyond the row's ends 0."""
        most = self.count * self.size
        edges = (0, most) if forwards else (most, 0)
        shifted = []
        for j in range(self.size):
            source, number = array if forwards else array[:, :, j], jnp.asarray(i * self.size + j, jnp.int32)
            padded = jnp.pad(source, ((0, 0), edges, *((0, 0),) * (source.ndim - 2)))
            start = number if forwards else most - number
            shifted.append(lax.dynamic_slice_in_dim(padded, start, self._tokens, axis=1))
        return jnp.stack(shifted, axis=2)


def _beside(seen: Array, array: Array) -> Array:
    """[B or 1, T, J] as it is broadcast to `array` [B, T, J, ...]."""
    return seen.reshape(*seen.shape, *(1,) * (array.ndim - 3))
