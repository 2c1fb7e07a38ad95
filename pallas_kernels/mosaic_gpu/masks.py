"""Which keys a query sees, prepared once outside the sequence kernels.

A key is visible when all of these hold (each only if it applies):
    index:     key index < U, and < key_length[b]
    causal:    key_position <= query_position
    segments:  key_segment_id == query_segment_id
With default positions the kernels derive everything from block indices and mask only the diagonal and the last block.
Explicit positions or segment ids travel as int32 rows beside the tiles. From their per-block minima and maxima XLA
computes here, per tile, which blocks it can see at all, [first, last), and a run of them that it sees whole,
[full_first, full_last): the kernels skip what lies outside of the former and mask only what lies outside of the latter.
In a packed row most blocks are of one of these two kinds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

_FAR = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """What is compiled into a kernel. `channels` int32 rows travel per token when `explicit`."""

    causal: bool
    positions: bool  # explicit positions (only if causal)
    segments: bool
    limit: bool  # a key length per batch row

    @property
    def explicit(self) -> bool:
        """Masks come from int32 rows, and block ranges from outside."""
        return self.positions or self.segments

    @property
    def channels(self) -> int:
        """int32 rows per token: positions if explicit, then segment ids."""
        return int(self.positions) + int(self.segments)


@dataclasses.dataclass(frozen=True)
class Masks:
    """Prepared operands of one call. Arrays are None when they do not apply."""

    spec: MaskSpec
    query_rows: jax.Array | None  # int32 [B, channels, T], unpadded
    key_rows: jax.Array | None  # int32 [B, channels, U], unpadded
    limit: jax.Array | None  # int32 [B]


def prepare(
    batch: int,
    query_tokens: int,
    key_tokens: int,
    causal: bool,
    query_positions: jax.Array | None,
    key_positions: jax.Array | None,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    key_length: jax.Array | None,
) -> Masks:
    """Collects the mask operands of one call; positions are dropped when nothing depends on them."""
    if (query_segment_ids is None) != (key_segment_ids is None):
        missing = "query_segment_ids" if query_segment_ids is None else "key_segment_ids"
        raise ValueError(f"{missing}=None: expected both query_segment_ids and key_segment_ids, or neither")
    positions = causal and (query_positions is not None or key_positions is not None)
    spec = MaskSpec(causal, positions, query_segment_ids is not None, key_length is not None)
    query_rows, key_rows = [], []
    if spec.positions:
        default_query = jnp.broadcast_to(jnp.arange(query_tokens, dtype=jnp.int32), (batch, query_tokens))
        default_key = jnp.broadcast_to(jnp.arange(key_tokens, dtype=jnp.int32), (batch, key_tokens))
        query_rows.append(default_query if query_positions is None else query_positions)
        key_rows.append(default_key if key_positions is None else key_positions)
    if spec.segments:
        query_rows.append(query_segment_ids)
        key_rows.append(key_segment_ids)
    stack = lambda parts: jnp.stack([p.astype(jnp.int32) for p in parts], axis=1) if parts else None  # noqa: E731
    limit = None
    if key_length is not None:
        limit = jnp.clip(jnp.broadcast_to(jnp.asarray(key_length, jnp.int32), (batch,)), 0, key_tokens)
    return Masks(spec, stack(query_rows), stack(key_rows), limit)


def pad_rows(x: jax.Array | None, multiple: int) -> jax.Array | None:
    """[B, channels, T] -> T rounded up: TMA wants rows that are a multiple of 16 bytes, and whole blocks."""
    if x is None or x.shape[-1] % multiple == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % multiple)))


def _block_range(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """[B, T] -> per-block (minimum, maximum), [B, blocks]; the ragged end repeats the last value."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % block)), mode="edge").reshape(x.shape[0], -1, block)
    return x.min(-1), x.max(-1)


def _maybe_visible(masks: Masks, batch: int, query_tokens: int, key_tokens: int, query_block: int, key_block: int):
    """bool [B, query blocks, key blocks]: False where no key of the block can be visible to any query of the block."""
    spec = masks.spec
    query_blocks, key_blocks = pl.cdiv(query_tokens, query_block), pl.cdiv(key_tokens, key_block)
    visible = jnp.ones((batch, query_blocks, key_blocks), bool)
    channel = 0
    if spec.causal:
        if spec.positions:
            _, query_last = _block_range(masks.query_rows[:, 0], query_block)
            key_first, _ = _block_range(masks.key_rows[:, 0], key_block)
            channel = 1
        else:
            query_last = (jnp.arange(query_blocks) * query_block + query_block - 1)[None]
            key_first = (jnp.arange(key_blocks) * key_block)[None]
        visible &= key_first[:, None, :] <= query_last[:, :, None]
    if spec.segments:
        query_low, query_high = _block_range(masks.query_rows[:, channel], query_block)
        key_low, key_high = _block_range(masks.key_rows[:, channel], key_block)
        visible &= (key_low[:, None, :] <= query_high[:, :, None]) & (key_high[:, None, :] >= query_low[:, :, None])
    if spec.limit:
        visible &= (jnp.arange(key_blocks) * key_block)[None, None] < masks.limit[:, None, None]
    return visible


def _wholly_visible(masks: Masks, batch: int, query_tokens: int, key_tokens: int, query_block: int, key_block: int):
    """bool [B, query blocks, key blocks]: True where every key of the block is visible to every query of the block.

    The diagonal of default positions is left to the kernels, which know their warpgroup's rows.
    """
    spec = masks.spec
    query_blocks, key_blocks = pl.cdiv(query_tokens, query_block), pl.cdiv(key_tokens, key_block)
    key_ends = (jnp.arange(key_blocks) + 1) * key_block
    full = jnp.broadcast_to(key_ends <= key_tokens, (batch, query_blocks, key_blocks))
    channel = 0
    if spec.positions:
        query_first, _ = _block_range(masks.query_rows[:, 0], query_block)
        _, key_last = _block_range(masks.key_rows[:, 0], key_block)
        full &= key_last[:, None, :] <= query_first[:, :, None]
        channel = 1
    if spec.segments:
        query_low, query_high = _block_range(masks.query_rows[:, channel], query_block)
        key_low, key_high = _block_range(masks.key_rows[:, channel], key_block)
        full &= (query_low == query_high)[:, :, None] & (key_low == key_high)[:, None, :]
        full &= query_low[:, :, None] == key_low[:, None, :]
    if spec.limit:
        full &= key_ends <= masks.limit[:, None, None]
    return full


def block_bounds(
    masks: Masks, batch: int, query_tokens: int, key_tokens: int, query_block: int, key_block: int, per: str
) -> jax.Array | None:
    """int32 [B, blocks, 4]: for each query ("query") or key ("key") block, of the blocks of the other side, the [first,
    last) that it can see anything of, and a run [full_first, full_last) of those that it sees whole.

    None unless masks are explicit. An empty range is (0, 0), an empty run (first, first). Of several runs of wholly
    visible blocks the last one is taken. With default positions the run may hold blocks that the diagonal cuts.
    """
    if not masks.spec.explicit:
        return None
    sizes = batch, query_tokens, key_tokens, query_block, key_block
    visible, full = _maybe_visible(masks, *sizes), _wholly_visible(masks, *sizes)
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
