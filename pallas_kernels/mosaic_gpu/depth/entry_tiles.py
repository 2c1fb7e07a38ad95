"""How a warp reads a tile of K or V: as entries of the queries' dtype, or of 8 bits each.

A tile is [column blocks, rows, 64] in shared memory, as TMA wrote it: rows of 128 bytes with a 128-byte swizzle, or of
64 bytes with a 64-byte swizzle. Both classes offer the same methods; all run inside `plgpu.inline_mgpu`, on the values
of one thread.

Two things differ with 8 bits (float8_e4m3fn, `Float8Tiles`).

*Fragments are permuted.* The matrix loads move pairs of bytes, so that a lane has four neighbouring columns of a row,
or two neighbouring columns of two rows, where an mma wants two of each. Bytes 0 and 2 of a word are taken for one pair
and bytes 1 and 3 for the other: along the columns that permutes a contraction, and the queries' fragments alike; of the
transposed operand it permutes the result's rows, which `write_heads` puts right.

*Numbers are shifted.* A byte becomes a 16-bit number by moving its bits, without arithmetic: its value is then 2^-120
(bfloat16) or 2^-8 (float16) of the entry, exactly, subnormal numbers too; but NaN becomes 480. What it is multiplied
with is lifted by 2^60 in bfloat16, so that no product is subnormal in float32; what comes of it is scaled back where it
is scaled anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.depth import warp_mma as wm
from pallas_kernels.mosaic_gpu.depth.tiles import COLUMNS, DepthShape

FLOAT8 = jnp.dtype("float8_e4m3fn")


def entry_tiles(shape: DepthShape, rows: int, dtype: Any) -> EntryTiles:
    """The tiles of a call; dtype: the queries'."""
    return (Float8Tiles if shape.narrow else EntryTiles)(shape, rows, dtype)


