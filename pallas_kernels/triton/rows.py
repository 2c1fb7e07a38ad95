"""What the kernels read and write: tiles of rows of H numbers, with zeros where there is nothing to read.

A row is a (token, query head) of a query-like array [B, T, N, H], a key index of [B, U, K, H] or a slot of
[B, T, S, K, H]. H need not be a power of two, but the tiles of Triton are: COLUMNS is the next one, and columns from H
on are read as zeros and not written. Addresses are an int64 start, one for the tile, and int32 offsets inside.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def offsets(row_offsets, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] int32 from [ROWS] offsets of the rows' first numbers."""
    return row_offsets[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def mask(exists, H: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] bool: an existing row's own columns."""
    existing = exists[:, None]
    if H != COLUMNS:
        existing = existing & (tl.arange(0, COLUMNS) < H)[None, :]
    return existing


@triton.jit
def load(start, row_offsets, exists, H: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile; zeros in rows that do not exist."""
    return tl.load(start + offsets(row_offsets, COLUMNS), mask(exists, H, COLUMNS), 0.0)


@triton.jit
def load_whole(start, row_offsets, H: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile all of whose rows exist."""
    if H == COLUMNS:
        tile = tl.load(start + offsets(row_offsets, COLUMNS))
    else:
        tile = tl.load(start + offsets(row_offsets, COLUMNS), (tl.arange(0, COLUMNS) < H)[None, :], 0.0)
    return tile


@triton.jit
def store(start, row_offsets, exists, tile, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes the existing rows of a tile, rounded to the array's dtype."""
    tl.store(start + offsets(row_offsets, COLUMNS), tile.to(start.dtype.element_ty), mask(exists, H, COLUMNS))


@triton.jit
def load_statistics(lse, delta, start, row_offsets, exists):
    """(lse in base 2, delta), [ROWS] float32. A row that saw nothing, or is not there: lse inf, so that every
    probability is 0, and delta 0, whatever it was."""
    natural = tl.load(lse + start + row_offsets, exists, float("-inf"))
    seen = natural != float("-inf")
    lse2 = tl.where(seen, natural * LOG2E, float("inf"))
    return lse2, tl.where(seen, tl.load(delta + start + row_offsets, exists, 0.0), 0.0)


@triton.jit
def store_rounded(out, rest, start, row_offsets, exists, tile, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a float32 tile to `out`, and what rounding took from it to `rest` unless that is None."""
    store(out + start, row_offsets, exists, tile, H, COLUMNS)
    if rest is not None:
        rounded = tile.to(out.dtype.element_ty).to(tl.float32)
        store(rest + start, row_offsets, exists, tile - rounded, H, COLUMNS)
