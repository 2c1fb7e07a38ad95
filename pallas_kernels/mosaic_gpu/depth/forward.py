"""Depth attention forward on Hopper: every query reads the slots of its own token.

Equation (one token t, one KV head, its G query heads g, the n seen slots s of the window [start, length)):
    logits[g, s] = scale * q[t, g] . K[t, s];  out[t, g] = softmax_s(logits) @ V[t]
    lse[t, g] = log sum_s exp(logits[g, s])

Grid: (blocks,), persistent: `multiprocessors * tiles.blocks` thread blocks of one warpgroup; block i takes the groups
    i, i + blocks, ... A group is four neighbouring tiles, one for each warp; a tile is a (token, KV head) with up to
    16 of its query heads.
Blocks (TMA boxes): K, V [1 token, rows slots, 1 KV head, 64 columns] of [B*T, S, K, H], one for each tile, operand and
    column block; q [query_rows, 64] of [B*T*N, H], one for each group and column block. The depth arrays are read where
    they lie; columns beyond H and tokens beyond B*T are zero-filled by TMA.
Loop order: groups, then chunks of `rows` slots. Chunks end at slot `length`, so the first one may begin at a negative
    slot: TMA fills those rows with zeros without reading memory (half a chunk is not even filled where it can be left
    out). Hence exactly n slots are read, whatever S is, and no unfilled slot is ever touched. With a start (its own
    variant of the kernel) the first chunk may begin before it: what was loaded of slots that are not seen is zeroed.
Residents: a ring of `stages` chunks (K, V of four tiles, q of the group). `out` goes through the tile's own K rows
    after their last use.
Arithmetic: warp-level mma with the slots on the M side and the heads (padded to 8) on the N side: S^T = K q^T, then
    out^T += V^T P^T. No product is masked away, and no warp waits for another inside a tile. Accumulators, running
    maximum and sum are float32, in registers; P is rounded to the inputs' dtype; exponentials are base 2.
Entries of 8 bits: boxes of 64-byte rows; fragments are made of bytes in registers (`entry_tiles`), about 7 integer
    instructions for 4 entries; `out` goes through memory of its own. K and V are half the bytes. Not timed yet.
Bytes: B*T*(2*n*K + 2*N)*H*2 + 4*B*T*N.
FLOPs: 4*B*T*N*n*H, 2*G for each byte of K and V: memory-bound on an H200 (206 FLOP a byte) for any G in use.
Benchmark: T = 16384, K = 8, H = 64, S = 64, G = 8: 2.42 GB, 0.58 ms at 4.2 TB/s; measured 0.59 ms.

Interpreted on a CPU, these lines differ: the interpreter neither fills out-of-range TMA boxes (the wrapper pads the
arrays, with zeros in front of slot 0) nor runs PTX (`ForwardInterpretedTile` computes a chunk from the same shared
memory with jax.numpy; tests run `ForwardWarpTile` itself in `tests/support/warp_emulator.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import warpgroup
from pallas_kernels.mosaic_gpu.depth import warp_mma as wm
from pallas_kernels.mosaic_gpu.depth.chunk import (
    LN2,
    LOG2E,
    SCALAR,
    Window,
    compiler_params,
    depth_boxes,
    filled_rows,
    flat,
    group_queries,
    group_tiles,
    if_loaded,
    last_rows,
    like,
    load_chunk,
    pad_for_interpreter,
    pad_group,
    registers,
    scalar,
    thread_array,
    thread_values,
    unpad_group,
    window_operand,
    write_heads,
)
from pallas_kernels.mosaic_gpu.depth.entry_tiles import entry_tiles
from pallas_kernels.mosaic_gpu.depth.tiles import (
    COLUMNS,
    SWIZZLE,
    THREADS,
    WARPS,
    DepthShape,
    DepthTiles,
    check_shared_memory,
    forward_scratch,
    forward_tiles,
    most_heads,
    padded_group,
    ring_swizzle,
    tile_heads,
)
from pallas_kernels.operands import Call
from pallas_kernels.parts import Part


class ForwardWarpTile:
    """The arithmetic of a chunk on the chip; one warp, one tile."""

    def __init__(self, shape: DepthShape, tiles: DepthTiles, scale: float, dtype: Any, windowed: bool = False) -> None:
        self.shape, self.tiles, self.scale, self.dtype, self.windowed = shape, tiles, scale, dtype, windowed
        heads = 2 * shape.head_blocks  # of one thread
        self.count = 2 * heads + 4 * shape.steps * shape.head_blocks
        self.layout = registers(self.count)
        self.entries = entry_tiles(shape, tiles.rows, dtype)
        self.tile_bytes = self.entries.tile_bytes
        self.query_bytes = shape.column_blocks * shape.query_rows * wm.ROW_BYTES

    def start(self) -> Any:
        """The state before the first chunk: maximum -inf, sum and accumulators 0."""

        @plgpu.inline_mgpu(return_type=self._type())
        def begin(ctx):
            del ctx
            lowest, zero = wm.real(-float("inf")), wm.real(0.0)
            heads = 2 * self.shape.head_blocks
            return thread_array([lowest] * heads + [zero] * (self.count - heads))

        return begin()

    def _type(self) -> Any:
        return plgpu.ShapeDtypeStruct((self.count * THREADS,), jnp.float32, self.layout)

    def step(self, ring: Any, queries: Any, stage: Any, first: Any, state: Any) -> Any:
        """One chunk; returns the new state."""
        shape, rows, dtype, entries = self.shape, self.tiles.rows, self.dtype, self.entries
        refs = plgpu.RefType((ring_swizzle(shape),)), plgpu.RefType((SWIZZLE,))

        @plgpu.inline_mgpu(arg_types=(*refs, SCALAR, SCALAR, self.layout), return_type=self._type())
        def chunk(ctx, ring, queries, stage, first, state):
            del ctx
            stage, first = scalar(stage), scalar(first)
            lane = wm.Lane()
            keys = wm.add(
                wm.add(wm.shared_address(ring), wm.multiply(stage, 2 * WARPS * self.tile_bytes)),
                wm.multiply(lane.warp, self.tile_bytes),
            )
            values = wm.add(keys, WARPS * self.tile_bytes)
            query = wm.add(wm.shared_address(queries), wm.multiply(stage, self.query_bytes))
            if self.windowed:
                entries.clear_rows(lane, [keys, values], first)
            highest, total, accumulators = self._unflatten(thread_values(state))

            fragments = entries.query_fragments(lane, query)
            logits = []
            for block in range(rows // 16):
                scores = functools.partial(entries.scores, lane, keys, fragments, block)
                nothing = [[wm.real(0.0)] * 4] * shape.head_blocks
                numbers = if_loaded(rows, block, first, lambda scores=scores: flat(scores()), flat(nothing))
                logits.append(like(nothing, iter(numbers)))
            factor = wm.real(self.scale * LOG2E * entries.drop / entries.lift)
            lowest = wm.real(-float("inf"))
            for block in range(rows // 16):
                for half in range(2):
                    hidden = wm.less(wm.add(lane.row, 16 * block + 8 * half), first)
                    for c in logits[block]:
                        for j in (2 * half, 2 * half + 1):
                            c[j] = wm.select(hidden, lowest, wm.arith.mulf(c[j], factor))

            scales = []
            for h in range(2 * shape.head_blocks):
                mine = [logits[block][h // 2][j] for block in range(rows // 16) for j in (h % 2, h % 2 + 2)]
                peak = wm.reduce_rows(functools.reduce(wm.maximum, mine), wm.maximum)
                if entries.lift != 1.0:  # so that the exponentials are lifted
                    peak = wm.arith.subf(peak, wm.real(math.log2(entries.lift)))
                peak = wm.maximum(peak, highest[h])
                scales.append(wm.exp2(wm.arith.subf(highest[h], peak)))
                highest[h] = peak
                subtotal = wm.arith.mulf(total[h], scales[h])
                for block in range(rows // 16):
                    c = logits[block][h // 2]
                    for j in (h % 2, h % 2 + 2):
                        c[j] = wm.exp2(wm.arith.subf(c[j], peak))
                        subtotal = wm.arith.addf(subtotal, c[j])
                total[h] = subtotal
            for step in range(shape.steps):
                for n in range(shape.head_blocks):
                    accumulators[step][n] = [
                        wm.arith.mulf(x, scales[2 * n + j % 2]) for j, x in enumerate(accumulators[step][n])
                    ]

            def weigh(block, accumulators):
                """Adds V^T P^T of 16 rows."""
                probabilities = [
                    [wm.transpose_matrix(wm.pack(c[2 * i], c[2 * i + 1], dtype)) for i in range(2)]
                    for c in logits[block]
                ]
                for step, a in enumerate(entries.transposed(lane, values, block)):
                    for n in range(shape.head_blocks):
                        accumulators[step][n] = wm.mma_k16(accumulators[step][n], a, probabilities[n], dtype)
                return flat(accumulators)

            for block in range(rows // 16):
                before = [list(step) for step in accumulators]
                add = functools.partial(weigh, block, [list(step) for step in accumulators])
                accumulators = like(before, iter(if_loaded(rows, block, first, add, flat(before))))
            return thread_array(self._flatten(highest, total, accumulators))

        return chunk(ring, queries, stage, first, state)

    def finish(
        self, state: Any, staging: Any, stage: Any, group: Any, out_ref: Any, lse_ref: Any, *rest_ref: Any
    ) -> None:
        """Writes what the state has come to; to `rest_ref`, if given, what rounding takes from out.

        By way of `staging`: the ring, whose stage was the last; or memory of its own, where entries have 8 bits.
        """
        shape = self.shape

        @plgpu.inline_mgpu(
            arg_types=(
                self.layout, plgpu.RefType((SWIZZLE,)), SCALAR, SCALAR, (plgpu.RefType(),) * (2 + len(rest_ref))
            )
        )  # fmt: skip
        def write(ctx, state, staging, stage, group, refs):
            del ctx
            out, lse, *rest = refs
            lane = wm.Lane()
            highest, total, accumulators = self._unflatten(thread_values(state))
            tile = wm.add(wm.multiply(scalar(group), WARPS), lane.warp)
            if shape.narrow:
                rows_bytes = shape.column_blocks * 8 * shape.head_blocks * wm.ROW_BYTES
                staging = wm.add(wm.shared_address(staging), wm.multiply(lane.warp, rows_bytes))
                wm.warp_barrier()  # the last group's rows have been read
            else:
                staging = wm.add(
                    wm.add(wm.shared_address(staging), wm.multiply(scalar(stage), 2 * WARPS * self.tile_bytes)),
                    wm.multiply(lane.warp, self.tile_bytes),
                )
            zero, lowest = wm.real(0.0), wm.real(-float("inf"))
            writes = wm.both(wm.less(tile, shape.tiles), wm.less(lane.row, 1))
            lse_address = wm.global_address(lse)
            inverse = []
            for h in range(2 * shape.head_blocks):
                sum_ = wm.reduce_rows(total[h], wm.arith.addf)
                seen = wm.arith.cmpf(wm.arith.CmpFPredicate.OGT, sum_, zero)
                inverse.append(wm.select(seen, wm.reciprocal(sum_), zero))
                if self.entries.drop != 1.0:
                    inverse[h] = wm.arith.mulf(inverse[h], wm.real(self.entries.drop))
                value = wm.arith.mulf(wm.arith.addf(highest[h], wm.log2(sum_)), wm.real(LN2))
                head = wm.add(lane.column, 8 * (h // 2) + h % 2)
                index = wm.add(wm.multiply(tile, shape.tile_heads), head)
                wm.store_global(
                    wm.advance(lse_address, index, 4),
                    wm.select(seen, value, lowest),
                    wm.both(writes, wm.less(head, shape.tile_heads)),
                )
            for step in range(shape.steps):
                for n in range(shape.head_blocks):
                    accumulators[step][n] = [
                        wm.arith.mulf(x, inverse[2 * n + j % 2]) for j, x in enumerate(accumulators[step][n])
                    ]
            write_heads(lane, self.entries, accumulators, staging, wm.global_address(out), tile, None)
            if rest:
                wm.warp_barrier()  # out has been read from the staging rows
                rests = [[self._rest(c) for c in step] for step in accumulators]
                write_heads(lane, self.entries, rests, staging, wm.global_address(rest[0]), tile, None)

        write(state, staging, stage, group, (out_ref, lse_ref, *rest_ref))

    def _rest(self, c: list) -> list:
        """What rounding takes from the numbers of a C fragment."""
        rounded = [wm.unpack(wm.pack(c[i], c[i + 1], self.dtype), self.dtype) for i in (0, 2)]
        return [wm.arith.subf(x, y) for x, y in zip(c, [*rounded[0], *rounded[1]], strict=True)]

    def _flatten(self, highest: list, total: list, accumulators: list) -> list:
        return flat([highest, total, accumulators])

    def _unflatten(self, values: list) -> tuple[list, list, list]:
        heads, blocks = 2 * self.shape.head_blocks, self.shape.head_blocks
        rest = values[2 * heads :]
        accumulators = [
            [list(rest[4 * (step * blocks + n) : 4 * (step * blocks + n) + 4]) for n in range(blocks)]
            for step in range(self.shape.steps)
        ]
        return values[:heads], values[heads : 2 * heads], accumulators


class ForwardInterpretedTile:
    """`ForwardWarpTile` for the interpreter: the same chunk from the same shared memory, in jax.numpy."""

    def __init__(self, shape: DepthShape, tiles: DepthTiles, scale: float, dtype: Any, windowed: bool = False) -> None:
        del windowed  # rows that are not seen are zeroed in any case
        self.shape, self.tiles, self.scale, self.dtype = shape, tiles, scale, dtype

    def start(self) -> Any:
        """The state before the first chunk."""
        heads = (WARPS, self.shape.tile_heads)
        lowest = jnp.full(heads, -jnp.inf, jnp.float32)
        return (
            lowest,
            jnp.zeros(heads, jnp.float32),
            jnp.zeros((*heads, self.shape.column_blocks * COLUMNS), jnp.float32),
        )

    def step(self, ring: Any, queries: Any, stage: Any, first: Any, state: Any) -> Any:
        """One chunk; returns the new state."""
        highest, total, out = state
        query = group_queries(self.shape, queries[stage])  # [4, G, H]
        key, value = (filled_rows(group_tiles(ring[stage, i]), first, self.dtype) for i in range(2))  # [4, rows, H]
        logits = jnp.einsum("wgh,wsh->wgs", query, key, preferred_element_type=jnp.float32) * (self.scale * LOG2E)
        logits = jnp.where(jnp.arange(self.tiles.rows) < first, -jnp.inf, logits)
        peak = jnp.maximum(highest, logits.max(axis=-1))
        alpha = jnp.exp2(highest - peak)
        p = jnp.exp2(logits - peak[..., None])
        add = jnp.einsum("wgs,wsh->wgh", p.astype(self.dtype), value, preferred_element_type=jnp.float32)
        return peak, total * alpha + p.sum(axis=-1), out * alpha[..., None] + add

    def finish(
        self, state: Any, staging: Any, stage: Any, group: Any, out_ref: Any, lse_ref: Any, *rest_ref: Any
    ) -> None:
        """Writes what the state has come to; to `rest_ref`, if given, what rounding takes from out."""
        del staging, stage
        highest, total, out = state
        seen = total > 0
        out = out * jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0)[..., None]
        lse = jnp.where(seen, (highest + jnp.log2(jnp.where(seen, total, 1.0))) * LN2, -jnp.inf)
        heads = self.shape.tile_heads
        for w in range(WARPS):
            tile = group * WARPS + w

            @pl.when(tile < self.shape.tiles)
            def _write(w=w, tile=tile):
                rows = pl.ds(tile * heads, heads)
                mine = out[w, :, : self.shape.head_dim]
                out_ref[rows, :] = mine.astype(self.dtype)
                for ref in rest_ref:
                    rounded = lax.reduce_precision(mine, jnp.finfo(self.dtype).nexp, jnp.finfo(self.dtype).nmant)
                    ref[rows, :] = (mine - rounded).astype(self.dtype)
                lse_ref[rows] = lse[w]


def _body(
    shape: DepthShape, tiles: DepthTiles, blocks: int, compute: Any, slot_offset: int, windowed: bool, outputs: int
):
    rows, stages = tiles.rows, tiles.stages
    group_rows = WARPS * shape.tile_heads

    def depth_forward_kernel(q_ref, k_ref, v_ref, window_ref, *refs):
        out_refs, (ring, queries, *staging, loaded) = refs[:outputs], refs[outputs:]
        block = lax.axis_index("block")
        window = Window(window_ref)
        length = window.length
        chunks = lax.div(window.count + (rows - 1), rows)
        groups = lax.div(shape.groups - block + (blocks - 1), blocks)  # of this block; 0 beyond the last one
        units = groups * chunks
        column = length * 0  # a traced 0: a box may then reach beyond H

        def load(unit):
            turn = lax.div(unit, chunks)
            chunk = unit - turn * chunks
            stage = lax.rem(unit, stages)
            group = block + turn * blocks
            slot = length - (chunks - chunk) * rows + slot_offset
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, barrier=loaded.at[stage], oob_mode=plgpu.OOBFillMode.ZEROS
            )
            for c in range(shape.column_blocks):
                columns = pl.ds(column + c * COLUMNS, COLUMNS)
                copy(q_ref.at[pl.ds(group * group_rows, shape.query_rows), columns], queries.at[stage, c])
            first = window.hidden_rows(slot, slot_offset)

            def load_slots(size):
                for operand, ref in enumerate((k_ref, v_ref)):
                    for warp, c, index in depth_boxes(shape, group, column):
                        target = last_rows(ring.at[stage, operand, warp, c], rows, size)
                        copy(ref.at[index(slot + (rows - size), size)], target)

            load_chunk(load_slots, rows, first, windowed)

        for unit in range(stages):
            pl.when(unit < units)(functools.partial(load, jnp.int32(unit)))

        def group_loop(turn, _):
            def chunk_loop(chunk, state):
                unit = turn * chunks + chunk
                stage = lax.rem(unit, stages)
                plgpu.commit_smem()  # every warp has left the stage that is loaded next
                refill = unit + (stages - 1)
                pl.when(jnp.logical_and(unit > 0, refill < units))(functools.partial(load, refill))
                plgpu.barrier_wait(loaded.at[stage])
                first = lax.max(chunks * rows - window.count - chunk * rows, 0)  # rows before the window
                return compute.step(ring, queries, stage, first, state)

            state = lax.fori_loop(0, chunks, chunk_loop, compute.start())
            last = lax.rem(lax.max((turn + 1) * chunks - 1, 0), stages)
            compute.finish(state, *(staging or [ring]), last, block + turn * blocks, *out_refs)
            return None

        lax.fori_loop(0, groups, group_loop, None)

    return depth_forward_kernel


def depth_forward(
    call: Call,
    *,
    with_rest: bool = False,
    tiles: DepthTiles | None = None,
    blocks: int | None = None,
    interpret: bool | None = None,
) -> Part:
    """softmax(scale * q . K_depth) @ V_depth over the seen slots of each token: the depth part of a call.

    Args:
        call: query [B, T, N, H], bfloat16 or float16, and depth part. Slots from `length` on are never read.
        with_rest: also return what rounding took from out.
        tiles: overrides the tile choice. blocks: overrides the number of thread blocks.
        interpret: run under the Pallas GPU interpreter; None: where there is no GPU.
    """
    query, depth, num_kv_heads = call.query, call.depth, call.depth.key.shape[3]
    batch, length, num_heads, head_dim = query.shape
    if interpret is None:
        interpret = warpgroup.default_interpret()
    if depth.slots == 0:
        return Part.of_nothing(query, with_rest=with_rest)
    group_size, most = num_heads // num_kv_heads, most_heads(head_dim)
    if padded_group(group_size, most) != group_size:
        wider = dataclasses.replace(call, query=pad_group(query, num_kv_heads, most))
        part = depth_forward(wider, with_rest=with_rest, tiles=tiles, blocks=blocks, interpret=interpret)
        return jax.tree.map(lambda x: unpad_group(x, num_kv_heads, group_size), part)
    heads = tile_heads(group_size, most)
    narrow = depth.key.dtype != query.dtype
    shape = DepthShape(batch * length, depth.slots, num_heads, num_kv_heads, head_dim, heads, narrow)
    tiles = tiles or forward_tiles(shape, windowed=depth.start is not None)
    scratch = forward_scratch(shape, tiles, query.dtype)
    check_shared_memory("depth forward", shape, tiles, scratch)
    blocks = blocks or min(shape.groups, 2 if interpret else warpgroup.multiprocessors() * tiles.blocks)
    q = query.reshape(-1, head_dim)
    arrays = [x.reshape(shape.tokens, *x.shape[2:]) for x in (depth.key, depth.value)]
    if interpret:
        [q], arrays = pad_for_interpreter(shape, tiles, [q], arrays)
    tile = ForwardInterpretedTile if interpret else ForwardWarpTile
    compute = tile(shape, tiles, call.scale, query.dtype, depth.start is not None)
    out_type = jax.ShapeDtypeStruct((shape.tokens * num_heads, head_dim), query.dtype)
    kernel = plgpu.kernel(
        _body(shape, tiles, blocks, compute, tiles.rows if interpret else 0, depth.start is not None, 2 + with_rest),
        out_type=(
            out_type,
            jax.ShapeDtypeStruct((shape.tokens * num_heads,), jnp.float32),
            *([out_type] if with_rest else []),
        ),
        scratch_types=tuple(scratch.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name=shape.kernel_name("moda_depth_forward", tiles),
        compiler_params=compiler_params(),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    out, lse, *rest = kernel(q, *arrays, window_operand(depth))
    rest = rest[0].reshape(query.shape) if rest else None
    return Part(out.reshape(query.shape), lse.reshape(batch, length, num_heads), rest)
