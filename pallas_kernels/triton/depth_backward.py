"""Depth attention, backward: gradients of the slots of every token, and of its query.

Equation (one token t, one KV head, its G query heads g, the n slots s of a window [begin, end); lse and delta come
from outside and may be merged over other keys):
    P[s, g] = exp(scale * K[t, s] . q[t, g] - lse[t, g]);  dS = P * (V[t, s] . dout[t, g] - delta[t, g])
    dV[t, s] = sum_g P[s, g] dout[t, g];  dK[t, s] = scale * sum_g dS[s, g] q[t, g];
    dq[t, g] = scale * sum_s dS[s, g] K[t, s]

Grid: one axis, a program for each (token, KV head), the KV head fastest. A program owns all that it writes: no atomics,
    bit-equal from run to run.
Blocks: q, dout and dq [ROWS, H], ROWS the heads padded to at least 16; K, V and their gradients [SLOTS, H].
Loop: chunks of SLOTS slots of the window, which is known when the kernel runs. With more heads than ROWS, parts of
    ROWS heads inside a chunk sum up dK and dV, and a walk before it, chunks inside of parts, makes dq.
Arithmetic: slots on the left side of S^T = K q^T and dP^T = V dout^T, so that P^T and dS^T are left operands of
    dV = P^T dout and dK = dS^T q as they come. No product joins one token's heads and another token's slots.
Gradients come in two ways:
    fresh     arrays of their own, in the inputs' dtype; the slots outside of the window are stored as zeros.
    buffers   of the inputs' dtype or float32: the old gradient is read, the sum stored in place; only the
              window is touched. The sum is taken in float32 and rounded once.
Accumulators: float32; P and dS are rounded to the inputs' dtype. dq is added to `added`, the sequence part's, if given.
Bytes: n*B*T*K*H*2 * (4 fresh, 6 accumulating) + 2*B*T*N*H*3 + 8*B*T*N; fresh also writes S - n slots of zeros.
FLOPs: 10*B*T*N*n*H, before padding. Bound: memory.
Benchmark: python -m benchmarks.attention --implementation=triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton import rows


@triton.jit
def _weights_and_dlogits(key, value, query, dout, lse2, delta, seen, SCALE2: tl.constexpr):
    """(P^T, dS^T), [SLOTS, ROWS] in the inputs' dtype."""
    logits = tl.dot(key, tl.trans(query), out_dtype=tl.float32)
    weights = tl.where(seen[:, None], tl.exp2(logits * SCALE2 - lse2[None, :]), 0.0)
    dweights = tl.dot(value, tl.trans(dout), out_dtype=tl.float32)
    dlogits = weights * (dweights - delta[None, :])
    return weights.to(key.dtype), dlogits.to(key.dtype)


@triton.jit
def _write(old, new, start, places, seen, gradient, H: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr):
    """Stores the gradient of a chunk's slots of the window, added to what stands in `old` where ADDS."""
    if ADDS:
        gradient += rows.load(old + start, places, seen, H, COLUMNS).to(tl.float32)
    rows.store(new + start, places, seen, gradient, H, COLUMNS)


