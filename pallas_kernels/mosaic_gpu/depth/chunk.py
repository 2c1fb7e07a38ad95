"""What the depth kernels share: how a chunk reaches shared memory, and the fragments that a warp makes of it.

Used by `depth/forward.py` and `depth/backward.py`, which explain the chunks, tiles and groups. Functions that take a
`wm.Lane` run inside `plgpu.inline_mgpu`, on the values of one thread; the others run in the kernel's body or around
the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.mosaic_gpu.depth import warp_mma as wm
from pallas_kernels.mosaic_gpu.depth.entry_tiles import EntryTiles
from pallas_kernels.mosaic_gpu.depth.tiles import (
    COLUMNS,
    THREADS,
    WARPS,
    DepthShape,
    DepthTiles,
    padded_group,
)
from pallas_kernels.operands import DepthKV

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
SCALAR = plgpu.Layout.WG_SPLAT(())


def registers(count: int) -> Any:
    """Layout of a [128 * count] array: every thread owns `count` numbers, which it carries through a loop."""
    return plgpu.Layout.WG_STRIDED((THREADS * count,), vec_size=1)


def thread_values(array: Any) -> list[Any]:
    """The float32 numbers that this thread owns in an array of layout `registers`."""
    position = ir.DenseI64ArrayAttr.get([0])
    return [vector.extract(v, dynamic_position=[], static_position=position) for v in array.registers.flat]


def thread_array(values: list[Any]) -> Any:
    """The reverse of `thread_values`."""
    one = ir.VectorType.get((1,), wm.f32())
    packed = np.empty((len(values),), dtype=object)
    packed[:] = [vector.broadcast(one, v) for v in values]
    return mgpu.FragmentedArray(_registers=packed, _layout=registers(len(values)).to_mgpu(), _is_signed=None)


def scalar(array: Any) -> Any:
    """MLIR value of a scalar argument of an inlined function."""
    return array.registers.item()


def flat(nested: Any) -> list[Any]:
    """The numbers of nested lists, in order."""
    return [x for part in nested for x in flat(part)] if isinstance(nested, (list, tuple)) else [nested]


def like(nested: Any, numbers: Any) -> Any:
    """The reverse of `flat`: `numbers` (an iterator) in the nesting of `nested`."""
    return [like(part, numbers) for part in nested] if isinstance(nested, (list, tuple)) else next(numbers)


def if_loaded(rows: int, block: int, first: Any, compute: Any, otherwise: list[Any]) -> list[Any]:
    """`compute()` unless the 16 rows of `block` all come before row `first`: those may not have been loaded."""
    if block == rows // 16 - 1:  # the last row is always a slot
        return compute()
    return wm.when(wm.less(first, 16 * (block + 1)), compute, otherwise)


def write_heads(
    lane: wm.Lane,
    entries: EntryTiles,
    columns: list[list[Any]],
    staging: Any,
    address: Any,
    tile: Any,
    added: Any,
) -> None:
    """Writes x^T, held as C fragments [step][head block] of [16 columns, 8 heads], to rows of a [rows, H] array.

    Args:
        entries: from whose products the fragments are.
        columns: float32 C fragments, `columns[step][head_block]`.
        staging: shared-memory address of this warp's [column_blocks, 8 * head_blocks, 64] scratch.
        address: global address of the array. added: of an array to add, or None.
        tile: index of the tile; tiles beyond the last one write nothing.
    """
    shape, dtype = entries.shape, entries.dtype
    block_rows = 8 * shape.head_blocks
    entries.stage_heads(lane, columns, staging)
    wm.warp_barrier()
    chunk = wm.bit_and(lane.lane, 7)
    in_range = wm.less(tile, shape.tiles)
    for block in range(shape.column_blocks):
        base = wm.add(staging, block * block_rows * wm.ROW_BYTES)
        for step in range(block_rows // 4):
            row = wm.add(wm.shift_right(lane.lane, 3), 4 * step)
            words = wm.load_shared_16_bytes(
                wm.add(wm.add(base, wm.shift_left(row, 7)), wm.shift_left(wm.bit_xor(chunk, wm.bit_and(row, 7)), 4))
            )
            column = wm.add(wm.shift_left(chunk, 3), COLUMNS * block)
            predicate = wm.both(in_range, wm.both(wm.less(row, shape.tile_heads), wm.less(column, shape.head_dim)))
            flat_row = wm.add(wm.multiply(tile, shape.tile_heads), row)
            offset = wm.shift_left(column, 1)

            def place_in(array: Any, flat_row: Any = flat_row, offset: Any = offset) -> Any:
                return wm.advance(wm.advance(array, flat_row, 2 * shape.head_dim), offset, 1)

            if added is not None:
                other = wm.load_global_16_bytes(place_in(added), predicate)
                sums = []
                for mine, theirs in zip(words, other, strict=True):
                    x, y = wm.unpack(mine, dtype), wm.unpack(theirs, dtype)
                    sums.append(wm.pack(wm.arith.addf(x[0], y[0]), wm.arith.addf(x[1], y[1]), dtype))
                words = sums
            wm.store_global_16_bytes(place_in(address), words, predicate)


def window_operand(depth: DepthKV) -> jax.Array:
    """int32 [length], or [length, start] of a window that does not begin at slot 0, or [length, start, deferred]."""
    length = jnp.asarray(depth.slots if depth.length is None else depth.length, jnp.int32)
    if depth.start is None and depth.deferred is None:
        return length.reshape(1)
    start = jnp.minimum(jnp.asarray(0 if depth.start is None else depth.start, jnp.int32), length)
    if depth.deferred is None:
        return jnp.stack([length, start])
    return jnp.stack([length, start, jnp.asarray(depth.deferred, jnp.int32)])


class Window:
    """The seen slots [start, length), as a kernel's body knows them; those before `deferred` get no gradient yet."""

    def __init__(self, ref: Any) -> None:
        self.length = ref[0]
        self.start = ref[1] if ref.shape[0] >= 2 else None
        self.count = self.length if self.start is None else self.length - self.start
        self.deferred = ref[2] if ref.shape[0] == 3 else None

    def hidden_rows(self, slot: jax.Array, slot_offset: int) -> jax.Array:
        """How many leading rows of a chunk are no seen slots. slot: of row 0; slot_offset: of slot 0 in the array."""
        first = slot_offset if self.start is None else self.start + slot_offset
        return lax.max(first - slot, 0)

    def waiting_rows(self, slot: jax.Array, slot_offset: int, rows: int) -> jax.Array:
        """How many leading rows of a chunk of `rows` get no gradient: the hidden ones, and those that are deferred."""
        hidden = self.hidden_rows(slot, slot_offset)
        if self.deferred is None:
            return hidden
        return lax.min(lax.max(hidden, self.deferred + slot_offset - slot), rows)


