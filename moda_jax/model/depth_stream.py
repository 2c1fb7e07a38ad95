"""The depth stream: keys and values that the layers so far wrote, a fixed number of slots beside every token.

A slot is one entry of one token. The buffer is allocated once per step; layers fill its slots in order and read the
filled ones (paper section 3). Everything in it is per token: nothing here ever mixes two tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.model.precision import compute_dtype
from moda_jax.parallel.mesh import constrain

Array = jax.Array
Entry = tuple[Array, Array]  # the (key, value) that a layer writes, [B, T, K, H] each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthStream:
    """Depth KV of a batch. Immutable: `append` returns a new stream (which XLA updates in place inside a jitted loop).

    Attributes:
        key: [B, T, S, K, H]; slots at or beyond `length` hold anything and are never read.
        value: [B, T, S, K, H].
        length: int32 scalar, filled slots. Concrete (a NumPy scalar) while the number of appends is known in Python, so
            that an overflow is an error; traced inside a scan.
    """

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

    def constrained(self) -> DepthStream:
        """The same stream, laid out on the current mesh like the tokens and KV heads that it belongs to."""
        axes = ("batch", "tokens", "slots", "kv_heads", "head_dim")
        return DepthStream(constrain(self.key, *axes), constrain(self.value, *axes), self.length)

    @property
    def slots(self) -> int:
        """S, the capacity."""
        return self.key.shape[2]

    def append(self, key: Array, value: Array) -> DepthStream:
        """The stream with one more entry.

        Args:
            key, value: [B, T, K, H], cast to the stream's dtype.

        Raises:
            ValueError: a wrong shape, or the stream is full and its length is concrete. Under a traced length an append
                to a full stream changes nothing.
        """
        expected = (*self.key.shape[:2], *self.key.shape[3:])
        for name, entry in (("key", key), ("value", value)):
            if entry.shape != expected:
                raise ValueError(
                    f"DepthStream.append: {name} has shape {entry.shape}, expected [B, T, K, H] = {expected}"
                )
        if not is_traced(self.length) and int(self.length) >= self.slots:
            raise ValueError(f"DepthStream.append: all {self.slots} slots are filled")
        return DepthStream(
            write_slot(self.key, key, self.length), write_slot(self.value, value, self.length), self.length_after(1)
        )

    def length_after(self, entries: int) -> Array | np.int32:
        """The length once `entries` more have been appended, capped at the capacity."""
        if is_traced(self.length):
            return jnp.minimum(self.length + entries, self.slots).astype(jnp.int32)
        return np.int32(min(int(self.length) + entries, self.slots))


def is_traced(length: Array | np.int32) -> bool:
    """Whether a stream's length is unknown while Python runs."""
    return isinstance(length, jax.core.Tracer)


def write_slot(buffer: Array, entry: Array, slot: Array | np.int32) -> Array:
    """`buffer` [B, T, S, K, H] with `entry` [B, T, K, H] in slot `slot`; unchanged if there is no such slot."""
    if buffer.shape[2] == 0:
        return buffer
    entry = entry.astype(buffer.dtype)[:, :, None]  # [B, T, 1, K, H]
    if is_traced(slot):
        # dynamic_update_slice clamps its index: without this a full stream would lose its last entry.
        entry = jnp.where(slot < buffer.shape[2], entry, jax.lax.dynamic_slice_in_dim(buffer, slot, 1, axis=2))
    return jax.lax.dynamic_update_slice_in_dim(buffer, entry, slot, axis=2)


def read_slot(buffer: Array, slot: Array | np.int32) -> Array:
    """Slot `slot` of `buffer` [B, T, S, K, H] as [B, T, K, H]; zeros if there is no such slot."""
    if buffer.shape[2] == 0:
        return jnp.zeros((*buffer.shape[:2], *buffer.shape[3:]), buffer.dtype)
    entry = jax.lax.dynamic_slice_in_dim(buffer, slot, 1, axis=2)[:, :, 0]
    return jnp.where(slot < buffer.shape[2], entry, 0) if is_traced(slot) else entry
