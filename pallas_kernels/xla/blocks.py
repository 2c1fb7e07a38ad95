"""How the two parts are cut into steps: block sizes, blocks of an axis, the loop over them, and the dot inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The only place for block sizes. A block of logits has about LOGITS[platform] elements, a block of depth keys about
# DEPTH[platform]: on a CPU so few that they stay in the cache (measured: with blocks of 256 instead of 64 at B * N = 64
# the backward takes up to 5 times as long, the depth part of all tokens at once 3 times), on a GPU enough for a launch.
LOGITS = {"cpu": 2**18, "gpu": 2**25}
SMALLEST_BLOCK = {"cpu": 64, "gpu": 128}
LARGEST_BLOCK = {"cpu": 256, "gpu": 1024}
DEPTH = {"cpu": 2**18, "gpu": 2**26}
SLOT_CHUNK = 8
# As many queries of a KV head take all keys at once: their logits are fewer than the keys' elements, and XLA would copy
# a cache that a loop reads before it is written.
FEW_QUERIES = 16
FEWEST_TOKENS = 8  # of a block of the depth part: with less, no part of it would be left to some of 8 devices

# A masked logit, and the running maximum before the first one: the lowest number, so that no real logit lies below it,
# and finite, so that no difference of two is NaN. Whether a query saw anything is never read off it, but off the sum of
# its weights, which the mask keeps at 0.
MASKED = float(np.finfo(np.float32).min)


class Blocks(NamedTuple):
    """`count` blocks of `size` that cover `length`; the last ones overlap when it is ragged."""

    length: int
    size: int
    count: int

    @classmethod
    def of(cls, length: int, largest: int) -> Blocks:
        """The fewest blocks of at most `largest`, of equal size."""
        count = -(-length // largest)
        return cls(length, -(-length // count), count)

    @property
    def ragged(self) -> bool:
        """True if some blocks overlap."""
        return self.size * self.count != self.length

    def start(self, index: Array | int) -> Array | int:
        """First element of a block."""
        return 0 if self.count == 1 else jnp.minimum(index * self.size, self.length - self.size)

    def slice(self, array: Array, index: Array | int, axis: int) -> Array:
        """A block of `array` along `axis`."""
        return array if self.count == 1 else lax.dynamic_slice_in_dim(array, self.start(index), self.size, axis)

    def update(self, array: Array, block: Array, index: Array | int, axis: int) -> Array:
        """`array` with a block along `axis` replaced; in place where `array` is carried through a loop."""
        if self.count == 1:
            return block
        return lax.dynamic_update_slice_in_dim(array, block, self.start(index), axis)

    def elements(self, index: Array | int) -> Array:
        """[size] int32: the places of a block's elements."""
        return self.start(index) + jnp.arange(self.size, dtype=jnp.int32)

    def fresh(self, index: Array | int) -> Array:
        """[size] bool: not already covered by the block before."""
        return self.elements(index) >= index * self.size


