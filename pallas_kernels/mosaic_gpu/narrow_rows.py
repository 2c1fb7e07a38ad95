"""How kernels that go over rows lie on the chip, row by row and in one pass: lanes of one warp share a row.

A program of one warpgroup takes groups of rows. A lane holds 8 columns of a block; 8, 16 or 32 lanes hold a block of a
row, and the other lanes of the warp other rows: rows of 192 columns are 3 blocks of 8 lanes, 4 rows a warp. So sums
over a row stay inside a warp, every load is of 16 bytes a lane and of at least 128 a row, and no lane idles. All of it
is bound by memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import warpgroup as wg_lib

DTYPES = ("bfloat16", "float16")
WARPS = 4
LANE_COLUMNS = 8  # of a lane and a block: 16 bytes
MAX_BLOCKS = 4  # a lane then holds 32 numbers of a row, and as many of everything that goes with it
LANES = (8, 16, 32)  # of a row


def check_supported(name: str, *, dtype: jnp.dtype, columns: int) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such rows.

    Args:
        name: of the operation.
        dtype: of the rows.
        columns: of a row.
    """
    kind = jnp.dtype(dtype).name
    if kind not in DTYPES:
        raise NotImplementedError(f"{name}: dtype={kind}: expected {' or '.join(DTYPES)}")
    if _lanes(columns) is None:
        sizes = ", ".join(str(LANE_COLUMNS * lanes) for lanes in LANES)
        raise NotImplementedError(f"{name}: {columns} columns: expected 1 to {MAX_BLOCKS} times one of {sizes}")


def _lanes(columns: int) -> int | None:
    """Of a row: as many as leave none idle, so that a lane holds few of its numbers."""
    fitting = [n for n in LANES if columns % (LANE_COLUMNS * n) == 0 and columns <= MAX_BLOCKS * LANE_COLUMNS * n]
    return fitting[-1] if fitting and columns else None


class RowShape:
    """How [R, D] lies on programs, warps and lanes.

    Attributes:
        rows, padded, columns: R, that rounded up to whole groups, and D.
        group: rows of a program at a time.
        block, blocks: columns of a block; blocks of a row.
        groups, programs: of rows; that share the groups.
        layout: of [group, block] over the warps and their lanes.
    """

    def __init__(self, rows: int, columns: int, most: int, sets: int = 1) -> None:
        """sets: rows that a lane has a part of at a time, so that as many loads are in flight."""
        lanes = _lanes(columns)
        if lanes is None:
            raise NotImplementedError(f"{columns} columns")
        of_warp = 32 // lanes
        at_once = WARPS * of_warp
        self.rows, self.columns = rows, columns
        self.group = at_once * sets
        self.padded = rows + -rows % self.group
        self.block = LANE_COLUMNS * lanes
        self.blocks = columns // self.block
        self.groups = self.padded // self.group
        self.programs = min(most, self.groups)
        tiling = fragmented_array.Tiling(((at_once, self.block), (of_warp, self.block), (LANE_COLUMNS,)))
        if of_warp == 1:
            self.layout = plgpu.Layout.TILED(
                fragmented_array.Tiling(((at_once, self.block), (LANE_COLUMNS,))), (-3,), (-2,), -1
            )
        else:
            self.layout = plgpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)

    def view(self, array: jax.Array) -> jax.Array:
        """[R, D] or [D] with its columns as [blocks, block], and with whole groups of rows."""
        array = array.reshape(*array.shape[:-1], self.blocks, self.block)
        if array.ndim == 2 or self.padded == self.rows:
            return array
        return jnp.pad(array, ((0, self.padded - self.rows), (0, 0), (0, 0)))

    def of_rows(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """A result like the rows."""
        return jax.ShapeDtypeStruct((self.padded, self.blocks, self.block), dtype)

    def of_sums(self, number: int) -> jax.ShapeDtypeStruct:
        """So many results of `store_sums`, of one program beside each other."""
        return jax.ShapeDtypeStruct((self.programs, number, self.blocks, self.block), jnp.float32)

    def sums_scratch(self) -> plgpu.SMEM:
        """What `store_sums` needs."""
        return plgpu.SMEM((self.blocks, self.group, self.block), jnp.float32)

    def flat(self, array: jax.Array) -> jax.Array:
        """A result like the rows as [R, D]."""
        return array.reshape(self.padded, self.columns)[: self.rows]

    def totals(self, sums: jax.Array) -> jax.Array:
        """The results of `store_sums` over all programs, in one sum: [number, D] float32."""
        return jnp.sum(sums.reshape(self.programs, -1), axis=0).reshape(-1, self.columns)

    def options(self, name: str, interpret: bool | None, *, approximate: bool = False) -> dict:
        """Of `plgpu.kernel`. approximate: exponentials are the hardware's."""
        interpret = wg_lib.default_interpret() if interpret is None else interpret
        return {
            "grid": (self.programs,), "grid_names": ("program",),
            "compiler_params": plgpu.CompilerParams(
                approx_math=approximate,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
                unsafe_no_auto_barriers=True,  # the one place that is read after it was written has a barrier
            ),
            "interpret": wg_lib.interpret_params(interpret),
            "kernel_name": f"{name}_R{self.rows}_D{self.columns}",
        }  # fmt: skip

    # In a kernel: a row is a tuple of its blocks, [group, block] float32 each.

    def zeros(self) -> tuple[jax.Array, ...]:
        """Of all columns."""
        return tuple(wg_lib.full((self.group, self.block), 0.0, self.layout) for _ in range(self.blocks))

    def load(self, ref, *index) -> tuple[jax.Array, ...]:
        """Rows of a [R, blocks, block]. index: the rows, and what else stands before the blocks."""
        parts = (plgpu.load(ref.at[(*index, i)], layout=self.layout, optimized=False) for i in range(self.blocks))
        return tuple(part.astype(jnp.float32) for part in parts)

    def load_vector(self, ref, *index) -> tuple[jax.Array, ...]:
        """A [blocks, block], the same for every row. index: what stands before the blocks."""
        columns = self.layout.reduce(0)
        return tuple(
            self._spread(plgpu.load(ref.at[(*index, i)], layout=columns, optimized=False), 1)
            for i in range(self.blocks)
        )

    def store(self, ref, *index, parts) -> None:
        """Rows of a [R, blocks, block], rounded to its dtype. index: as of `load`."""
        for i, part in enumerate(parts):
            ref[(*index, i)] = part.astype(ref.dtype)

    def mean(self, parts) -> jax.Array:
        """Of every row, over its columns: [group, block]."""
        return self._spread(jnp.sum(functools.reduce(jnp.add, parts), axis=1) / self.columns, 0)

    def walk(self, program, step: Callable, carry):
        """carry = step(rows of the group, carry), over the program's groups."""

        def one(i, carry):
            return step(pl.ds(self.group * (program + i * self.programs), self.group), carry)

        return lax.fori_loop(0, lax.div(self.groups - program + self.programs - 1, self.programs), one, carry)

    def store_sums(self, ref, *index, sums, smem) -> None:
        """Sums of a program's rows, by their places in the group, added and stored. A second one needs another smem."""
        for i, part in enumerate(sums):
            smem[i] = part
        plgpu.commit_smem()  # also a barrier
        columns = self.layout.reduce(0)
        for i in range(self.blocks):
            rows = [plgpu.load(smem.at[i, row], layout=columns, optimized=False) for row in range(self.group)]
            ref[(*index, i)] = functools.reduce(jnp.add, rows)

    def _spread(self, array, dimension: int) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(array, (self.group, self.block), (dimension,)), self.layout)
