"""Sequence attention, backward: the gradients of keys and values.

Equation, per batch row and KV head (g over its G query heads), lse and delta from outside (merged over all blocks):
    P_tu = exp(scale * <query_t, key_u> - lse_t);  dS_tu = P_tu * (<dout_t, value_u> - delta_t)
    dvalue_u = sum_{g,t} P_tu dout_t;  dkey_u = scale * sum_{g,t} dS_tu query_t

Grid: one axis; KV head fastest, then the key blocks in ascending order (the longest causal ones first), then the batch.
Blocks: a tile is KEYS keys of one KV head [KEYS, H]; the walk's blocks are TOKENS tokens x HEADS query heads in ROWS
    rows [ROWS, H]. HEADS is 1 where there are many tokens, and all of G where there are few.
Loop: query blocks of one part of the KV head's query heads after the other; blocks that see all keys of the tile are
    not masked. Everything is transposed, [KEYS, ROWS], so that P and dS are left operands as they come.
Resident: the tiles of key and value, the accumulators of dkey and dvalue.
Accumulators: float32; P and dS are rounded to the inputs' dtype.
FLOPs: 8 T U N H B (half if causal). Bytes: key + value + dkey + dvalue; query and dout from L2 for every tile.
Bound: the tensor cores. A KV head's query heads are summed by the program that owns the keys: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton import rows, sequence_masks


@triton.jit
def _accumulate(
    dkey, dvalue, key, value, key_index, key_positions, key_segments,
    query, dout, lse, delta, query_marks, statistics_start, batch, tokens, limit, begin, end,
    SCALE2: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the query blocks begin..end-1 contribute, of all parts of the KV head's query heads: one loop, as
    loops in one another hold more in registers and drain their pipeline each time."""
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row = tl.arange(0, ROWS)
    statistics = row // HEADS * N + row % HEADS
    blocks = tl.maximum(end - begin, 1)
    for step in range(0, PARTS * (end - begin)):
        part = step // blocks
        first = (begin + step % blocks) * TOKENS
        start = statistics_start + first.to(tl.int64) * N + part * HEADS
        token = first + row // HEADS
        if MASKED or HEADS > 1:
            exists = (row < TOKENS * HEADS) & (part * HEADS + row % HEADS < GROUP) & (token < tokens)
            query_tile = rows.load(query + start * H, statistics * H, exists, H, COLUMNS)
            dout_tile = rows.load(dout + start * H, statistics * H, exists, H, COLUMNS)
        else:
            exists = row < ROWS
            query_tile = rows.load_whole(query + start * H, statistics * H, H, COLUMNS)
            dout_tile = rows.load_whole(dout + start * H, statistics * H, H, COLUMNS)
        lse2, delta_tile = rows.load_statistics(lse, delta, start, statistics, exists)
        logits = tl.dot(key, tl.trans(query_tile), out_dtype=tl.float32)  # [KEYS, ROWS]
        weights = tl.exp2(logits * SCALE2 - lse2[None, :])
        if MASKED:
            query_positions, query_segments = sequence_masks.load_marks(
                query_marks, batch, tokens, token, token < tokens, POSITIONS, SEGMENTS
            )
            seen = sequence_masks.visible(
                query_positions[None, :], query_segments[None, :],
                key_index[:, None], key_positions[:, None], key_segments[:, None], limit, CAUSAL, SEGMENTS,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        dvalue = tl.dot(weights.to(dout_tile.dtype), dout_tile, dvalue)
        dweights = tl.dot(value, tl.trans(dout_tile), out_dtype=tl.float32)
        dlogits = weights * (dweights - delta_tile[None, :])
        dkey = tl.dot(dlogits.to(query_tile.dtype), query_tile, dkey)
    return dkey, dvalue


@triton.jit
def moda_sequence_dkv(
    query, key, value, dout, lse, delta, query_marks, key_marks, bounds, limit, tokens, keys,
    dkey, dvalue,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One tile of keys over all query blocks that see it; see the head of the file."""
    N: tl.constexpr = KV_HEADS * GROUP
    EXPLICIT: tl.constexpr = POSITIONS or SEGMENTS
    MASKED_START: tl.constexpr = CAUSAL or EXPLICIT
    MASKED_END: tl.constexpr = EXPLICIT or LIMIT or not WHOLE

    program = tl.program_id(0)
    blocks = tl.cdiv(keys, KEYS)
    kv_head = program % KV_HEADS
    block = (program // KV_HEADS) % blocks
    batch = program // KV_HEADS // blocks
    inside = tl.arange(0, KEYS)
    index = block * KEYS + inside
    last_key = sequence_masks.key_limit(limit if LIMIT else None, batch, keys)
    start = (batch.to(tl.int64) * keys + block * KEYS) * (KV_HEADS * H) + kv_head * H
    key_tile = rows.load(key + start, inside * (KV_HEADS * H), index < last_key, H, COLUMNS)
    value_tile = rows.load(value + start, inside * (KV_HEADS * H), index < last_key, H, COLUMNS)
    key_positions, key_segments = sequence_masks.load_marks(
        key_marks, batch, keys, index, index < keys, POSITIONS, SEGMENTS
    )
    first, full_first, full_last, last = sequence_masks.query_walk(
        bounds if EXPLICIT else None, batch * blocks + block, block * KEYS, block * KEYS + KEYS, last_key, tokens,
        TOKENS, CAUSAL, POSITIONS,
    )  # fmt: skip

    dkey_tile = tl.zeros([KEYS, COLUMNS], tl.float32)
    dvalue_tile = tl.zeros([KEYS, COLUMNS], tl.float32)
    statistics_start = (batch * tokens).to(tl.int64) * N + kv_head * GROUP
    if MASKED_START:
        dkey_tile, dvalue_tile = _accumulate(
            dkey_tile, dvalue_tile, key_tile, value_tile, index, key_positions, key_segments,
            query, dout, lse, delta, query_marks, statistics_start, batch, tokens, last_key, first, full_first,
            SCALE * rows.LOG2E, H, COLUMNS, N, GROUP, ROWS, TOKENS, HEADS, CAUSAL, POSITIONS, SEGMENTS, True,
        )  # fmt: skip
    dkey_tile, dvalue_tile = _accumulate(
        dkey_tile, dvalue_tile, key_tile, value_tile, index, key_positions, key_segments,
        query, dout, lse, delta, query_marks, statistics_start, batch, tokens, last_key, full_first, full_last,
        SCALE * rows.LOG2E, H, COLUMNS, N, GROUP, ROWS, TOKENS, HEADS, CAUSAL, POSITIONS, SEGMENTS, False,
    )  # fmt: skip
    if MASKED_END:
        dkey_tile, dvalue_tile = _accumulate(
            dkey_tile, dvalue_tile, key_tile, value_tile, index, key_positions, key_segments,
            query, dout, lse, delta, query_marks, statistics_start, batch, tokens, last_key, full_last, last,
            SCALE * rows.LOG2E, H, COLUMNS, N, GROUP, ROWS, TOKENS, HEADS, CAUSAL, POSITIONS, SEGMENTS, True,
        )  # fmt: skip
    rows.store(dkey + start, inside * (KV_HEADS * H), index < keys, dkey_tile * SCALE, H, COLUMNS)
    rows.store(dvalue + start, inside * (KV_HEADS * H), index < keys, dvalue_tile, H, COLUMNS)
