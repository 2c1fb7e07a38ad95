"""Which blocks of the other side a tile of the sequence kernels walks over, and which keys of them are visible.

A key is visible when all of these hold (each only if it applies): its index is below the limit (U, or the row's
key_length); causal: key position <= query position; segments: the ids are equal. Without explicit positions a position
is an index. A walk has three stretches: blocks that are masked, blocks that all rows of the tile see whole, blocks that
are masked again. With segments or explicit positions they come from outside (`bounds`), see
`pallas_kernels.block_masks`; else they follow from the indices.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_limit(limit, batch, keys):
    """Keys of this row of the batch that exist and are filled."""
    length = keys
    if limit is not None:
        length = tl.load(limit + batch)
    return length


@triton.jit
def key_walk(
    bounds, tile, first_token, end_token, limit, KEYS: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr
):
    """(first, full_first, full_last, last): key blocks that the queries first_token..end_token-1 walk over."""
    last = tl.cdiv(limit, KEYS)
    full_last = limit // KEYS
    first = 0
    full_first = 0
    if CAUSAL and not POSITIONS:
        last = tl.minimum(last, tl.cdiv(end_token, KEYS))
        full_last = tl.minimum(full_last, (first_token + 1) // KEYS)
    if bounds is not None:
        first = tl.load(bounds + 4 * tile)
        last = tl.minimum(last, tl.load(bounds + 4 * tile + 1))
        full_first = tl.minimum(tl.load(bounds + 4 * tile + 2), last)
        full_last = tl.minimum(full_last, tl.load(bounds + 4 * tile + 3))
    full_last = tl.maximum(full_last, full_first)
    return first, full_first, full_last, tl.maximum(last, full_last)


@triton.jit
def query_walk(
    bounds, tile, first_key, end_key, limit, tokens, TOKENS: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr
):
    """(first, full_first, full_last, last): blocks of TOKENS queries that the keys first_key..end_key-1 walk over."""
    last = tl.cdiv(tokens, TOKENS)
    full_last = tokens // TOKENS
    first = 0
    full_first = 0
    if CAUSAL and not POSITIONS:
        first = tl.minimum(first_key // TOKENS, last)
        full_first = tl.minimum(tl.cdiv(end_key - 1, TOKENS), last)
    if bounds is not None:
        first = tl.maximum(first, tl.load(bounds + 4 * tile))
        last = tl.minimum(last, tl.load(bounds + 4 * tile + 1))
        full_first = tl.maximum(full_first, tl.load(bounds + 4 * tile + 2))
        full_last = tl.minimum(full_last, tl.load(bounds + 4 * tile + 3))
    # A block of keys that reaches beyond the limit is masked for every query, and one that begins there is not walked.
    last = tl.where(first_key < limit, last, first)
    full_last = tl.where(end_key <= limit, full_last, full_first)
    full_first = tl.maximum(tl.minimum(full_first, last), first)
    full_last = tl.maximum(tl.minimum(full_last, last), full_first)
    return first, full_first, full_last, tl.maximum(last, full_last)


@triton.jit
def load_marks(marks, batch, length, index, exists, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr):
    """(positions, segment ids) of tokens from int32 [B, channels, length]; their index where there are none."""
    positions = index
    segments = index
    CHANNELS: tl.constexpr = POSITIONS + SEGMENTS
    if CHANNELS > 0:
        start = marks + batch.to(tl.int64) * CHANNELS * length
        if POSITIONS:
            positions = tl.load(start + index, exists, 0)
        if SEGMENTS:
            segments = tl.load(start + (CHANNELS - 1) * length + index, exists, 0)
    return positions, segments


@triton.jit
def visible(
    query_positions, query_segments, key_index, key_positions, key_segments, limit,
    CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """bool [ROWS, KEYS], from the rows' and keys' marks; either side may be the one that stands in columns."""
    seen = key_index < limit
    if CAUSAL:
        seen = seen & (key_positions <= query_positions)
    if SEGMENTS:
        seen = seen & (key_segments == query_segments)
    return seen
