"""Sequence attention, backward: the gradient of the queries.

Equation, per batch row and query head n (KV head n // G), lse and delta from outside (merged over all blocks):
    P_tu = exp(scale * <query_t, key_u> - lse_t);  dS_tu = P_tu * (<dout_t, value_u> - delta_t)
    dquery_t = scale * sum_u dS_tu key_u

Grid, tiles and the walk over the key blocks: as in sequence_forward.py.
Resident: the tiles of query and dout, the dquery accumulator, lse and delta.
Accumulators: float32; dS is rounded to the inputs' dtype.
FLOPs: 6 T U N H B (half if causal). Bytes: query + dout + dquery + 8 T N B; K and V from L2 for every tile.
Bound: the tensor cores. Nothing is summed over tiles: no atomics, bit-equal from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton import rows, sequence_masks


@triton.jit
def _accumulate(
    accumulator, query, dout, lse2, delta, query_positions, query_segments,
    key_start, value_start, key_marks, batch, keys, limit, begin, end,
    SCALE2: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, KEY_STRIDE: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS K of the key blocks begin..end-1."""
    inside = tl.arange(0, KEYS)
    for block in range(begin, end):
        first = block * KEYS
        start = first.to(tl.int64) * KEY_STRIDE
        index = first + inside
        if MASKED:
            key = rows.load(key_start + start, inside * KEY_STRIDE, index < limit, H, COLUMNS)
            value = rows.load(value_start + start, inside * KEY_STRIDE, index < limit, H, COLUMNS)
        else:
            key = rows.load_whole(key_start + start, inside * KEY_STRIDE, H, COLUMNS)
            value = rows.load_whole(value_start + start, inside * KEY_STRIDE, H, COLUMNS)
        logits = tl.dot(query, tl.trans(key), out_dtype=tl.float32)  # [ROWS, KEYS]
        weights = tl.exp2(logits * SCALE2 - lse2[:, None])
        if MASKED:
            key_positions, key_segments = sequence_masks.load_marks(
                key_marks, batch, keys, index, index < limit, POSITIONS, SEGMENTS
            )
            seen = sequence_masks.visible(
                query_positions[:, None], query_segments[:, None],
                index[None, :], key_positions[None, :], key_segments[None, :], limit, CAUSAL, SEGMENTS,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(value), out_dtype=tl.float32)
        dlogits = weights * (dweights - delta[:, None])
        accumulator = tl.dot(dlogits.to(key.dtype), key, accumulator)
    return accumulator


@triton.jit
def moda_sequence_dq(
    query, key, value, dout, lse, delta, query_marks, key_marks, bounds, limit, tokens, keys,
    dquery,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all key blocks that it sees; see the head of the file."""
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    N: tl.constexpr = KV_HEADS * GROUP
    EXPLICIT: tl.constexpr = POSITIONS or SEGMENTS
    MASKED_END: tl.constexpr = CAUSAL or EXPLICIT or LIMIT or not WHOLE

    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, TOKENS)
    head = program % (KV_HEADS * PARTS)
    block = blocks - 1 - (program // (KV_HEADS * PARTS)) % blocks
    batch = program // (KV_HEADS * PARTS) // blocks
    kv_head, part = head // PARTS, head % PARTS

    row = tl.arange(0, ROWS)
    token = block * TOKENS + row // HEADS
    exists = (row < TOKENS * HEADS) & (part * HEADS + row % HEADS < GROUP) & (token < tokens)
    statistics_start = (batch * tokens + block * TOKENS).to(tl.int64) * N + kv_head * GROUP + part * HEADS
    statistics = row // HEADS * N + row % HEADS
    query_tile = rows.load(query + statistics_start * H, statistics * H, exists, H, COLUMNS)
    dout_tile = rows.load(dout + statistics_start * H, statistics * H, exists, H, COLUMNS)
    lse2, delta_tile = rows.load_statistics(lse, delta, statistics_start, statistics, exists)
    query_positions, query_segments = sequence_masks.load_marks(
        query_marks, batch, tokens, token, token < tokens, POSITIONS, SEGMENTS
    )
    key_start = key + (batch.to(tl.int64) * keys * KV_HEADS + kv_head) * H
    value_start = value + (batch.to(tl.int64) * keys * KV_HEADS + kv_head) * H
    last_key = sequence_masks.key_limit(limit if LIMIT else None, batch, keys)
    first, full_first, full_last, last = sequence_masks.key_walk(
        bounds if EXPLICIT else None, batch * blocks + block, block * TOKENS, block * TOKENS + TOKENS, last_key,
        KEYS, CAUSAL, POSITIONS,
    )  # fmt: skip

    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    if EXPLICIT:
        accumulator = _accumulate(
            accumulator, query_tile, dout_tile, lse2, delta_tile, query_positions, query_segments,
            key_start, value_start, key_marks, batch, keys, last_key, first, full_first,
            SCALE * rows.LOG2E, H, COLUMNS, KV_HEADS * H, KEYS, CAUSAL, POSITIONS, SEGMENTS, True,
        )  # fmt: skip
    accumulator = _accumulate(
        accumulator, query_tile, dout_tile, lse2, delta_tile, query_positions, query_segments,
        key_start, value_start, key_marks, batch, keys, last_key, full_first, full_last,
        SCALE * rows.LOG2E, H, COLUMNS, KV_HEADS * H, KEYS, CAUSAL, POSITIONS, SEGMENTS, False,
    )  # fmt: skip
    if MASKED_END:
        accumulator = _accumulate(
            accumulator, query_tile, dout_tile, lse2, delta_tile, query_positions, query_segments,
            key_start, value_start, key_marks, batch, keys, last_key, full_last, last,
            SCALE * rows.LOG2E, H, COLUMNS, KV_HEADS * H, KEYS, CAUSAL, POSITIONS, SEGMENTS, True,
        )  # fmt: skip
    rows.store(dquery + statistics_start * H, statistics * H, exists, accumulator * SCALE, H, COLUMNS)
