"""A depth stream whose entries are kept in fewer bits than the layers compute with.

Axes: B batch, T tokens, S slots, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.model.depth.stream import DepthStream, Entry, empty_slots, write_slot

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedDepthStream(DepthStream):
    """A `DepthStream` whose buffers have a narrower dtype than its entries, which are rounded when they are written.

    Gradients go straight through: that of an entry is that of its rounded self, in the entry's dtype. Autodiff would
    give a buffer's gradient the buffer's dtype, in which most gradients are 0. Hence `straight`: it is written as the
    buffers are, and readers have it for an argument besides, whose value they do not use but whose gradient they give
    (`with_own_backward`). So nothing of it is ever computed but gradients.

    Attributes:
        key, value: [B, T, S, K, H] in the narrow dtype.
        straight: two arrays of that shape in the entries' dtype; None: the stream is not differentiated.
        entry_dtype: the entries'.
    """

    straight: tuple[Array, Array] | None = None
    entry_dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def buffers(self) -> tuple[Array, ...]:
        return self.key, self.value

    def with_buffers(self, buffers: tuple[Array, ...], length: Array | np.int32) -> RoundedDepthStream:
        key, value = buffers
        return dataclasses.replace(self, key=key, value=value, length=length)

    @property
    def differentiated(self) -> tuple[Array, ...]:
        if self.straight is not None:
            return self.straight
        return tuple(jnp.zeros_like(buffer, self.entry_dtype) for buffer in self.buffers)

    def with_differentiated(self, arrays: tuple[Array, ...]) -> RoundedDepthStream:
        return dataclasses.replace(self, straight=tuple(arrays))

    @property
    def entry_dtypes(self) -> tuple[jnp.dtype, ...]:
        return self.entry_dtype, self.entry_dtype

    @property
    def entries(self) -> tuple[Array, ...]:
        return tuple(buffer.astype(self.entry_dtype) for buffer in self.buffers)

    def bare(self) -> RoundedDepthStream:
        return dataclasses.replace(self, straight=None)

    def with_gradients_of(self, other: RoundedDepthStream) -> RoundedDepthStream:
        return dataclasses.replace(self, straight=other.straight)

    def cotangent(self, gradients: tuple[Array, ...]) -> RoundedDepthStream:
        zeros = tuple(jnp.zeros_like(buffer) for buffer in self.buffers)
        none = self.with_buffers(zeros, np.zeros((), jax.dtypes.float0))
        return none if self.straight is None else none.with_differentiated(gradients)

    def constrained(self) -> RoundedDepthStream:
        laid_out = super().constrained()
        if self.straight is None:
            return laid_out
        plain = DepthStream(*self.straight, self.length).constrained()
        return laid_out.with_differentiated(plain.buffers)

    @classmethod
    def empty(
        cls,
        batch: int,
        tokens: int,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype | str | None = None,
        narrow: jnp.dtype | str = "float8_e4m3fn",
    ) -> RoundedDepthStream:
        """As `DepthStream.empty`; dtype: of the entries, narrow: of the buffers."""
        straight = DepthStream.empty(batch, tokens, slots, num_kv_heads, head_dim, dtype).buffers
        buffers = (jnp.zeros_like(array, narrow) for array in straight)
        return cls(*buffers, np.int32(0), straight, straight[0].dtype)

    @classmethod
    def like(
        cls,
        x: Array,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype | str | None = None,
        narrow: jnp.dtype | str = "float8_e4m3fn",
    ) -> RoundedDepthStream:
        """As `DepthStream.like`; dtype: of the entries, narrow: of the buffers."""
        straight = DepthStream.like(x, slots, num_kv_heads, head_dim, dtype).buffers
        buffers = (empty_slots(x, slots, (num_kv_heads, head_dim), narrow) for _ in ("key", "value"))
        return cls(*buffers, np.int32(0), straight, straight[0].dtype)

    def write(self, entry: Entry, *, fits: bool = False) -> RoundedDepthStream:
        slot, fits = self.slot_of(entry.when), fits and entry.when is None
        buffers = (
            write_slot(buffer, saturated(jax.lax.stop_gradient(value), buffer.dtype), slot, fits=fits)
            for buffer, value in zip(self.buffers, entry.values, strict=True)
        )
        straight = self.straight
        if straight is not None:
            pairs = zip(straight, entry.values, strict=True)
            straight = tuple(write_slot(array, value, slot, fits=fits) for array, value in pairs)
        after = self.with_buffers(tuple(buffers), self.length_after(1, entry.when))
        return dataclasses.replace(after, straight=straight)


def saturated(x: Array, dtype: jnp.dtype) -> Array:
    """x in a narrower float dtype: the nearest number, or the largest one, where a cast would make a NaN. NaN stays."""
    largest = jnp.asarray(jnp.finfo(dtype).max, x.dtype)
    return jnp.clip(x, -largest, largest).astype(dtype)