def group_queries(shape: DepthShape, staged: jax.Array) -> jax.Array:
    """[column_blocks, query_rows, 64] -> [4, tile_heads, columns]."""
    flat = jnp.swapaxes(staged, 0, 1).reshape(staged.shape[1], -1)
    return flat[: WARPS * shape.tile_heads].reshape(WARPS, shape.tile_heads, -1)


def group_tiles(staged: jax.Array) -> jax.Array:
    """[4, column_blocks, rows, 64] -> [4, rows, columns]."""
    return jnp.swapaxes(staged, 1, 2).reshape(staged.shape[0], staged.shape[2], -1)


def filled_rows(tiles: jax.Array, first: jax.Array, dtype: Any) -> jax.Array:
    """[4, rows, columns] in `dtype`, with zeros before row `first`: not all of those were loaded."""
    return jnp.where(jnp.arange(tiles.shape[1])[:, None] >= first, tiles.astype(dtype), 0)


def depth_boxes(shape: DepthShape, group: jax.Array, column: jax.Array) -> Iterator[tuple[int, int, Any]]:
    """(warp, column block, function of (first slot, slots): index into [B*T, S, K, H]) of the four tiles of a group."""
    for warp in range(WARPS):
        tile = lax.div(group * WARPS + warp, shape.tiles_per_kv_head)
        token = lax.div(tile, shape.num_kv_heads)
        head = tile - token * shape.num_kv_heads
        for c in range(shape.column_blocks):
            columns = pl.ds(column + c * COLUMNS, COLUMNS)
            yield warp, c, lambda slot, count, at=(token, head, columns): (at[0], pl.ds(slot, count), *at[1:])