class EntryTiles:
    """Entries of the queries' dtype.

    Attributes:
        block_bytes, tile_bytes: of a column block of a tile, and of a tile.
        lift: what queries (and what else meets entries) are multiplied with in fragments.
        drop: what the result of a product of entries is to be multiplied with, when nothing was lifted.
    """

    row_bytes = wm.ROW_BYTES

    def __init__(self, shape: DepthShape, rows: int, dtype: Any) -> None:
        self.shape, self.rows, self.dtype = shape, rows, dtype
        self.block_bytes = rows * self.row_bytes
        self.tile_bytes = shape.column_blocks * self.block_bytes
        self.lift, self.drop = 1.0, 1.0

    def query_fragments(self, lane: wm.Lane, base: Any) -> list[list[tuple[Any, Any]]]:
        """B fragments [head block][step] of q^T from the group's rows [column_blocks, query_rows, 64], lifted."""
        shape = self.shape
        place = lane.wide_operand(wm.multiply(lane.warp, shape.tile_heads))
        fragments = []
        for n in range(shape.head_blocks):
            row = []
            for pair in range((shape.steps + 1) // 2):
                block = wm.add(base, pair // 2 * shape.query_rows * wm.ROW_BYTES)
                m = wm.load_matrices(wm.chunk_address(block, place, 8 * n, 4 * (pair % 2)))
                row += [(m[0], m[1]), (m[2], m[3])]
            fragments.append(row[: shape.steps])
        return fragments

    def straight(self, lane: wm.Lane, tile: Any, block: int) -> Iterator[tuple[Any, ...]]:
        """For each step of 16 columns the A fragment [16 rows, 16 columns] of a block of 16 rows."""
        place = lane.a_operand()
        for step in range(self.shape.steps):
            base = wm.add(tile, step // 4 * self.block_bytes)
            yield wm.load_matrices(wm.chunk_address(base, place, 16 * block, 2 * (step % 4)))

    def transposed(self, lane: wm.Lane, tile: Any, block: int) -> Iterator[tuple[Any, ...]]:
        """For each step of 16 columns the A fragment [16 columns, 16 rows]."""
        place = lane.a_transposed_operand()
        for step in range(self.shape.steps):
            base = wm.add(tile, step // 4 * self.block_bytes)
            yield wm.load_matrices(wm.chunk_address(base, place, 16 * block, 2 * (step % 4)), transpose=True)

    def scores(self, lane: wm.Lane, tile: Any, fragments: list, block: int) -> list[list[Any]]:
        """C fragments [head block] of X q^T for 16 rows of a tile X."""
        c = [[wm.real(0.0)] * 4 for _ in range(self.shape.head_blocks)]
        for step, a in enumerate(self.straight(lane, tile, block)):
            for n in range(self.shape.head_blocks):
                c[n] = wm.mma_k16(c[n], a, fragments[n][step], self.dtype)
        return [list(x) for x in c]

    def stage_heads(self, lane: wm.Lane, columns: list[list[Any]], staging: Any) -> None:
        """Puts x^T, the C fragments [step][head block] that products with `transposed` give, as 16-bit rows [heads, H]
        into a warp's staging memory [column_blocks, 8 * head_blocks, 64]."""
        shape, place = self.shape, lane.wide_operand()
        for block in range(shape.column_blocks):
            base = wm.add(staging, block * 8 * shape.head_blocks * wm.ROW_BYTES)
            for head_block in range(shape.head_blocks):
                for pair in range(2):
                    words = []
                    for step in (4 * block + 2 * pair, 4 * block + 2 * pair + 1):
                        if step < shape.steps:
                            c = columns[step][head_block]
                            words += [wm.pack(c[0], c[1], self.dtype), wm.pack(c[2], c[3], self.dtype)]
                        else:
                            words += [wm.integer(0)] * 2
                    wm.store_matrices(wm.chunk_address(base, place, 8 * head_block, 4 * pair), words, transpose=True)

    def clear_rows(self, lane: wm.Lane, tiles: list[Any], first: Any) -> None:
        """Zeros what of this warp's tiles comes before row `first` in its block of 16 rows: slots that are not seen,
        and were loaded beside others or are left from another chunk. Blocks before that one are not read at all."""

        def clear() -> list[Any]:
            for tile in tiles:
                self._clear_tile(lane, tile, first)
            wm.warp_barrier()
            return []

        wm.when(wm.less(wm.integer(0), first), clear, [])

    def _clear_tile(self, lane: wm.Lane, tile: Any, first: Any) -> None:
        """Half a row a lane."""
        half = self.row_bytes // 2
        row = wm.add(wm.shift_left(wm.shift_right(first, 4), 4), wm.shift_right(lane.lane, 1))
        start = wm.add(wm.multiply(row, self.row_bytes), wm.multiply(wm.bit_and(lane.lane, 1), half))
        start, hidden = wm.add(tile, start), wm.less(row, first)
        for block in range(self.shape.column_blocks):
            for i in range(half // 16):
                address = wm.add(start, block * self.block_bytes + 16 * i)
                wm.store_shared_16_bytes(address, [wm.integer(0)] * 4, hidden)


class Float8Tiles(EntryTiles):
    """Entries in float8_e4m3fn: see the module."""

    row_bytes = COLUMNS

    def __init__(self, shape: DepthShape, rows: int, dtype: Any) -> None:
        super().__init__(shape, rows, dtype)
        wide = wm.element(dtype) == "bf16"
        self.lift, self.drop = (2.0**60, 2.0**120) if wide else (1.0, 2.0**8)
        # Bits of the magnitude move from 0..6 of a byte to just below a 16-bit number's sign: 4..10, or 7..13.
        self._odd_shift, self._even_shift = (4, 4) if wide else (1, 7)
        self._magnitude = 0x07F007F0 if wide else 0x3F803F80

    def query_fragments(self, lane: wm.Lane, base: Any) -> list[list[tuple[Any, Any]]]:
        """As `EntryTiles.query_fragments`."""
        shape = self.shape
        row = wm.add(lane.row, wm.multiply(lane.warp, shape.tile_heads))
        place = lane.place(row, wm.shift_right(lane.column, 2))
        eight = wm.shift_left(wm.bit_and(lane.column, 2), 2)  # which half of the 16 bytes
        fragments = []
        for n in range(shape.head_blocks):
            steps = []
            for step in range(shape.steps):
                block = wm.add(base, step // 4 * shape.query_rows * wm.ROW_BYTES)
                words = wm.load_shared_8_bytes(
                    wm.add(wm.chunk_address(block, place, 8 * n, 2 * (step % 4)), eight)
                )  # columns 4c to 4c + 3
                pairs = wm.bytes_of(*words, 0x5410), wm.bytes_of(*words, 0x7632)
                steps.append(tuple(self._lifted(pair) for pair in pairs))
            fragments.append(steps)
        return fragments

    def _lifted(self, pair: Any) -> Any:
        return pair if self.lift == 1.0 else wm.multiply_pairs(pair, self.lift, self.dtype)

    def straight(self, lane: wm.Lane, tile: Any, block: int) -> Iterator[tuple[Any, ...]]:
        """As `EntryTiles.straight`."""
        for words in self._words(lane, tile, block, transpose=False):
            for low, high in (words[:2], words[2:]):  # rows 0..7 and 8..15
                (a0, a2), (a1, a3) = self._widened(low), self._widened(high)
                yield a0, a1, a2, a3

    def transposed(self, lane: wm.Lane, tile: Any, block: int) -> Iterator[tuple[Any, ...]]:
        """As `EntryTiles.transposed`."""
        for words in self._words(lane, tile, block, transpose=True):
            for low, high in (words[:2], words[2:]):
                (a0, a1), (a2, a3) = self._widened(low), self._widened(high)
                yield a0, a1, a2, a3

    def _words(self, lane: wm.Lane, tile: Any, block: int, *, transpose: bool) -> Iterator[tuple[Any, ...]]:
        """Of each 32 columns: rows 0..7 and 8..15 of the first 16 bytes, then of the others."""
        row, chunk = lane.narrow_operand()
        swizzled = wm.bit_xor(chunk, wm.bit_and(wm.shift_right(row, 1), 3))
        start = wm.add(tile, wm.add(wm.shift_left(row, 6), wm.shift_left(swizzled, 4)))
        for pair in range(self.shape.steps // 2):  # tiles lie at multiples of 1024 bytes: bit 5 is of the chunk alone
            address = wm.bit_xor(start, 32 * (pair % 2))
            address = wm.add(address, pair // 2 * self.block_bytes + 16 * block * self.row_bytes)
            yield wm.load_matrices(address, transpose=transpose)

    def _widened(self, word: Any) -> tuple[Any, Any]:
        """Bytes 0 and 2 of a word, and bytes 1 and 3, as pairs of 16-bit numbers: 1 / `drop` of what they were."""

        def joined(sign: Any, magnitude: Any) -> Any:
            return wm.bit_or(
                wm.bit_and(sign, wm.integer(-0x7FFF8000)), wm.bit_and(magnitude, wm.integer(self._magnitude))
            )

        even = joined(wm.shift_left(word, 8), wm.shift_left(word, self._even_shift))
        return even, joined(word, wm.shift_right(word, self._odd_shift))

    def stage_heads(self, lane: wm.Lane, columns: list[list[Any]], staging: Any) -> None:
        """As `EntryTiles.stage_heads`: a lane has columns 2r and 2r + 1 of two heads, a word of each."""
        shape = self.shape
        chunk, within = wm.shift_right(lane.row, 2), wm.shift_left(wm.bit_and(lane.row, 3), 2)
        for odd in range(2):
            place = lane.place(wm.add(lane.column, odd), chunk)
            for block in range(shape.column_blocks):
                base = wm.add(wm.add(staging, block * 8 * shape.head_blocks * wm.ROW_BYTES), within)
                for n in range(shape.head_blocks):
                    for step in range(4 * block, min(4 * block + 4, shape.steps)):
                        c = columns[step][n]
                        wm.store_shared_word(
                            wm.chunk_address(base, place, 8 * n, 2 * (step % 4)),
                            wm.pack(c[odd], c[odd + 2], self.dtype),
                        )
