"""Depth streams: what the layers so far wrote, a fixed number of slots beside every token.

A slot is one entry of one token. The buffers are allocated once per step; layers fill their slots in order and read the
filled ones (arXiv 2603.15619, section 3). Everything in them is per token: nothing here ever mixes two tokens.

Axes: B batch, T tokens, S slots, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.manual import varying_like
from moda_jax.parallel.mesh import constrain

Array = jax.Array


class Entry(NamedTuple):
    """What is written to one slot.

    Attributes:
        values: one array [B, T, ...] per buffer of the stream, in their order.
        when: bool scalar; False: nothing is written and no slot is taken. None: always written.
    """

    values: tuple[Array, ...]
    when: Array | None = None


class Stream:
    """Append-only buffers of one length: the base of every stream.

    A subclass is a frozen dataclass, registered as a pytree, whose fields but `length` are buffers [B, T, S, ...].

    Attributes:
        length: int32 scalar, entries written. Concrete (a NumPy scalar) while their number is known in Python, so that
            an overflow is an error; traced inside a scan. More than S: that many entries found no slot and are lost.
    """

    axes: ClassVar[tuple[tuple[str, ...], ...]] = ()  # of each buffer, the logical axes of an entry behind [B, T]

    length: Array | np.int32

    @property
    def buffers(self) -> tuple[Array, ...]:
        """The buffers, in the order of the fields. Slots at or beyond `length` hold anything and are never read."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "length")

    def with_buffers(self, buffers: tuple[Array, ...], length: Array | np.int32) -> Self:
        """A stream of the same kind with other contents."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "length"]
        return type(self)(**dict(zip(names, buffers, strict=True)), length=length)

    def with_length(self, length: Array | np.int32) -> Self:
        """The same buffers with another length."""
        return self.with_buffers(self.buffers, length)

    @property
    def differentiated(self) -> tuple[Array, ...]:
        """One array [B, T, S, ...] per buffer, of its shape and of its entries' dtype: what the gradients are of."""
        return self.buffers

    def with_differentiated(self, arrays: tuple[Array, ...]) -> Self:
        """The same stream with other such arrays."""
        return self.with_buffers(arrays, self.length)

    @property
    def entry_dtypes(self) -> tuple[jnp.dtype, ...]:
        """Of each buffer the dtype of its entries and of their gradients."""
        return tuple(buffer.dtype for buffer in self.buffers)

    @property
    def entries(self) -> tuple[Array, ...]:
        """The buffers in the dtypes of their entries."""
        return self.buffers

    def bare(self) -> Self:
        """The same stream, without what serves JAX's autodiff alone."""
        return self

    def with_gradients_of(self, other: Self) -> Self:
        """The same stream, with what serves JAX's autodiff alone as `other` has it."""
        del other
        return self

    def cotangent(self, gradients: tuple[Array, ...]) -> Self:
        """What a `custom_vjp` whose argument is this stream returns for it; gradients: as `differentiated`."""
        return self.with_buffers(gradients, np.zeros((), jax.dtypes.float0))

    @property
    def slots(self) -> int:
        """S, the capacity."""
        return self.buffers[0].shape[2] if self.buffers else 0

    def constrained(self) -> Self:
        """The same stream, laid out on the current mesh like the tokens that it belongs to."""
        laid_out = (
            constrain(buffer, "batch", "tokens", "slots", *axes)
            for buffer, axes in zip(self.buffers, self.axes, strict=True)
        )
        return self.with_buffers(tuple(laid_out), self.length)

    @classmethod
    def constrained_entry(cls, entry: Entry) -> Entry:
        """The entry, laid out like a stream of this kind."""
        laid_out = (
            constrain(value, "batch", "tokens", *axes) for value, axes in zip(entry.values, cls.axes, strict=True)
        )
        return Entry(tuple(laid_out), entry.when)

    def write(self, entry: Entry, *, fits: bool = False) -> Self:
        """The stream with one more entry; unchecked: one that finds no slot is not written. fits: as of `write_slot`,
        of an entry that is always written."""
        slot, fits = self.slot_of(entry.when), fits and entry.when is None
        buffers = tuple(
            write_slot(buffer, value, slot, fits=fits) for buffer, value in zip(self.buffers, entry.values, strict=True)
        )
        return self.with_buffers(buffers, self.length_after(1, entry.when))

    def slot_of(self, when: Array | None = None) -> Array | np.int32:
        """Where the next entry goes; S, no slot, if it is not written."""
        return self.length if when is None else jnp.where(when, self.length, self.slots).astype(jnp.int32)

    def length_after(self, entries: int, when: Array | None = None) -> Array | np.int32:
        """The length once `entries` more have been written; beyond S where some found no slot."""
        if when is not None:
            entries = jnp.where(when, entries, 0)
        if is_traced(self.length) or when is not None:
            return (self.length + entries).astype(jnp.int32)
        return np.int32(int(self.length) + entries)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoStream(Stream):
    """The stream of a mechanism that keeps nothing: no buffer, no slot.

    Attributes:
        length: 0.
    """

    length: Array | np.int32 = np.int32(0)  # noqa: RUF009 (a NumPy scalar is immutable)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthStream(Stream):
    """Depth KV of a batch. Immutable: `append` returns a new stream (which XLA updates in place inside a jitted loop).

    Attributes:
        key: [B, T, S, K, H]; slots at or beyond `length` hold anything and are never read.
        value: [B, T, S, K, H].
        length: int32 scalar, filled slots, see `Stream`.
    """

    axes: ClassVar[tuple[tuple[str, ...], ...]] = (("kv_heads", "head_dim"),) * 2

    key: Array
    value: Array
    length: Array | np.int32

    @classmethod
    def empty(
        cls,
        batch: int,
        tokens: int,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype | str | None = None,
    ) -> DepthStream:
        """A stream of `slots` empty slots for each of `batch` x `tokens` tokens; dtype None: the layers' default."""
        dtype = compute_dtype(dtype)
        shape = (batch, tokens, slots, num_kv_heads, head_dim)
        if min(shape) < 0:
            raise ValueError(f"DepthStream.empty: sizes must not be negative, got [B, T, S, K, H] = {list(shape)}")
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), np.int32(0))

    @classmethod
    def like(
        cls, x: Array, slots: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype | str | None = None
    ) -> DepthStream:
        """A stream of empty slots for x's tokens, split over devices as x is.

        Args:
            x: [B, T, ...]. Under a mesh with explicit axes, or with manual ones (`jax.shard_map`), the stream has x's
                sharding of B and T, and varies over the axes that x varies over.
            slots, num_kv_heads, head_dim: S, K, H.
            dtype: None: x's.
        """
        key, value = (empty_slots(x, slots, (num_kv_heads, head_dim), dtype) for _ in ("key", "value"))
        return cls(key, value, np.int32(0))

    def append(self, key: Array, value: Array) -> DepthStream:
        """The stream with one more entry.

        Args:
            key, value: [B, T, K, H], cast to the stream's dtype.

        Raises:
            ValueError: a wrong shape, or the stream is full and its length is concrete. Under a traced length an append
                to a full stream changes no slot; the length then is more than the slots, and says so.
        """
        expected = (*self.key.shape[:2], *self.key.shape[3:])
        for name, entry in (("key", key), ("value", value)):
            if entry.shape != expected:
                raise ValueError(
                    f"DepthStream.append: {name} has shape {entry.shape}, expected [B, T, K, H] = {expected}"
                )
        if not is_traced(self.length) and int(self.length) >= self.slots:
            raise ValueError(f"DepthStream.append: all {self.slots} slots are filled")
        return self.write(Entry((key, value)))