def box_sizes(rows: int, windowed: bool) -> list[int]:
    """Slots of the boxes in which a chunk of `rows` may be copied: all, or the last half, quarter, ... of them.

    With a window that has a start the smallest has 8: what it hides is cleared after loading. Else zeros have to fill
    the 16 rows of an mma, and the smallest has 16.
    """
    smallest, sizes = 8 if windowed else 16, [rows]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return sizes


def load_chunk(load: Any, rows: int, first: jax.Array, windowed: bool) -> None:
    """Runs `load(size)`, which copies the last `size` slots of a chunk of `rows`, for the smallest box that holds the
    seen ones; the rows before it are left alone.

    One thread issues all copies: the size is chosen once for all of them.

    Args:
        first: the first row that is a seen slot. windowed: see `box_sizes`.
    """
    sizes = box_sizes(rows, windowed)
    for size in sizes:
        wanted = first >= rows - size
        if size != sizes[-1]:
            wanted = jnp.logical_and(wanted, first < rows - size // 2)
        if len(sizes) == 1:
            load(size)
        else:
            pl.when(wanted)(functools.partial(load, size))


def last_rows(tile: Any, rows: int, size: int) -> Any:
    """The last `size` rows of a reference to a tile of `rows`."""
    return tile if size == rows else tile.at[pl.ds(rows - size, size)]


def pad_for_interpreter(
    shape: DepthShape, tiles: DepthTiles, queries: list[jax.Array], depth: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What TMA does with out-of-range boxes on the chip: zeros around q [rows, H] and around depth arrays [B*T, S, K,
        H].

    `rows` zero slots stand in front of slot 0, so that a chunk may start there.
    """
    columns = shape.column_blocks * COLUMNS - shape.head_dim
    last_tile = shape.groups * WARPS
    rows = last_tile * shape.tile_heads + shape.query_rows - queries[0].shape[0]
    tokens = -(-last_tile // (shape.num_kv_heads * shape.tiles_per_kv_head)) - shape.tokens
    queries = [jnp.pad(x, ((0, rows), (0, columns))) for x in queries]
    return queries, [jnp.pad(x, ((0, tokens), (tiles.rows, tiles.rows), (0, 0), (0, columns))) for x in depth]


def pad_group(x: jax.Array, num_kv_heads: int, most: int) -> jax.Array:
    """[B, T, N, ...] with zero query heads added to every KV head, up to `padded_group`; most: heads of a tile."""
    group_size = x.shape[2] // num_kv_heads
    parts = x.reshape(*x.shape[:2], num_kv_heads, group_size, *x.shape[3:])
    missing = padded_group(group_size, most) - group_size
    parts = jnp.pad(parts, ((0, 0),) * 3 + ((0, missing),) + ((0, 0),) * (x.ndim - 3))
    return parts.reshape(*x.shape[:2], -1, *x.shape[3:])


def unpad_group(x: jax.Array, num_kv_heads: int, group_size: int) -> jax.Array:
    """The reverse of `pad_group`."""
    parts = x.reshape(*x.shape[:2], num_kv_heads, -1, *x.shape[3:])[:, :, :, :group_size]
    return parts.reshape(*x.shape[:2], -1, *x.shape[3:])


def compiler_params() -> plgpu.CompilerParams:
    """Lane semantics: inlined functions see threads. Barriers are placed by hand (`commit_smem` before a refill)."""
    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )
