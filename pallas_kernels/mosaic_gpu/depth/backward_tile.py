"""The arithmetic of the depth backward, one chunk of slots at a time: see `backward.py`, whose kernel calls it.

`BackwardWarpTile` is what runs on the chip, `BackwardInterpretedTile` what runs under the Pallas interpreter; both read
the same chunk from shared memory and leave the gradients there (or, for float32 buffers, in global memory).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.depth import warp_mma as wm
from pallas_kernels.mosaic_gpu.depth.chunk import (
    LOG2E,
    SCALAR,
    filled_rows,
    flat,
    group_queries,
    group_tiles,
    if_loaded,
    like,
    registers,
    scalar,
    thread_array,
    thread_values,
    write_heads,
)
from pallas_kernels.mosaic_gpu.depth.entry_tiles import entry_tiles
from pallas_kernels.mosaic_gpu.depth.tiles import (
    COLUMNS,
    FLOAT_BUFFERS,
    SWIZZLE,
    THREADS,
    WARPS,
    DepthShape,
    DepthTiles,
    ring_parts,
    ring_swizzle,
)


@dataclasses.dataclass(frozen=True)
class DepthVariant:
    """What is compiled into the backward kernel of a call.

    Attributes:
        shape, tiles: its geometry.
        scale, dtype: of the logits, and of the inputs.
        gradients: FRESH, SMALL_BUFFERS or FLOAT_BUFFERS.
        windowed: the window of seen slots has a start.
        adds: there is an array to which the query's gradient is added.
        deferred: of buffers: only the slots from a number on, known when the kernel runs, get their gradient.
        queries: the query's gradient is wanted.
    """

    shape: DepthShape
    tiles: DepthTiles
    scale: float
    dtype: Any
    gradients: str
    windowed: bool = False
    adds: bool = False
    deferred: bool = False
    queries: bool = True

    @property
    def parts(self) -> int:
        """Operands of a chunk in the ring."""
        return ring_parts(self.gradients, self.deferred)

    @property
    def staged(self) -> bool:
        """Whether the gradients are made in 16 rows of each warp's own: rows of 8-bit entries have no room for them."""
        return self.shape.narrow and self.by_threads

    @property
    def by_threads(self) -> bool:
        """Whether threads add the gradients to global memory, and not TMA."""
        return self.deferred or self.gradients == FLOAT_BUFFERS


class BackwardWarpTile:
    """The arithmetic of a chunk on the chip; one warp, one tile. The carried state is dq^T."""

    def __init__(self, spec: DepthVariant) -> None:
        self.spec, self.shape, self.tiles, self.scale, self.dtype = spec, spec.shape, spec.tiles, spec.scale, spec.dtype
        self.gradients, shape, tiles = spec.gradients, spec.shape, spec.tiles
        self.count = 4 * shape.steps * shape.head_blocks
        self.layout = registers(self.count)
        self.entries = entry_tiles(shape, tiles.rows, spec.dtype)
        self.tile_bytes = self.entries.tile_bytes
        self.query_bytes = shape.column_blocks * shape.query_rows * wm.ROW_BYTES
        self.block_bytes = (16 if spec.staged else tiles.rows) * wm.ROW_BYTES  # of a column block of gradients

    def _type(self) -> Any:
        return plgpu.ShapeDtypeStruct((self.count * THREADS,), jnp.float32, self.layout)

    def start(self) -> Any:
        """The state before the first chunk."""

        @plgpu.inline_mgpu(return_type=self._type())
        def begin(ctx):
            del ctx
            return thread_array([wm.real(0.0)] * self.count)

        return begin()

    def clear(self, ref: Any) -> None:
        """Zeros a [rows, 64] tile of shared memory."""
        words = self.block_bytes // 16

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType((SWIZZLE,)),))
        def write(ctx, ref):
            del ctx
            lane = wm.Lane()
            thread = wm.add(wm.shift_left(lane.warp, 5), lane.lane)
            base = wm.shared_address(ref)
            for turn in range(-(-words // THREADS)):
                index = wm.add(thread, turn * THREADS)
                wm.store_shared_16_bytes(
                    wm.add(base, wm.shift_left(index, 4)), [wm.integer(0)] * 4, wm.less(index, words)
                )

        write(ref)

    def step(
        self,
        ring: Any,
        gradients: Any,
        queries: Any,
        statistics: Any,
        place: tuple[Any, ...],
        buffers: tuple,
        state: Any,
    ) -> Any:
        """One chunk.

        Args:
            gradients: where they are made: the ring, or memory of their own where entries have 8 bits.
            place: (stage, first row that is a slot, slot of row 0, group, first row that gets a gradient).
            buffers: of the gradients that threads add.
        """
        shape, rows, dtype, entries = self.shape, self.tiles.rows, self.dtype, self.entries
        ref, memory = plgpu.RefType((SWIZZLE,)), plgpu.RefType()

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType((ring_swizzle(shape),)), ref, ref, memory, *(SCALAR,) * 5, (memory,) * len(buffers),
                self.layout,
            ),
            return_type=self._type(),
        )  # fmt: skip
        def chunk(ctx, ring, gradients, queries, statistics, stage, first, slot, group, waiting, buffers, state):
            del ctx
            stage, first, slot, group, waiting = (scalar(x) for x in (stage, first, slot, group, waiting))
            lane = wm.Lane()
            keys = self._tile(lane, ring, stage)
            values = wm.add(keys, WARPS * self.tile_bytes)
            query = wm.add(wm.shared_address(queries), wm.multiply(stage, 2 * self.query_bytes))
            cotangent = wm.add(query, self.query_bytes)
            dq = self._unflatten(thread_values(state))

            heads, lse, delta = self._statistics(lane, wm.shared_address(statistics), stage)
            fragments = functools.partial(entries.query_fragments, lane)
            # With entries of 8 bits loaded again for every 16 rows: three thread blocks have 168 registers a thread.
            known = None if shape.narrow else [fragments(x) for x in (query, cotangent)]
            rows_of_heads = functools.partial(self._head_rows, lane)
            right = None if self.spec.deferred else [rows_of_heads(x) for x in (query, cotangent)]
            factor, zero = wm.real(self.scale * LOG2E * entries.drop / entries.lift), wm.real(0.0)
            scale = wm.real(self.scale / entries.lift)  # dS is lifted where it meets entries of 8 bits
            if entries.lift != 1.0:
                delta = [wm.arith.mulf(x, wm.real(entries.lift)) for x in delta]
            if self.spec.windowed:
                entries.clear_rows(lane, [keys, values], first)
            straight = lane.a_operand()

            def differentiate(block, dq):
                """The gradients of 16 rows; returns dq with theirs added."""
                where, old = (group, slot, waiting, block), None
                if self.gradients == FLOAT_BUFFERS and not self.spec.deferred:
                    old = self._old_rows(lane, buffers[0], where, 0)
                pairs = enumerate(((keys, query), (values, cotangent)))
                p, ds = (
                    entries.scores(lane, tile, fragments(heads) if known is None else known[i], block)
                    for i, (tile, heads) in pairs
                )
                if entries.drop != 1.0:
                    ds = [[wm.arith.mulf(x, wm.real(entries.drop)) for x in c] for c in ds]
                for half in range(2):
                    hidden = wm.less(wm.add(lane.row, 16 * block + 8 * half), first)
                    for n in range(shape.head_blocks):
                        for j in (2 * half, 2 * half + 1):
                            h = 2 * n + j % 2
                            logit = wm.arith.subf(wm.arith.mulf(p[n][j], factor), lse[h])
                            shown = wm.select(hidden, zero, wm.exp2(logit))
                            gradient = wm.arith.mulf(shown, wm.arith.subf(ds[n][j], delta[h]))
                            p[n][j] = shown if heads[h] is None else wm.select(heads[h], shown, zero)
                            ds[n][j] = gradient if heads[h] is None else wm.select(heads[h], gradient, zero)
                p = [[wm.pack(c[0], c[1], dtype), wm.pack(c[2], c[3], dtype)] for c in p]
                ds = [[wm.pack(c[0], c[1], dtype), wm.pack(c[2], c[3], dtype)] for c in ds]
                if self.spec.queries:
                    turned = [[wm.transpose_matrix(x) for x in pair] for pair in ds]
                    for step, a in enumerate(entries.transposed(lane, keys, block)):
                        for n in range(shape.head_blocks):
                            dq[step][n] = wm.mma_k16(dq[step][n], a, turned[n], dtype)

                def add_gradients():
                    wm.warp_barrier()
                    made = self._gradient_tiles(lane, gradients, stage)
                    heads = [rows_of_heads(x) for x in (query, cotangent)] if right is None else right
                    gradient = functools.partial(differential, ((ds, heads[0]), (p, heads[1])))
                    if self.gradients == FLOAT_BUFFERS:
                        before = self._old_rows(lane, buffers[0], where, 0) if old is None else old
                        self._add_to_global(lane, buffers, where, *made, before, gradient)
                        return []
                    for operand, tile in enumerate(made):
                        before = self._old_words(lane, buffers[operand], where) if self.spec.deferred else None
                        for step in range(shape.steps):
                            self._write_rows(straight, tile, gradient(operand, step), self._row(block), step)
                        if self.spec.deferred:
                            wm.warp_barrier()
                            self._add_words(lane, where, tile, before)
                    return []

                if self.spec.deferred:
                    wm.when(wm.less(waiting, 16 * (block + 1)), add_gradients, [])
                else:
                    add_gradients()
                return flat(dq)

            def differential(sources, operand, step):
                """Two C fragments, [16 rows, 16 columns], of dK or dV."""
                left, right = sources[operand]
                c = [[zero] * 4, [zero] * 4]
                for n in range(shape.head_blocks):
                    for i in range(2):
                        c[i] = wm.mma_k8(c[i], left[n], right[n][2 * step + i], dtype)
                return [[wm.arith.mulf(x, scale) for x in part] for part in c] if operand == 0 else c

            for block in range(rows // 16):
                before = [list(step) for step in dq]
                add = functools.partial(differentiate, block, [list(step) for step in dq])
                dq = like(before, iter(if_loaded(rows, block, first, add, flat(before))))
            return thread_array(flat(dq))

        return chunk(ring, gradients, queries, statistics, *place, buffers, state)

    def _statistics(self, lane: wm.Lane, base: Any, stage: Any) -> tuple[list, list, list]:
        """Of this thread's heads: whether they exist (None: all do), lse in base 2, delta."""
        shape = self.shape
        base = wm.add(base, wm.multiply(stage, 2 * shape.statistics * 4))
        base = wm.add(base, wm.multiply(lane.warp, shape.tile_heads * 4))
        exists, lse, delta = [], [], []
        for h in range(2 * shape.head_blocks):
            head = wm.add(lane.column, 8 * (h // 2) + h % 2)
            exists.append(None if shape.tile_heads % 8 == 0 else wm.less(head, shape.tile_heads))
            address = wm.add(base, wm.shift_left(head, 2))
            lse.append(wm.arith.mulf(wm.load_shared(address), wm.real(LOG2E)))
            delta.append(wm.load_shared(wm.add(address, shape.statistics * 4)))
        return exists, lse, delta

    def _head_rows(self, lane: wm.Lane, base: Any) -> list[list[Any]]:
        """B fragments [head block][8 columns] of rows [heads, H], contracted over 8 heads; missing heads are zero."""
        shape = self.shape
        place = lane.wide_operand(wm.multiply(lane.warp, shape.tile_heads))
        result = []
        for n in range(shape.head_blocks):
            row = []
            for four in range((shape.steps + 1) // 2):
                block = wm.add(base, four // 2 * shape.query_rows * wm.ROW_BYTES)
                row += wm.load_matrices(wm.chunk_address(block, place, 8 * n, 4 * (four % 2)), transpose=True)
            if 8 * (n + 1) > shape.tile_heads:
                head = wm.add(lane.column, 8 * n)
                low = wm.select(wm.less(head, shape.tile_heads), wm.integer(0xFFFF), wm.integer(0))
                high = wm.select(wm.less(head, shape.tile_heads - 1), wm.integer(-65536), wm.integer(0))
                mask = wm.bit_or(low, high)
                row = [wm.bit_and(x, mask) for x in row]
            result.append(row[: 2 * shape.steps])
        return result

    def _tile(self, lane: wm.Lane, ring: Any, stage: Any) -> Any:
        """Shared-memory address of this warp's K in a stage."""
        parts = 2 if self.shape.narrow else self.spec.parts
        base = wm.add(wm.shared_address(ring), wm.multiply(stage, parts * WARPS * self.tile_bytes))
        return wm.add(base, wm.multiply(lane.warp, self.tile_bytes))

    def _gradient_tiles(self, lane: wm.Lane, gradients: Any, stage: Any) -> tuple[Any, Any]:
        """Shared-memory addresses of where this warp makes dK and dV: over K and V, or over the old ones.

        With entries of 8 bits, in memory of their own: a tile of a stage, or 16 rows for one block after the other.
        """
        if not self.shape.narrow:
            first = wm.add(self._tile(lane, gradients, stage), (self.spec.parts - 2) * WARPS * self.tile_bytes)
            return first, wm.add(first, WARPS * self.tile_bytes)
        size = self.shape.column_blocks * self.block_bytes
        first = wm.add(wm.shared_address(gradients), wm.multiply(lane.warp, size))
        if not self.spec.staged:
            first = wm.add(first, wm.multiply(stage, 2 * WARPS * size))
        return first, wm.add(first, WARPS * size)

    def _row(self, block: int) -> int:
        """The row of a gradient tile at which a block of 16 rows begins."""
        return 0 if self.spec.staged else 16 * block

    def _write_rows(self, place: wm.Place, tile: Any, c: list, row: int, step: int) -> None:
        """Puts a [16 rows, 16 columns] gradient over the rows of the tile, plus the old gradient where there is one."""
        dtype = self.dtype
        base = wm.add(tile, step // 4 * self.block_bytes)
        address = wm.chunk_address(base, place, row, 2 * (step % 4))
        pairs = [(c[0][0], c[0][1]), (c[0][2], c[0][3]), (c[1][0], c[1][1]), (c[1][2], c[1][3])]
        if self.spec.parts == 4:
            old = [wm.unpack(x, dtype) for x in wm.load_matrices(address)]
            pairs = [(wm.arith.addf(x[0], y[0]), wm.arith.addf(x[1], y[1])) for x, y in zip(pairs, old, strict=True)]
        wm.store_matrices(address, [wm.pack(x, y, dtype) for x, y in pairs])

    def _old_rows(self, lane: wm.Lane, buffer: Any, where: tuple, c: int) -> list[tuple[Any, Any, tuple]]:
        """(address, predicate, four f32) of 8 pairs of rows, 16 bytes a lane, of a column block of the old gradient."""
        shape, (group, slot, first, block) = self.shape, where
        tile = wm.add(wm.multiply(group, WARPS), lane.warp)
        token, head = wm.divide(tile, shape.num_kv_heads), wm.remainder(tile, shape.num_kv_heads)
        address = wm.advance(wm.global_address(buffer), token, 4 * shape.slots * shape.num_kv_heads * shape.head_dim)
        column = wm.add(wm.shift_left(wm.bit_and(lane.lane, 15), 2), c * COLUMNS)
        wanted = wm.both(wm.less(tile, shape.tiles), wm.less(column, shape.head_dim))
        result = []
        for two in range(8):
            row = wm.add(wm.shift_right(lane.lane, 4), 16 * block + 2 * two)
            entry = wm.add(wm.multiply(wm.add(slot, row), shape.num_kv_heads), head)
            target = wm.advance(wm.advance(address, entry, 4 * shape.head_dim), column, 4)
            predicate = wm.both(wanted, wm.less(wm.subtract(first, 1), row))
            result.append((target, predicate, wm.load_global_16_bytes(target, predicate)))
        return result

    def _old_words(self, lane: wm.Lane, buffer: Any, where: tuple) -> list[tuple[Any, Any, tuple]]:
        """(address, predicate, 16 bytes a lane) of four rows at once of an old gradient: 16 rows of each column
        block."""
        shape, (group, slot, first, block) = self.shape, where
        tile = wm.add(wm.multiply(group, WARPS), lane.warp)
        token, head = wm.divide(tile, shape.num_kv_heads), wm.remainder(tile, shape.num_kv_heads)
        slot_bytes = 2 * shape.num_kv_heads * shape.head_dim
        first_row = wm.add(wm.shift_right(lane.lane, 3), 16 * block)
        entry = wm.add(wm.multiply(wm.add(slot, first_row), shape.num_kv_heads), head)
        start = wm.advance(wm.global_address(buffer), token, shape.slots * slot_bytes)
        start = wm.advance(start, entry, 2 * shape.head_dim)
        result = []
        for c in range(shape.column_blocks):
            column = wm.add(wm.shift_left(wm.bit_and(lane.lane, 7), 3), c * COLUMNS)
            wanted = wm.both(wm.less(tile, shape.tiles), wm.less(column, shape.head_dim))
            for four in range(4):
                row = wm.add(first_row, 4 * four)
                target = wm.advance(wm.advance(start, column, 2), wm.integer(4 * four), slot_bytes)
                predicate = wm.both(wanted, wm.less(wm.subtract(first, 1), row))
                result.append((target, predicate, wm.load_global_16_bytes(target, predicate)))
        return result

    def _add_words(self, lane: wm.Lane, where: tuple, tile: Any, old: list) -> None:
        """Adds 16 rows of dK or dV, which stand in a tile's rows, to a buffer of the inputs' dtype."""
        for i, (target, predicate, theirs) in enumerate(old):
            row = wm.add(wm.shift_right(lane.lane, 3), self._row(where[3]) + 4 * (i % 4))
            place = lane.place(row, wm.bit_and(lane.lane, 7))
            address = wm.chunk_address(wm.add(tile, i // 4 * self.block_bytes), place, 0, 0)
            sums = []
            for mine, other in zip(wm.load_shared_16_bytes(address), theirs, strict=True):
                x, y = wm.unpack(mine, self.dtype), wm.unpack(other, self.dtype)
                sums.append(wm.pack(wm.arith.addf(x[0], y[0]), wm.arith.addf(x[1], y[1]), self.dtype))
            wm.store_global_16_bytes(target, sums, predicate)

    def _add_to_global(
        self, lane: wm.Lane, buffers: tuple, where: tuple, keys: Any, values: Any, old: list, gradient: Any
    ) -> None:
        """Adds 16 rows of dK and dV to float32 buffers [B*T, S, K, H].

        The fragments pass through the 16 rows of K (columns 0..31 of a block of 64) and of V (32..63), so that lanes
        then read, add and write 16 bytes each; the next old rows are on their way meanwhile.
        """
        block, items = where[3], [(operand, c) for operand in range(2) for c in range(self.shape.column_blocks)]
        for i, (operand, c) in enumerate(items):
            following = None
            if i + 1 < len(items):
                following = self._old_rows(lane, buffers[items[i + 1][0]], where, items[i + 1][1])
            offset = c * self.block_bytes + self._row(block) * wm.ROW_BYTES
            bases = [wm.add(x, offset) for x in (keys, values)]
            for step in range(4 * c, min(4 * c + 4, self.shape.steps)):
                parts = gradient(operand, step)
                for n in range(2):
                    for half in range(2):
                        column = wm.add(lane.column, (16 * step + 8 * n) % 32)
                        place = lane.place(wm.add(lane.row, 8 * half), wm.shift_right(column, 2))
                        address = wm.chunk_address(bases[step % 4 // 2], place, 0, 0)
                        address = wm.add(address, wm.shift_left(wm.bit_and(column, 3), 2))
                        wm.store_shared_pair(address, parts[n][2 * half : 2 * half + 2])
            wm.warp_barrier()
            chunk = wm.bit_and(lane.lane, 15)
            base = wm.select(wm.less(chunk, 8), *bases)
            for two, (target, predicate, theirs) in enumerate(old):
                row = wm.add(wm.shift_right(lane.lane, 4), 2 * two)
                place = lane.place(row, wm.bit_and(chunk, 7))
                mine = wm.load_shared_16_bytes(wm.chunk_address(base, place, 0, 0))
                sums = [wm.arith.addf(wm.as_real(x), wm.as_real(y)) for x, y in zip(mine, theirs, strict=True)]
                wm.store_global_16_bytes(target, [wm.as_word(x) for x in sums], predicate)
            wm.warp_barrier()
            old = following

    def store(self, gradients: Any, place: tuple[Any, ...], targets: tuple[Any, Any]) -> None:
        """Writes the rows of a chunk that are slots, without TMA: rows of 128 bytes, four at once."""
        shape, rows = self.shape, self.tiles.rows

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType((SWIZZLE,)), SCALAR, SCALAR, SCALAR, SCALAR, (plgpu.RefType(),) * 2)
        )
        def write(ctx, gradients, stage, first, slot, group, targets):
            del ctx
            stage, first, slot, group = (scalar(x) for x in (stage, first, slot, group))
            lane = wm.Lane()
            tile = wm.add(wm.multiply(group, WARPS), lane.warp)
            token, head = wm.divide(tile, shape.num_kv_heads), wm.remainder(tile, shape.num_kv_heads)
            in_range = wm.less(tile, shape.tiles)
            sources = self._gradient_tiles(lane, gradients, stage)
            chunk, row_in_four = wm.bit_and(lane.lane, 7), wm.shift_right(lane.lane, 3)
            wm.warp_barrier()  # every lane's part of the gradient is in shared memory
            for operand, target in enumerate(targets):
                target = wm.advance(
                    wm.global_address(target), token, 2 * shape.slots * shape.num_kv_heads * shape.head_dim
                )
                for c in range(shape.column_blocks):
                    base = wm.add(sources[operand], c * self.block_bytes)
                    column = wm.add(wm.shift_left(chunk, 3), c * COLUMNS)
                    wanted = wm.both(in_range, wm.less(column, shape.head_dim))
                    for four in range(rows // 4):
                        row = wm.add(row_in_four, 4 * four)
                        place = lane.place(row, chunk)
                        words = wm.load_shared_16_bytes(wm.chunk_address(base, place, 0, 0))
                        entry = wm.add(wm.multiply(wm.add(slot, row), shape.num_kv_heads), head)
                        address = wm.advance(wm.advance(target, entry, 2 * shape.head_dim), column, 2)
                        wm.store_global_16_bytes(address, words, wm.both(wanted, wm.less(wm.subtract(first, 1), row)))

        write(gradients, *place[:4], targets)

    def finish(self, state: Any, staging: Any, stage: Any, group: Any, dq_ref: Any, added_ref: Any) -> None:
        """Writes what the state has come to, by way of `staging`: if deferred, where gradients are made; in a ring, its
        stage was the last."""
        shape = self.shape
        refs = (dq_ref,) if added_ref is None else (dq_ref, added_ref)

        @plgpu.inline_mgpu(
            arg_types=(self.layout, plgpu.RefType((SWIZZLE,)), SCALAR, SCALAR, (plgpu.RefType(),) * len(refs))
        )
        def write(ctx, state, staging, stage, group, refs):
            del ctx
            lane = wm.Lane()
            dq = self._unflatten(thread_values(state))
            scale = wm.real(self.scale * self.entries.drop / self.entries.lift)
            dq = [[[wm.arith.mulf(x, scale) for x in c] for c in step] for step in dq]
            tile = wm.add(wm.multiply(scalar(group), WARPS), lane.warp)
            size = shape.column_blocks * 8 * shape.head_blocks * wm.ROW_BYTES
            if self.spec.deferred:
                mine, _ = self._gradient_tiles(lane, staging, scalar(stage))
            else:
                mine = wm.add(wm.shared_address(staging), wm.multiply(lane.warp, size))
            addresses = [wm.global_address(r) for r in refs]
            added = addresses[1] if len(addresses) == 2 else None
            wm.warp_barrier()  # the last group's rows have been read
            write_heads(lane, self.entries, dq, mine, addresses[0], tile, added)

        write(state, staging, stage, group, refs)

    def _unflatten(self, values: list) -> list:
        blocks = self.shape.head_blocks
        return [
            [list(values[4 * (step * blocks + n) : 4 * (step * blocks + n) + 4]) for n in range(blocks)]
            for step in range(self.shape.steps)
        ]


class BackwardInterpretedTile:
    """`BackwardWarpTile` for the interpreter: the same chunk from and to the same shared memory, in jax.numpy."""

    def __init__(self, spec: DepthVariant) -> None:
        self.spec, self.shape, self.tiles, self.scale, self.dtype = spec, spec.shape, spec.tiles, spec.scale, spec.dtype
        self.gradients = spec.gradients

    @property
    def _first_part(self) -> int:
        """The operand of where gradients are made that is dK's."""
        return 0 if self.shape.narrow else self.spec.parts - 2

    def start(self) -> Any:
        """The state before the first chunk."""
        return jnp.zeros((WARPS, self.shape.tile_heads, self.shape.column_blocks * COLUMNS), jnp.float32)

    def clear(self, ref: Any) -> None:
        """Zeros a tile of shared memory."""
        ref[...] = jnp.zeros(ref.shape, self.dtype)

    def step(
        self, ring: Any, gradients: Any, queries: Any, statistics: Any, place: tuple, buffers: tuple, state: Any
    ) -> Any:
        """One chunk; returns the new state."""
        stage, first, slot, group, waiting = place
        shape, rows = self.shape, self.tiles.rows
        query, cotangent = (group_queries(shape, queries[stage, i]) for i in range(2))  # [4, G, H]
        key, value = (filled_rows(group_tiles(ring[stage, i]), first, self.dtype) for i in range(2))  # [4, rows, H]
        lse, delta = (
            statistics[stage, i][: WARPS * shape.tile_heads].reshape(WARPS, 1, shape.tile_heads) for i in range(2)
        )
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        shown = jnp.arange(rows)[:, None] >= first
        logits = dot("wsh,wgh->wsg", key, query) * (self.scale * LOG2E)
        p = jnp.where(shown, jnp.exp2(logits - lse * LOG2E), 0.0)
        ds = p * (dot("wsh,wgh->wsg", value, cotangent) - delta)
        p, ds = p.astype(self.dtype), ds.astype(self.dtype)
        if self.spec.queries:
            state = state + dot("wsg,wsh->wgh", ds, key)
        made = (dot("wsg,wgh->wsh", ds, query) * self.scale, dot("wsg,wgh->wsh", p, cotangent))
        for i, gradient in enumerate(made):
            for w in range(WARPS):
                if self.spec.by_threads:
                    self._add(buffers[i], (group, slot, waiting), w, gradient[w])
                    continue
                for c in range(shape.column_blocks):
                    part = gradient[w, :, c * COLUMNS : (c + 1) * COLUMNS]
                    target = gradients.at[stage, i + self._first_part, w, c]
                    if self.spec.parts == 4:
                        part = part + target[...].astype(jnp.float32)
                    target[...] = part.astype(self.dtype)
        return state

    def _add(self, buffer: Any, where: tuple, warp: int, gradient: Any) -> None:
        """Adds the rows [rows, columns] of a warp's tile that get a gradient to a buffer [B*T, S, K, H]."""
        (group, slot, waiting), rows, num_kv_heads = where, self.tiles.rows, self.shape.num_kv_heads
        tile = group * WARPS + warp
        token = lax.div(tile, num_kv_heads)

        @pl.when(waiting < rows)
        def _write() -> None:
            target = buffer.at[token, pl.ds(slot, rows), tile - token * num_kv_heads]
            part = jnp.where(jnp.arange(rows)[:, None] >= waiting, gradient, 0.0).astype(target.dtype)
            target[...] = target[...] + part

    def store(self, gradients: Any, place: tuple, targets: tuple[Any, Any]) -> None:
        """Writes the rows of a chunk that are slots, without TMA."""
        stage, first, slot, group, _ = place
        shape = self.shape
        for i, target in enumerate(targets):
            gradient = group_tiles(gradients[stage, i + self._first_part])
            for w in range(WARPS):
                tile = group * WARPS + w
                token = lax.div(tile, shape.num_kv_heads)
                rows = target.at[token, pl.ds(slot, self.tiles.rows), tile - token * shape.num_kv_heads]
                rows[...] = jnp.where(jnp.arange(self.tiles.rows)[:, None] >= first, gradient[w], rows[...])

    def finish(self, state: Any, staging: Any, stage: Any, group: Any, dq_ref: Any, added_ref: Any) -> None:
        """Writes what the state has come to."""
        del staging, stage
        heads = self.shape.tile_heads
        for w in range(WARPS):
            tile = group * WARPS + w

            @pl.when(tile < self.shape.tiles)
            def _write(w=w, tile=tile):
                rows = pl.ds(tile * heads, heads)
                dq = (state[w, :, : self.shape.head_dim] * self.scale).astype(self.dtype)
                if added_ref is not None:
                    dq = (dq.astype(jnp.float32) + added_ref[rows, :].astype(jnp.float32)).astype(self.dtype)
                dq_ref[rows, :] = dq