def empty_slots(x: Array, slots: int, entry: tuple[int, ...], dtype: jnp.dtype | str | None = None) -> Array:
    """[B, T, S, *entry] of x's dtype or of `dtype` for the tokens of x [B, T, ...], split over devices as x is.

    It holds anything. On a single GPU that is memory as it was found: clearing it takes as long as reading all slots.
    Where there are more devices it is zeros made of x, because XLA then knows how to split them.
    """
    x = x[(slice(None), slice(None), *(0,) * (x.ndim - 2))]
    shape, dtype = (*x.shape, slots, *entry), jnp.dtype(x.dtype if dtype is None else dtype)
    if jax.device_count() == 1:
        return varying_like(_as_found(shape, dtype), x)
    zeros = jnp.zeros_like(x, dtype)  # of x nothing is left but where it lies
    return jnp.broadcast_to(zeros.reshape(*x.shape, *(1,) * (1 + len(entry))), shape)


def _as_found(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Memory that nobody clears, on a GPU."""
    return jax.lax.empty(shape, dtype)


def is_traced(length: Array | np.int32) -> bool:
    """Whether a stream's length is unknown while Python runs."""
    return isinstance(length, jax.core.Tracer)


def write_slot(buffer: Array, entry: Array, slot: Array | np.int32, *, fits: bool = False) -> Array:
    """`buffer` [B, T, S, ...] with `entry` [B, T, ...] in slot `slot`; unchanged if there is no such slot.

    fits: there is one, whatever a traced number says: then XLA does not read what stood there.
    """
    if buffer.shape[2] == 0:
        return buffer
    entry = entry.astype(buffer.dtype)[:, :, None]  # [B, T, 1, ...]
    if is_traced(slot) and not fits:
        # dynamic_update_slice clamps its index: without this a full stream would lose its last entry.
        entry = jnp.where(slot < buffer.shape[2], entry, jax.lax.dynamic_slice_in_dim(buffer, slot, 1, axis=2))
    return jax.lax.dynamic_update_slice_in_dim(buffer, entry, slot, axis=2)


def read_slot(buffer: Array, slot: Array | np.int32, *, fits: bool = False) -> Array:
    """Slot `slot` of `buffer` [B, T, S, ...] as [B, T, ...]; zeros if there is no such slot. fits: there is one."""
    if buffer.shape[2] == 0:
        return jnp.zeros((*buffer.shape[:2], *buffer.shape[3:]), buffer.dtype)
    entry = jax.lax.dynamic_slice_in_dim(buffer, slot, 1, axis=2)[:, :, 0]
    return jnp.where(slot < buffer.shape[2], entry, 0) if is_traced(slot) and not fits else entry
