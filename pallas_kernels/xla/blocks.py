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


def sequence_blocks(query: Array, key: Array) -> tuple[Blocks, Blocks]:
    """Blocks of the T axis of query [B, K, G, T, H] and of the U axis of key [B, K, U, H]."""
    platform = _platform()
    side = math.isqrt(LOGITS[platform] // math.prod(query.shape[:3])) // 64 * 64
    side = min(max(side, SMALLEST_BLOCK[platform]), LARGEST_BLOCK[platform])
    return Blocks.of(query.shape[3], side), Blocks.of(key.shape[2], side)


def depth_blocks(depth_key: Array) -> tuple[Blocks, Blocks]:
    """Blocks of the T axis and of the S axis of depth_key [B, T, S, K, H]."""
    batch, tokens, slots, kv_heads, head_dim = depth_key.shape
    chunks = Blocks.of(slots, SLOT_CHUNK)
    largest = DEPTH[_platform()] // (batch * chunks.size * kv_heads * head_dim)
    return Blocks.of(tokens, max(largest, 1)), chunks


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