class TokenBlocks(Blocks):
    """Blocks of the T axis where tokens do not meet: block i is every `count`-th token, from token i on.

    A block then has tokens of every stretch of T, and where T is split over devices XLA leaves each device its own: a
    block is cut out of the second axis of [B, size, count, ...], and the first is the one that is split. Where no count
    near the fewest divides T, blocks are stretches that overlap.
    """

    @classmethod
    def of(cls, length: int, largest: int) -> TokenBlocks:
        """The fewest blocks of at most `largest`, up to twice as many if they then are of equal size."""
        fewest = Blocks.of(length, largest)
        counts = range(fewest.count, min(2 * fewest.count, length) + 1)
        count = next((count for count in counts if length % count == 0), None)
        return cls(*fewest) if count is None else cls(length, length // count, count)

    @property
    def strided(self) -> bool:
        """False for stretches, and for one block of all."""
        return self.count > 1 and not self.ragged

    def view(self, array: Array) -> Array:
        """[B, T, ...] as [B, size, count, ...]; as it is if not strided."""
        return array.reshape(array.shape[0], self.size, self.count, *array.shape[2:]) if self.strided else array

    def flat(self, view: Array) -> Array:
        """A view as [B, T, ...] again."""
        return view.reshape(view.shape[0], self.length, *view.shape[3:]) if self.strided else view

    def cut(self, view: Array, index: Array | int, first: Array | int = 0, slots: int | None = None) -> Array:
        """A block [B, size, S, ...] of a view, in one step with a part of S: `slots` from `first` on; None: all."""
        axes = 3 if self.strided else 2
        slots = view.shape[axes] if slots is None else slots
        sizes = (view.shape[0], self.size, *(1,) * (axes - 2), slots, *view.shape[axes + 1 :])
        block = lax.dynamic_slice(view, self._corner(view, index, first), sizes)
        return block[:, :, 0] if self.strided else block

    def put(self, view: Array, block: Array, index: Array | int, first: Array | int = 0) -> Array:
        """A view with what `cut` gives replaced; in place where the view is carried through a loop."""
        block = block[:, :, None] if self.strided else block
        return lax.dynamic_update_slice(view, block, self._corner(view, index, first))

    def _corner(self, view: Array, index: Array | int, first: Array | int) -> list[Array]:
        """Where a block begins; of one dtype, also where JAX computes in 64 bits."""
        starts = (0, 0, index, first) if self.strided else (0, self.start(index), first)
        return [jnp.asarray(start, jnp.int32) for start in (*starts, *(0,) * (view.ndim - len(starts)))]


def sequence_blocks(query: Array, key: Array) -> tuple[Blocks, Blocks]:
    """Blocks of the T axis of query [B, K, G, T, H] and of the U axis of key [B, K, U, H]."""
    if few_queries(query):
        return Blocks.of(query.shape[3], query.shape[3]), Blocks.of(key.shape[2], key.shape[2])
    platform = _platform()
    side = math.isqrt(LOGITS[platform] // math.prod(query.shape[:3])) // 64 * 64
    side = min(max(side, SMALLEST_BLOCK[platform]), LARGEST_BLOCK[platform])
    return Blocks.of(query.shape[3], side), Blocks.of(key.shape[2], side)


def few_queries(query: Array) -> bool:
    """Whether query [B, K, G, T, H] is so small that all keys are taken at once."""
    return query.shape[2] * query.shape[3] <= FEW_QUERIES


def depth_blocks(depth_key: Array) -> tuple[TokenBlocks, Blocks]:
    """Blocks of the T axis and of the S axis of depth_key [B, T, S, K, H]."""
    batch, tokens, slots, kv_heads, head_dim = depth_key.shape
    chunks = Blocks.of(slots, slots if tokens == 1 else SLOT_CHUNK)  # of one token, all at once
    largest = DEPTH[_platform()] // (batch * chunks.size * kv_heads * head_dim)
    return TokenBlocks.of(tokens, max(largest, FEWEST_TOKENS)), chunks


def _platform() -> str:
    """The platform whose block sizes hold: another accelerator is taken for a GPU."""
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def loop[State](count: Array | int, body: Callable[[Array | int, State], State], state: State) -> State:
    """`fori_loop` with an int32 index, also under x64; a single step known while tracing is not wrapped in a loop."""
    if isinstance(count, int) and count == 1:
        return body(0, state)
    return lax.fori_loop(0, count, lambda index, state: body(lax.convert_element_type(index, jnp.int32), state), state)


def loop_between[State](
    first: Array | int, last: Array | int, body: Callable[[Array | int, State], State], state: State
) -> State:
    """`loop` over [first, last)."""
    if isinstance(first, int) and first == 0:
        return loop(last, body, state)
    return loop(last - first, lambda index, state: body(first + index, state), state)


def dot(spec: str, left: Array, right: Array) -> Array:
    """Matrix product with float32 accumulation and result: exact float32 products, or those of the narrow dtype."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=jnp.float32)
