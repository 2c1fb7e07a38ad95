"""Depth attention backward on Hopper: gradients of the slots of every token, and of its query.

Equation (one token t, one KV head, its G query heads g, n = depth_length filled slots s; lse and delta come from
outside and may be merged over other keys):
    P[s, g] = exp(scale * K[t, s] . q[t, g] - lse[t, g]);  dS = P * (V[t, s] . dout[t, g] - delta[t, g])
    dV[t, s] = sum_g P[s, g] dout[t, g];  dK[t, s] = scale * sum_g dS[s, g] q[t, g];
    dq[t, g] = scale * sum_s dS[s, g] K[t, s]

Grid, tiles, groups and chunks: as in `forward.py`; up to 16 query heads a tile, larger groups in several passes that
    accumulate.
Blocks (TMA boxes): as in `forward.py`, and dout like q, lse and delta [32 or 64]; the gradients' boxes are K's and
    V's.
Loop order: groups, then chunks. Nothing is summed over tokens, so no block waits for another: deterministic.
Residents: a ring of `stages` chunks (K, V, q, dout, lse, delta). Every 16 rows of dV (dK) overwrite the rows of V (K)
    from which they came, and the chunk is stored by TMA from where it was loaded. A first chunk that begins before
    slot 0 or the window is stored by the threads, row by row, unless its slots fill a smaller box: TMA cannot store at
    negative slots.
Gradients come in three ways:
    fresh            arrays of their own; slots that are not seen are stored as zeros from one shared-memory tile.
    16-bit buffers   the old gradient is loaded beside K and V, the sum is stored in place; only n slots are touched.
    float32 buffers  read, added and written by the threads, 16 bytes each; only n slots are touched.
    deferred         of buffers of either kind, the last slots alone, from a number on: as float32 buffers. For a layer
                     of several whose gradients of older slots are then added together: one more pass over K, V and the
                     buffers, whose queries are those of all of these layers, side by side as heads of the same KV
                     heads. That pass gives no dq.
Entries of 8 bits (`entry_tiles`): their rows have no room for gradients. Those are made in a ring beside, over the old
    ones if these are loaded, or, where threads add them, in 16 rows of each warp. Not timed yet.
Arithmetic: warp-level mma, slots on the M side: S^T = K q^T and dP^T = V dout^T (accumulators float32); P^T and dS^T,
    rounded to the inputs' dtype, are at once the A operands of dV = P^T dout and dK = dS^T q (contraction over 8
    heads); dq^T += K^T dS^T.
Bytes: n*B*T*K*H*2 * (4 fresh, 6 accumulating, 2 deferred) + 2*B*T*N*H*3 + 8*B*T*N; fresh also writes S - n slots of
    zeros, deferred reads and writes both gradients of its m last slots, m*B*T*K*H*2 * 4.
FLOPs: 10*B*T*N*n*H. Memory-bound on an H200: its copies run at about 4.2 TB/s.
Benchmark: T = 16384, K = 8, H = 64, S = 64, G = 8: 4.8 GB, 1.15 ms at 4.2 TB/s; measured 1.29 ms.

Interpreted on a CPU, the lines that differ are those of `forward.py`: padding instead of out-of-range boxes, and
`BackwardInterpretedTile` instead of PTX.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import warpgroup
from pallas_kernels.mosaic_gpu.depth.backward_tile import BackwardInterpretedTile, BackwardWarpTile, DepthVariant
from pallas_kernels.mosaic_gpu.depth.chunk import (
    Window,
    box_sizes,
    compiler_params,
    depth_boxes,
    last_rows,
    load_chunk,
    pad_for_interpreter,
    pad_group,
    unpad_group,
    window_operand,
)
from pallas_kernels.mosaic_gpu.depth.tiles import (
    COLUMNS,
    FLOAT_BUFFERS,
    FRESH,
    SMALL_BUFFERS,
    WARPS,
    DepthShape,
    DepthTiles,
    backward_scratch,
    backward_tiles,
    check_shared_memory,
    gradient_kind,
    most_heads,
    padded_group,
    tile_heads,
)
from pallas_kernels.operands import Call, Upstream


def _body(spec: DepthVariant, blocks: int, compute: Any, slot_offset: int):
    shape, tiles, gradients = spec.shape, spec.tiles, spec.gradients
    rows, stages = tiles.rows, tiles.stages
    group_rows = WARPS * shape.tile_heads
    distance = stages - 1  # chunks that are loaded ahead
    zeros = plgpu.OOBFillMode.ZEROS

    def depth_backward_kernel(*refs):
        q_ref, do_ref, k_ref, v_ref, lse_ref, delta_ref, window_ref, *refs = refs
        added_ref = refs.pop(0) if spec.adds else None
        if gradients == FRESH:
            dq_ref, dk_ref, dv_ref, *refs = refs
        elif spec.queries:
            dk_ref, dv_ref, dq_ref, *refs = refs
        else:
            dk_ref, dv_ref, *refs = refs
        ring, *refs = refs
        made = refs.pop(0) if shape.narrow else ring  # where gradients are made
        queries, statistics, *refs = refs
        staging = made if spec.deferred else refs.pop(0)
        loaded, *blank = refs
        block = lax.axis_index("block")
        window = Window(window_ref)
        length = window.length
        chunks = lax.div(window.count + (rows - 1), rows)
        groups = lax.div(shape.groups - block + (blocks - 1), blocks)  # of this block; 0 beyond the last one
        units = groups * chunks
        column = length * 0  # a traced 0: a box may then reach beyond H
        boxes = functools.partial(depth_boxes, shape, column=column)

        def gradient_tile(stage, operand, warp, c):
            return made.at[stage, operand + (0 if shape.narrow else spec.parts - 2), warp, c]

        def locate(unit):
            turn = lax.div(unit, chunks)
            chunk = unit - turn * chunks
            return lax.rem(unit, stages), block + turn * blocks, length - (chunks - chunk) * rows + slot_offset

        def load(unit):
            stage, group, slot = locate(unit)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=loaded.at[stage], oob_mode=zeros)
            first = window.hidden_rows(slot, slot_offset)
            for i, ref in enumerate((lse_ref, delta_ref)):
                copy(ref.at[pl.ds(group * group_rows, shape.statistics)], statistics.at[stage, i])
            for c in range(shape.column_blocks):
                columns = pl.ds(column + c * COLUMNS, COLUMNS)
                for i, ref in enumerate((q_ref, do_ref)):
                    source = ref.at[pl.ds(group * group_rows, shape.query_rows), columns]
                    copy(source, queries.at[stage, i, c])

            def load_slots(size):
                for i, ref in enumerate((k_ref, v_ref, dk_ref, dv_ref)[: spec.parts]):
                    for warp, c, index in boxes(group):
                        tile = ring.at[stage, i, warp, c] if i < 2 else gradient_tile(stage, i - 2, warp, c)
                        target = last_rows(tile, rows, size)
                        copy(ref.at[index(slot + (rows - size), size)], target)

            load_chunk(load_slots, rows, first, spec.windowed)

        def store(unit, size):
            """The last `size` rows of a chunk's gradients."""
            stage, group, slot = locate(unit)
            for i, ref in enumerate((dk_ref, dv_ref)):
                for warp, c, index in boxes(group):
                    source = last_rows(gradient_tile(stage, i, warp, c), rows, size)
                    target = ref.at[index(slot + (rows - size), size)]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        def store_zeros(group):
            def one_chunk(first, i, _):
                for ref in (dk_ref, dv_ref):
                    for _, _, index in boxes(group):
                        slot = first + i * rows + slot_offset
                        plgpu.copy_smem_to_gmem(blank[0], ref.at[index(slot, rows)], commit_group=False)
                return None

            if spec.windowed:  # the last chunk reaches into the window: it has to be there before the gradients are
                before = lax.div(window.start + (rows - 1), rows)
                lax.fori_loop(0, before, functools.partial(one_chunk, 0), None)
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0)
            behind = lax.div(shape.slots - length + (rows - 1), rows)
            lax.fori_loop(0, behind, functools.partial(one_chunk, length), None)

        if gradients == FRESH:
            compute.clear(blank[0])
            plgpu.commit_smem()
        for unit in range(distance):
            pl.when(unit < units)(functools.partial(load, jnp.int32(unit)))

        def group_loop(turn, _):
            group = block + turn * blocks
            if gradients == FRESH:
                store_zeros(group)

            def chunk_loop(chunk, state):
                unit = turn * chunks + chunk
                stage, _, slot = locate(unit)
                if spec.by_threads:
                    plgpu.commit_smem()  # every warp has left the stage that is loaded next
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(unit + distance < units)(functools.partial(load, unit + distance))
                plgpu.barrier_wait(loaded.at[stage])
                first = window.hidden_rows(slot, slot_offset)  # rows of the first chunk before the window
                place = (stage, first, slot, group, window.waiting_rows(slot, slot_offset, rows))
                buffers = (dk_ref, dv_ref) if spec.by_threads else ()
                state = compute.step(ring, made, queries, statistics, place, buffers, state)
                if not spec.by_threads:
                    # At negative slots a TMA store is an illegal instruction, and slots before the window keep what
                    # they have: a cut first chunk goes by hand, but for one that fills a smaller box.
                    sizes = box_sizes(rows, spec.windowed)
                    cut = functools.reduce(jnp.logical_and, [first != rows - size for size in sizes])
                    pl.when(cut)(lambda: compute.store(made, place, (dk_ref, dv_ref)))
                    plgpu.commit_smem()
                    for size in sizes:
                        pl.when(first == rows - size)(functools.partial(store, unit, size))
                    plgpu.commit_smem_to_gmem_group()
                return state

            state = lax.fori_loop(0, chunks, chunk_loop, compute.start())
            if spec.queries:
                last = lax.rem(lax.max(turn * chunks + chunks - 1, 0), stages) if spec.deferred else jnp.int32(0)
                compute.finish(state, staging, last, group, dq_ref, added_ref)
            return None

        lax.fori_loop(0, groups, group_loop, None)
        if not spec.by_threads:
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

    return depth_backward_kernel


