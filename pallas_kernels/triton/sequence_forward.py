"""Sequence attention, forward.

Equation, per batch row, query head n (KV head n // G), query t:
    s_u = scale * <query_t, key_u>, u visible (sequence_masks.py)
    lse = log sum_u exp(s_u);  out = sum_u exp(s_u - lse) value_u
and, if another block of the same softmax is given (the depth part's out, lse and rest):
    lse' = log(exp(lse) + exp(other_lse));  out' = exp(lse - lse') out + exp(other_lse - lse') other_out.
A query that sees nothing: out 0, lse -inf. `rest` is what rounding took from out.

Grid: one axis; (KV head, part of its query heads) fastest, so that what runs side by side shares K and V in L2; then
    the query blocks, in descending order, so that the longest causal rows start first; then the batch.
Blocks: a tile is TOKENS tokens x HEADS query heads of one KV head, in ROWS rows of query and out [ROWS, H]; key and
    value [KEYS, H]. HEADS is 1 where there are many tokens, and all of G where there are few, as in decoding.
Loop: key blocks in ascending order; blocks that all rows see whole are not masked.
Resident: the query tile, the out accumulator, the running maximum and sum.
Accumulators: float32 (logits, out, maximum, sum), exponentials in base 2; P is rounded to the inputs' dtype.
FLOPs: 4 T U N H B (half if causal). Bytes: query + key + value + out + 4 T N B; K and V again from L2 for every tile.
Bound: the tensor cores; at H = 64 the exponentials as much (16 a clock and multiprocessor).
Benchmark: python -m benchmarks.attention --implementation=triton, rows with S=0, column "forward".
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton import rows, sequence_masks


@triton.jit
def _attend(
    accumulator, total, highest, query, query_positions, query_segments,
    key_start, value_start, key_marks, batch, keys, limit, begin, end,
    SCALE2: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, KEY_STRIDE: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the key blocks begin..end-1."""
    inside = tl.arange(0, KEYS)
    for block in range(begin, end):
        first = block * KEYS
        start = first.to(tl.int64) * KEY_STRIDE
        index = first + inside
        if MASKED:
            key = rows.load(key_start + start, inside * KEY_STRIDE, index < limit, H, COLUMNS)
        else:
            key = rows.load_whole(key_start + start, inside * KEY_STRIDE, H, COLUMNS)
        logits = tl.dot(query, tl.trans(key), out_dtype=tl.float32)  # [ROWS, KEYS]
        if MASKED:
            key_positions, key_segments = sequence_masks.load_marks(
                key_marks, batch, keys, index, index < limit, POSITIONS, SEGMENTS
            )
            seen = sequence_masks.visible(
                query_positions[:, None], query_segments[:, None],
                index[None, :], key_positions[None, :], key_segments[None, :], limit, CAUSAL, SEGMENTS,
            )  # fmt: skip
            logits = tl.where(seen, logits * SCALE2, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(logits, 1))
            # A row that saw no key yet: exp2(-inf - 0) = 0, where exp2(-inf + inf) would be NaN.
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(logits - shift[:, None])
        else:
            new_highest = tl.maximum(highest, tl.max(logits, 1) * SCALE2)
            shift = new_highest
            weights = tl.exp2(logits * SCALE2 - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, 1)
        accumulator = accumulator * rescale[:, None]
        if MASKED:
            value = rows.load(value_start + start, inside * KEY_STRIDE, index < limit, H, COLUMNS)
        else:
            value = rows.load_whole(value_start + start, inside * KEY_STRIDE, H, COLUMNS)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator)
        highest = new_highest
    return accumulator, total, highest


@triton.jit
def moda_sequence_forward(
    query, key, value, other_out, other_lse, other_rest, query_marks, key_marks, bounds, limit, tokens, keys,
    out, lse, rest,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr, LIMIT: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One tile of queries over all key blocks that it sees; see the head of the file.

    WHOLE: T is a multiple of TOKENS, and U of KEYS.
    """
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    N: tl.constexpr = KV_HEADS * GROUP
    EXPLICIT: tl.constexpr = POSITIONS or SEGMENTS
    SCALE2: tl.constexpr = (SCALE if SCALE >= 0 else -SCALE) * rows.LOG2E
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
    tile = rows.load(query + statistics_start * H, statistics * H, exists, H, COLUMNS)
    if SCALE < 0:
        tile = (-tile.to(tl.float32)).to(tile.dtype)
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
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    if EXPLICIT:
        accumulator, total, highest = _attend(
            accumulator, total, highest, tile, query_positions, query_segments,
            key_start, value_start, key_marks, batch, keys, last_key, first, full_first,
            SCALE2, H, COLUMNS, KV_HEADS * H, KEYS, CAUSAL, POSITIONS, SEGMENTS, True,
        )  # fmt: skip
    accumulator, total, highest = _attend(
        accumulator, total, highest, tile, query_positions, query_segments,
        key_start, value_start, key_marks, batch, keys, last_key, full_first, full_last,
        SCALE2, H, COLUMNS, KV_HEADS * H, KEYS, CAUSAL, POSITIONS, SEGMENTS, False,
    )  # fmt: skip
    if MASKED_END:
        accumulator, total, highest = _attend(
            accumulator, total, highest, tile, query_positions, query_segments,
            key_start, value_start, key_marks, batch, keys, last_key, full_last, last,
            SCALE2, H, COLUMNS, KV_HEADS * H, KEYS, CAUSAL, POSITIONS, SEGMENTS, True,
        )  # fmt: skip

    seen = highest != float("-inf")
    own_lse = tl.where(seen, highest * rows.LN2 + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
    weight = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    if MERGE:
        depth_lse = tl.load(other_lse + statistics_start + statistics, exists, float("-inf"))
        top = tl.maximum(own_lse, depth_lse)
        some = top != float("-inf")
        top = tl.where(some, top, 0.0)
        mine = tl.exp2((own_lse - top) * rows.LOG2E)
        others = tl.exp2((depth_lse - top) * rows.LOG2E)
        both = tl.where(some, mine + others, 1.0)
        own_lse = tl.where(some, top + tl.log(both), float("-inf"))
        other = rows.load(other_out + statistics_start * H, statistics * H, exists, H, COLUMNS).to(tl.float32)
        if rest is not None:
            other += rows.load(other_rest + statistics_start * H, statistics * H, exists, H, COLUMNS).to(tl.float32)
        accumulator = accumulator * (weight * mine / both)[:, None] + other * (others / both)[:, None]
    else:  # the sum keeps a compiler from fusing product and rest: the bits are those of a merge with nothing
        accumulator = accumulator * weight[:, None] + 0.0
    rows.store_rounded(out, rest, statistics_start * H, statistics * H, exists, accumulator, H, COLUMNS)
    tl.store(lse + statistics_start + statistics, own_lse, exists)
