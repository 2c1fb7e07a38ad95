"""A mask as blockwise kernels want it: int32 rows beside the tiles, and per block the range of blocks that it sees.

A key is visible when all of these hold (each only if it applies):
    index:     key index < U, and < key_length[b]
    causal:    key_position <= query_position
    segments:  key_segment_id == query_segment_id
With default positions a kernel derives everything from block indices and masks only the diagonal and the last block.
Explicit positions or segment ids travel as int32 rows beside the tiles. From their per-block minima and maxima XLA
computes here, per tile, which blocks it can see at all, [first, last), and a run of them that it sees whole,
[full_first, full_last): a kernel skips what lies outside of the former and masks only what lies outside of the latter.
In a packed row most blocks are of one of these two kinds.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from pallas_kernels.operands import Mask

_FAR = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """What of a mask is compiled into a kernel. `channels` int32 rows travel per token when `explicit`."""

    causal: bool
    positions: bool  # explicit positions (only if causal)
    segments: bool
    limit: bool  # a key length per batch row

    @classmethod
    def of(cls, mask: Mask) -> MaskSpec:
        """Positions are dropped when nothing depends on them.

        Raises:
            ValueError: segment ids of one side alone.
        """
        if (mask.query_segment_ids is None) != (mask.key_segment_ids is None):
            missing = "query_segment_ids" if mask.query_segment_ids is None else "key_segment_ids"
            raise ValueError(f"{missing}=None: expected both query_segment_ids and key_segment_ids, or neither")
        positions = mask.causal and not (mask.query_positions is None and mask.key_positions is None)
        return cls(mask.causal, positions, mask.query_segment_ids is not None, mask.key_length is not None)

    @property
    def explicit(self) -> bool:
        """Masks come from int32 rows, and block ranges from outside."""
        return self.positions or self.segments

    @property
    def channels(self) -> int:
        """int32 rows per token: positions if explicit, then segment ids."""
        return int(self.positions) + int(self.segments)


@dataclasses.dataclass(frozen=True)
class MaskRows:
    """A mask's operands of one call. Arrays are None when they do not apply.

    Attributes:
        spec: what is compiled into the kernel.
        query_rows, key_rows: int32 [B, channels, T] and [B, channels, U], unpadded.
        limit: int32 [B], the key length.
        batch, query_tokens, key_tokens: B, T, U.
    """

    spec: MaskSpec
    query_rows: Array | None
    key_rows: Array | None
    limit: Array | None
    batch: int
    query_tokens: int
    key_tokens: int

    @classmethod
    def of(cls, mask: Mask, batch: int, query_tokens: int, key_tokens: int) -> MaskRows:
        """The rows of a mask over [B, T] queries and [B, U] keys."""
        spec = MaskSpec.of(mask)
        query_rows, key_rows = [], []
        if spec.positions:
            default_query = jnp.broadcast_to(jnp.arange(query_tokens, dtype=jnp.int32), (batch, query_tokens))
            default_key = jnp.broadcast_to(jnp.arange(key_tokens, dtype=jnp.int32), (batch, key_tokens))
            query_rows.append(default_query if mask.query_positions is None else mask.query_positions)
            key_rows.append(default_key if mask.key_positions is None else mask.key_positions)
        if spec.segments:
            query_rows.append(mask.query_segment_ids)
            key_rows.append(mask.key_segment_ids)
        limit = None
        if mask.key_length is not None:
            limit = jnp.clip(jnp.broadcast_to(jnp.asarray(mask.key_length, jnp.int32), (batch,)), 0, key_tokens)
        return cls(spec, _stacked(query_rows), _stacked(key_rows), limit, batch, query_tokens, key_tokens)

    def block_bounds(self, query_block: int, key_block: int, per: str) -> Array | None:
        """int32 [B, blocks, 4]: for each query ("query") or key ("key") block, of the blocks of the other side, the
        [first, last) that it can see anything of, and a run [full_first, full_last) of those that it sees whole.

        None unless masks are explicit. An empty range is (0, 0), an empty run (first, first). Of several runs of wholly
        visible blocks the last one is taken. With default positions the run may hold blocks that the diagonal cuts.
        """
        if not self.spec.explicit:
            return None
        visible = self._maybe_visible(query_block, key_block)
        full = self._wholly_visible(query_block, key_block)
        full &= visible
        if per == "key":
            visible, full = visible.swapaxes(1, 2), full.swapaxes(1, 2)
        index = jnp.arange(visible.shape[-1], dtype=jnp.int32)
        last = jnp.max(jnp.where(visible, index + 1, 0), axis=-1)
        first = jnp.minimum(jnp.min(jnp.where(visible, index, _FAR), axis=-1), last)
        full_last = jnp.max(jnp.where(full, index + 1, 0), axis=-1)
        interruption = jnp.where(full | (index >= full_last[..., None]), -1, index)
        full_first = jnp.max(interruption, axis=-1) + 1
        some = full_last > 0
        full_first, full_last = jnp.where(some, full_first, first), jnp.where(some, full_last, first)
        return jnp.stack([first, last, full_first, full_last], axis=-1).astype(jnp.int32)

    def _maybe_visible(self, query_block: int, key_block: int) -> Array:
        """bool [B, query blocks, key blocks]: False where no key of the block can be visible to any query of the
        block."""
        spec = self.spec
        query_blocks, key_blocks = self._blocks(query_block, key_block)
        visible = jnp.ones((self.batch, query_blocks, key_blocks), bool)
        channel = 0
        if spec.causal:
            if spec.positions:
                _, query_last = _block_range(self.query_rows[:, 0], query_block)
                key_first, _ = _block_range(self.key_rows[:, 0], key_block)
                channel = 1
            else:
                query_last = (jnp.arange(query_blocks) * query_block + query_block - 1)[None]
                key_first = (jnp.arange(key_blocks) * key_block)[None]
            visible &= key_first[:, None, :] <= query_last[:, :, None]
        if spec.segments:
            query_low, query_high = _block_range(self.query_rows[:, channel], query_block)
            key_low, key_high = _block_range(self.key_rows[:, channel], key_block)
            visible &= (key_low[:, None, :] <= query_high[:, :, None]) & (key_high[:, None, :] >= query_low[:, :, None])
        if spec.limit:
            visible &= (jnp.arange(key_blocks) * key_block)[None, None] < self.limit[:, None, None]
        return visible

    def _wholly_visible(self, query_block: int, key_block: int) -> Array:
        """bool [B, query blocks, key blocks]: True where every key of the block is visible to every query of the block.

        The diagonal of default positions is left to the kernels, which know their own rows.
        """
        spec = self.spec
        query_blocks, key_blocks = self._blocks(query_block, key_block)
        key_ends = (jnp.arange(key_blocks) + 1) * key_block
        full = jnp.broadcast_to(key_ends <= self.key_tokens, (self.batch, query_blocks, key_blocks))
        channel = 0
        if spec.positions:
            query_first, _ = _block_range(self.query_rows[:, 0], query_block)
            _, key_last = _block_range(self.key_rows[:, 0], key_block)
            full &= key_last[:, None, :] <= query_first[:, :, None]
            channel = 1
        if spec.segments:
            query_low, query_high = _block_range(self.query_rows[:, channel], query_block)
            key_low, key_high = _block_range(self.key_rows[:, channel], key_block)
            full &= (query_low == query_high)[:, :, None] & (key_low == key_high)[:, None, :]
            full &= query_low[:, :, None] == key_low[:, None, :]
        if spec.limit:
            full &= key_ends <= self.limit[:, None, None]
        return full

    def _blocks(self, query_block: int, key_block: int) -> tuple[int, int]:
        return -(-self.query_tokens // query_block), -(-self.key_tokens // key_block)


def pad_rows(x: Array | None, multiple: int) -> Array | None:
    """[B, channels, T] -> T rounded up to whole blocks."""
    if x is None or x.shape[-1] % multiple == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % multiple)))


def _stacked(rows: list[Array]) -> Array | None:
    """[B, T] each to [B, channels, T]."""
    return jnp.stack([row.astype(jnp.int32) for row in rows], axis=1) if rows else None


def _block_range(x: Array, block: int) -> tuple[Array, Array]:
    """[B, T] -> per-block (minimum, maximum), [B, blocks]; the ragged end repeats the last value."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % block)), mode="edge").reshape(x.shape[0], -1, block)
    return x.min(-1), x.max(-1)