def depth_backward(
    call: Call,
    upstream: Upstream,
    buffers: tuple[jax.Array, jax.Array] | None = None,
    *,
    dquery: jax.Array | None = None,
    tiles: DepthTiles | None = None,
    blocks: int | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Gradients of the depth part of a call whose lse and delta may cover other keys too.

    Args:
        call: query [B, T, N, H], bfloat16 or float16, and depth part. Slots from `length` on are never read. Given
            buffers, those before `deferred` keep their gradients as they are, and `query_gradient` counts.
        upstream: see `pallas_kernels.operands.Upstream`.
        buffers: [B, T, S, K, H], the inputs' dtype or float32: the gradients are added to their seen slots, in place
            where the caller's value is not needed any more.
        dquery: [B, T, N, H], an array to which the query's gradient is added (the sequence part's), or None.
        tiles: overrides the tile choice. blocks: overrides the number of thread blocks.
        interpret: run under the Pallas GPU interpreter; None: where there is no GPU.

    Returns:
        (dquery [B, T, N, H], ddepth_key, ddepth_value [B, T, S, K, H]): fresh arrays, in the inputs' dtype, have
        zeros in slots that are not seen; given buffers come back with their dtype. dquery is None if it is not wanted.

    Raises:
        NotImplementedError: slots are deferred and there are no buffers.
    """
    query, depth = call.query, call.depth
    num_heads, head_dim = query.shape[2:]
    num_kv_heads = depth.key.shape[3]
    if depth.slots == 0:
        dq = jnp.zeros_like(query) if dquery is None else dquery
        return (
            dq if call.query_gradient else None,
            *((jnp.zeros_like(x, query.dtype) for x in (depth.key, depth.value)) if buffers is None else buffers),
        )
    if depth.deferred is not None and buffers is None:
        raise NotImplementedError("depth backward: slots whose gradients are deferred, but no buffers for the others")
    if interpret is None:
        interpret = warpgroup.default_interpret()
    group_size, most = num_heads // num_kv_heads, most_heads(head_dim)
    if padded_group(group_size, most) != group_size:
        wider = functools.partial(pad_group, num_kv_heads=num_kv_heads, most=most)
        dq, *gradients = depth_backward(
            dataclasses.replace(call, query=wider(query)), Upstream(*map(wider, upstream)), buffers,
            dquery=None if dquery is None else wider(dquery), tiles=tiles, blocks=blocks, interpret=interpret,
        )  # fmt: skip
        return (None if dq is None else unpad_group(dq, num_kv_heads, group_size), *gradients)
    heads = tile_heads(group_size, most)
    run = functools.partial(_run, call, tiles=tiles, blocks=blocks, interpret=interpret)
    if heads == group_size:
        return run(query, upstream, buffers, dquery)

    def split(x):
        """Query heads of each KV head in parts of a tile: a list of [B, T, K * heads, ...]."""
        parts = x.reshape(*x.shape[:2], num_kv_heads, group_size // heads, heads, *x.shape[3:])
        return [parts[:, :, :, i].reshape(*x.shape[:2], -1, *x.shape[3:]) for i in range(group_size // heads)]

    pieces = []
    added = [None] * (group_size // heads) if dquery is None else split(dquery)
    for q, *piece, dq in zip(split(query), *map(split, upstream), added, strict=True):
        dq, *buffers = run(q, Upstream(*piece), buffers, dq)
        pieces.append(dq if dq is None else dq.reshape(*dq.shape[:2], num_kv_heads, 1, heads, head_dim))
    if not call.query_gradient:
        return (None, *buffers)
    return (jnp.concatenate(pieces, axis=3).reshape(query.shape), *buffers)


def _run(call, query, upstream, buffers, dquery, *, tiles, blocks, interpret):
    """One pass, over as many query heads of each KV head as a tile has: [B, T, K * heads, ...]."""
    depth, dtype = call.depth, query.dtype
    num_heads, head_dim = query.shape[2:]
    slots, num_kv_heads = depth.key.shape[2:4]
    tokens = query.shape[0] * query.shape[1]
    narrow = depth.key.dtype != dtype
    shape = DepthShape(tokens, slots, num_heads, num_kv_heads, head_dim, num_heads // num_kv_heads, narrow)
    gradients = gradient_kind(None if buffers is None else buffers[0].dtype)
    deferred = depth.deferred is not None
    tiles = tiles or backward_tiles(shape, gradients, deferred=deferred)
    scratch = backward_scratch(shape, tiles, dtype, gradients, deferred)
    check_shared_memory("depth backward", shape, tiles, scratch)
    blocks = blocks or min(shape.groups, 2 if interpret else warpgroup.multiprocessors() * tiles.blocks)
    heads_flat = [x.reshape(-1, head_dim) for x in (query, upstream.dout)]
    arrays = [x.reshape(tokens, *x.shape[2:]) for x in (depth.key, depth.value)]
    statistics = [x.reshape(-1).astype(jnp.float32) for x in (upstream.lse, upstream.delta)]
    targets = [] if gradients == FRESH else [x.reshape(tokens, *x.shape[2:]) for x in buffers]
    depth_shape = (tokens, slots, num_kv_heads, head_dim)
    offset = 0
    if interpret:
        offset = tiles.rows
        heads_flat, padded = pad_for_interpreter(shape, tiles, heads_flat, arrays + targets)
        arrays, targets = padded[:2], padded[2:]
        depth_shape = arrays[0].shape
        missing = shape.groups * WARPS * shape.tile_heads + shape.statistics - tokens * num_heads
        statistics = [jnp.pad(x, (0, missing)) for x in statistics]
    queries = call.query_gradient or gradients == FRESH
    spec = DepthVariant(
        shape, tiles, call.scale, dtype, gradients, windowed=depth.start is not None,
        adds=queries and dquery is not None, deferred=deferred, queries=queries,
    )  # fmt: skip
    compute = (BackwardInterpretedTile if interpret else BackwardWarpTile)(spec)
    out_type = [jax.ShapeDtypeStruct((tokens * num_heads, head_dim), dtype)] if queries else []
    if gradients == FRESH:
        out_type += [jax.ShapeDtypeStruct(depth_shape, dtype)] * 2
    name = {FRESH: "", SMALL_BUFFERS: "_accumulate", FLOAT_BUFFERS: "_accumulate_float32"}[gradients]
    name += ("_deferred" if deferred else "") + ("" if queries else "_slots")
    kernel = plgpu.kernel(
        _body(spec, blocks, compute, offset),
        out_type=tuple(out_type),
        scratch_types=tuple(scratch.values()),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name=shape.kernel_name(f"moda_depth_backward{name}", tiles),
        compiler_params=compiler_params(),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    operands = [*heads_flat, *arrays, *statistics, window_operand(depth)]
    if spec.adds:
        operands.append(dquery.reshape(-1, head_dim))
    if gradients == FRESH:
        dq, *results = kernel(*operands)
    else:
        refs = [jax.new_ref(x) for x in targets]
        [dq] = kernel(*operands, *refs) if queries else [*kernel(*operands, *refs), None]
        results = [jax.freeze(r) for r in refs]
    if interpret:
        results = [x[:tokens, tiles.rows : tiles.rows + slots, :, :head_dim] for x in results]
    dq = dq.reshape(query.shape) if call.query_gradient else None
    return (dq, *(x.reshape(depth.key.shape) for x in results))
