"""A cache of one layer's sequence keys and values, for decoding with `MoDAAttention` in a model of one's own.

The depth stream needs no cache: a token's entries are read by that token alone, so every call starts an empty stream.
`moda_jax.inference.decode` has its own cache, of all layers together, laid out for the model of this package.

Axes: B rows, C places of the cache, T tokens of a call, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moda_jax.numerics.precision import compute_dtype

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Sequence KV of one layer. Immutable; rows may be filled to different lengths.

    Attributes:
        key: [B, C, K, H], as the softmax has it: normalised and rotated. Places at or beyond `length` hold anything.
        value: [B, C, K, H].
        length: [B] int32, filled places of each row. Beyond C where a traced append found no room: those tokens are
            lost, and nothing was overwritten.
    """

    key: Array
    value: Array
    length: Array

    @classmethod
    def empty(
        cls, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype | str | None = None
    ) -> AttentionCache:
        """`capacity` empty places for each of `batch` rows; dtype None: the layers' default.

        Raises:
            ValueError: a size that is not positive.
        """
        shape = (batch, capacity, num_kv_heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"AttentionCache.empty: expected positive sizes, got [B, C, K, H] = {list(shape)}")
        zeros = jnp.zeros(shape, compute_dtype(dtype))
        return cls(zeros, zeros, jnp.zeros((batch,), jnp.int32))

    @property
    def capacity(self) -> int:
        """C, places of a row."""
        return self.key.shape[1]

    def places(self, tokens: int) -> Array:
        """Where the next `tokens` tokens of each row go: [B, T] int32."""
        return self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)

    def append(self, key: Array, value: Array) -> AttentionCache:
        """The cache with T more tokens in each row.

        Args:
            key, value: [B, T, K, H], cast to the cache's dtype.

        Raises:
            ValueError: a wrong shape, or no room for them (when `length` is concrete).
        """
        batch, _, *heads = self.key.shape
        for name, array in (("key", key), ("value", value)):
            if array.ndim != 4 or [array.shape[0], *array.shape[2:]] != [batch, *heads]:
                raise ValueError(
                    f"AttentionCache.append: {name} has shape {array.shape}, expected [B, T, K, H] with "
                    f"B, K, H = {batch}, {heads[0]}, {heads[1]}"
                )
        tokens = key.shape[1]
        filled = 0 if isinstance(self.length, jax.core.Tracer) else int(jnp.max(self.length))
        if filled + tokens > self.capacity:
            raise ValueError(
                f"AttentionCache.append: {tokens} more tokens behind {filled} do not fit into {self.capacity} places"
            )
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None], self.places(tokens)
        return AttentionCache(
            self.key.at[rows].set(key.astype(self.key.dtype), mode="drop"),
            self.value.at[rows].set(value.astype(self.value.dtype), mode="drop"),
            self.length + tokens,
        )

    def truncated(self, length: Array) -> AttentionCache:
        """The cache with only the first `length` [B] tokens of each row, as behind a batch of padded prompts."""
        return dataclasses.replace(self, length=jnp.minimum(self.length, length).astype(jnp.int32))
