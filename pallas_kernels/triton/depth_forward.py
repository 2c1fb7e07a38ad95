"""Depth attention, forward: every query reads the slots of its own token.

Equation (one token t, one KV head, its G query heads g, the n slots s of a window [begin, end)):
    logits[g, s] = scale * q[t, g] . K[t, s];  out[t, g] = softmax_s(logits) @ V[t]
    lse[t, g] = log sum_s exp(logits[g, s])
An empty window: out 0, lse -inf. `rest` is what rounding took from out.

Grid: one axis, a program for each (token, KV head, part of its query heads), the part fastest, then the KV head: what
    runs side by side reads neighbouring memory.
Blocks: q and out [ROWS, H], ROWS the part's heads padded to at least 16; K and V [SLOTS, H], where they lie.
Loop: chunks of SLOTS slots of the window, which is known when the kernel runs; other slots are never read.
Arithmetic: the heads of one token on one side of the product and its slots on the other, so that no product of one
    token's heads with another token's slots is ever formed; what is wasted is the padding of G to ROWS. One warp for
    16 rows: no warp waits for another inside a program, and many programs share a multiprocessor.
Accumulators: float32 (logits, out, maximum, sum), exponentials in base 2; P is rounded to the inputs' dtype.
Bytes: B*T*(2*n*K + 2*N)*H*2 + 4*B*T*N. FLOPs: 4*B*T*N*n*H, before padding.
Bound: memory. T = 16384, K = 8, H = 64, S = 64, G = 8 moves 2.42 GB.
Benchmark: python -m benchmarks.attention --implementation=triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton import rows


@triton.jit
def moda_depth_forward(
    query, depth_key, depth_value, window,
    out, lse, rest,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ALLOCATED: tl.constexpr, H: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One token's heads of one KV head over the slots of the window; see the head of the file. ALLOCATED: S."""
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    N: tl.constexpr = KV_HEADS * GROUP
    STRIDE: tl.constexpr = KV_HEADS * H  # of a slot
    SCALE2: tl.constexpr = (SCALE if SCALE >= 0 else -SCALE) * rows.LOG2E

    program = tl.program_id(0)
    part = program % PARTS
    kv_head = program // PARTS % KV_HEADS
    token = (program // (PARTS * KV_HEADS)).to(tl.int64)
    begin = tl.load(window)
    end = tl.load(window + 1)

    row = tl.arange(0, ROWS)
    exists = part * ROWS + row < GROUP
    start = token * N + kv_head * GROUP + part * ROWS
    tile = rows.load(query + start * H, row * H, exists, H, COLUMNS)
    if SCALE < 0:
        tile = (-tile.to(tl.float32)).to(tile.dtype)
    depth_start = token * (ALLOCATED * STRIDE) + kv_head * H

    inside = tl.arange(0, SLOTS)
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(begin, end, SLOTS):
        seen = first + inside < end
        places = (first + inside) * STRIDE
        key = rows.load(depth_key + depth_start, places, seen, H, COLUMNS)
        value = rows.load(depth_value + depth_start, places, seen, H, COLUMNS)
        logits = tl.dot(tile, tl.trans(key), out_dtype=tl.float32)  # [ROWS, SLOTS]
        logits = tl.where(seen[None, :], logits * SCALE2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))  # a chunk has a slot of the window
        weights = tl.exp2(logits - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator * rescale[:, None])
        highest = new_highest

    some = exists & (end > begin)
    divisor = tl.where(some, total, 1.0)
    accumulator = accumulator / divisor[:, None]
    rows.store_rounded(out, rest, start * H, row * H, exists, accumulator, H, COLUMNS)
    tl.store(lse + start + row, tl.where(some, highest * rows.LN2 + tl.log(divisor), float("-inf")), exists)