@triton.jit
def _load_heads(
    query, dout, lse, delta, start, part, row,
    GROUP: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A part of the KV head's query heads: (query, dout, lse in base 2, delta)."""
    exists = part * ROWS + row < GROUP
    place = start + part * ROWS
    query_tile = rows.load(query + place * H, row * H, exists, H, COLUMNS)
    dout_tile = rows.load(dout + place * H, row * H, exists, H, COLUMNS)
    lse2, delta_tile = rows.load_statistics(lse, delta, place, row, exists)
    return query_tile, dout_tile, lse2, delta_tile


@triton.jit
def _write_query(
    added, dquery, start, part, row, accumulator, some, SCALE: tl.constexpr, GROUP: tl.constexpr,
    H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """dq of a part; where the window is empty (not `some`) what was there, bit for bit."""
    exists = part * ROWS + row < GROUP
    place = (start + part * ROWS) * H
    result = accumulator * SCALE
    if ADDED:
        before = rows.load(added + place, row * H, exists, H, COLUMNS).to(tl.float32)
        result = tl.where(some, before + result, before)
    rows.store(dquery + place, row * H, exists, result, H, COLUMNS)


@triton.jit
def moda_depth_backward(
    query, depth_key, depth_value, dout, lse, delta, window, added, old_key, old_value,
    dquery, dkey, dvalue,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ALLOCATED: tl.constexpr, H: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, ADDED: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """One token's slots of one KV head; see the head of the file. ALLOCATED: S; ADDS: to the buffers old_*."""
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    N: tl.constexpr = KV_HEADS * GROUP
    STRIDE: tl.constexpr = KV_HEADS * H  # of a slot

    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    token = (program // KV_HEADS).to(tl.int64)
    begin = tl.load(window)
    end = tl.load(window + 1)
    row = tl.arange(0, ROWS)
    inside = tl.arange(0, SLOTS)
    start = token * N + kv_head * GROUP
    depth_start = token * (ALLOCATED * STRIDE) + kv_head * H

    if PARTS == 1:
        query_tile, dout_tile, lse2, delta_tile = _load_heads(
            query, dout, lse, delta, start, 0, row, GROUP, H, COLUMNS, ROWS
        )
        accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(begin, end, SLOTS):
            seen = first + inside < end
            places = (first + inside) * STRIDE
            key = rows.load(depth_key + depth_start, places, seen, H, COLUMNS)
            value = rows.load(depth_value + depth_start, places, seen, H, COLUMNS)
            weights, dlogits = _weights_and_dlogits(
                key, value, query_tile, dout_tile, lse2, delta_tile, seen, SCALE * rows.LOG2E
            )
            accumulator = tl.dot(tl.trans(dlogits), key, accumulator)
            dvalue_tile = tl.dot(weights, dout_tile, out_dtype=tl.float32)
            _write(old_value, dvalue, depth_start, places, seen, dvalue_tile, H, COLUMNS, ADDS)
            dkey_tile = tl.dot(dlogits, query_tile, out_dtype=tl.float32) * SCALE
            _write(old_key, dkey, depth_start, places, seen, dkey_tile, H, COLUMNS, ADDS)
        _write_query(
            added, dquery, start, 0, row, accumulator, end > begin, SCALE, GROUP, H, COLUMNS, ROWS, ADDED
        )  # fmt: skip
    else:
        for part in range(PARTS):
            query_tile, dout_tile, lse2, delta_tile = _load_heads(
                query, dout, lse, delta, start, part, row, GROUP, H, COLUMNS, ROWS
            )
            accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(begin, end, SLOTS):
                seen = first + inside < end
                places = (first + inside) * STRIDE
                key = rows.load(depth_key + depth_start, places, seen, H, COLUMNS)
                value = rows.load(depth_value + depth_start, places, seen, H, COLUMNS)
                weights, dlogits = _weights_and_dlogits(
                    key, value, query_tile, dout_tile, lse2, delta_tile, seen, SCALE * rows.LOG2E
                )
                accumulator = tl.dot(tl.trans(dlogits), key, accumulator)
            _write_query(
                added, dquery, start, part, row, accumulator, end > begin, SCALE, GROUP, H, COLUMNS, ROWS, ADDED
            )  # fmt: skip
        for first in range(begin, end, SLOTS):
            seen = first + inside < end
            places = (first + inside) * STRIDE
            key = rows.load(depth_key + depth_start, places, seen, H, COLUMNS)
            value = rows.load(depth_value + depth_start, places, seen, H, COLUMNS)
            dkey_tile = tl.zeros([SLOTS, COLUMNS], tl.float32)
            dvalue_tile = tl.zeros([SLOTS, COLUMNS], tl.float32)
            for part in range(PARTS):
                query_tile, dout_tile, lse2, delta_tile = _load_heads(
                    query, dout, lse, delta, start, part, row, GROUP, H, COLUMNS, ROWS
                )
                weights, dlogits = _weights_and_dlogits(
                    key, value, query_tile, dout_tile, lse2, delta_tile, seen, SCALE * rows.LOG2E
                )
                dvalue_tile = tl.dot(weights, dout_tile, dvalue_tile)
                dkey_tile = tl.dot(dlogits, query_tile, dkey_tile)
            _write(old_value, dvalue, depth_start, places, seen, dvalue_tile, H, COLUMNS, ADDS)
            _write(old_key, dkey, depth_start, places, seen, dkey_tile * SCALE, H, COLUMNS, ADDS)

    if not ADDS:  # zeros outside of the window
        nothing = tl.zeros([SLOTS, COLUMNS], tl.float32)
        for first in range(0, begin, SLOTS):
            places = (first + inside) * STRIDE
            rows.store(dkey + depth_start, places, first + inside < begin, nothing, H, COLUMNS)
            rows.store(dvalue + depth_start, places, first + inside < begin, nothing, H, COLUMNS)
        for first in range(end, ALLOCATED, SLOTS):
            places = (first + inside) * STRIDE
            rows.store(dkey + depth_start, places, first + inside < ALLOCATED, nothing, H, COLUMNS)
            rows.store(dvalue + depth_start, places, first + inside < ALLOCATED, nothing, H, COLUMNS)
