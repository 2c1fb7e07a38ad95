"""`rms_norm_backward`: RMSNorm's gradient, also of one whose result was rotated (RoPE), for Hopper.

Equation, per row with mean square 1 / r^2 (epsilon in it), n = r x and g = scale * unrotated dy:
    dx = r (g - n mean(g n));  dscale = sum over rows of (unrotated dy) * n

Grid: at most `CTAS` programs of one warpgroup; a program takes every CTAS-th group of rows.
Blocks: a lane owns 8 columns of every block of a row; see `Rows`. Up to 1024 columns lanes of one warp share a row, so
    that sums over a row stay inside the warp and no warp waits for another; wider rows are the whole warpgroup's. With
    a rotation a row is [heads, 2, H/2] and its two halves are loaded apart: the partners of a pair then meet in one
    lane.
Loop: over groups of rows. Resident: the row's x and dy, and the lanes' part of dscale, float32, in registers; those of
    the rows of a group are added at the end, and the programs' rows [programs, columns] by XLA.
Bytes: x and dy in, dx out, once each (dscale: a row for each program). Bound: memory. 32768 x 1024 in bfloat16 on an
    H100: 68 us, 3.0 TB/s (rotated, 16 heads of 64: 73); XLA, which reads x and dy twice, in two kernels: 182 (186).
Benchmark: python -m benchmarks.training, "elementwise, norms, rotary".
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib

CTAS = 1188  # 9 for each multiprocessor of an H100, of which 3 run at a time (168 registers a thread)
LANES = 128  # of a program
LANE_COLUMNS = 8  # of a lane: 16 bytes
MAX_COLUMNS = 8192  # a lane then holds 64 numbers each of x, dy and dscale
MAX_BLOCKS = 4  # of a row that lanes of one warp share: 32 numbers of each


class Rows:
    """How rows lie on the lanes of a program.

    Attributes:
        lanes: that share a row: 8, 16, 32 or all 128.
        group: rows of a program at a time.
        block: columns of a row that its lanes hold side by side.
    """

    def __init__(self, columns: int, rotated: bool) -> None:
        self.lanes = _lanes(columns, rotated)
        self.group = LANES // self.lanes
        self.block = LANE_COLUMNS * self.lanes

    def layout(self, *piece: int) -> plgpu.Layout:
        """Of [group, *piece], a piece being a block [block], or [heads, H/2] of the same size."""
        if self.lanes == LANES:  # over the warps, and then over the lanes of each
            tiles = (1, *piece), (piece[0] // 4, *piece[1:]), (LANE_COLUMNS,)
            warps, lanes = ((-3,), (-2,)) if len(piece) == 1 else ((-5,), (-3, -2))
        elif self.lanes == 32:  # a warp for each row
            tiles = (self.group, *piece), (LANE_COLUMNS,)
            warps, lanes = ((-3,), (-2,)) if len(piece) == 1 else ((-4,), (-3, -2))
        else:
            tiles = (self.group, *piece), (32 // self.lanes, *piece), (LANE_COLUMNS,)
            warps, lanes = (-5,), (-3, -2)
        return plgpu.Layout.TILED(fragmented_array.Tiling(tiles), warps, lanes, -1)


def _lanes(columns: int, rotated: bool) -> int | None:
    """Of a row: as many of one warp as it fills, so that each holds few of its numbers; else all. None: no number."""
    halves = 2 if rotated else 1
    for lanes in (32,) if rotated else (32, 16, 8):
        block = lanes * LANE_COLUMNS
        if columns and columns % (halves * block) == 0 and columns <= MAX_BLOCKS * block:
            return lanes
    return LANES if columns and columns % (halves * LANES * LANE_COLUMNS) == 0 and columns <= MAX_COLUMNS else None


def check_supported(*, dtype: jnp.dtype, columns: int, rotated_dim: int | None = None) -> None:
    """Raises NotImplementedError, with the reason, if the kernel does not take such rows.

    Args:
        dtype: of x and dy.
        columns: of a row.
        rotated_dim: H of the heads that were rotated; None: nothing was.
    """
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"rms_norm_backward: dtype={name}: expected bfloat16 or float16")
    if _lanes(columns, rotated_dim is not None) is None:
        sizes = (
            "512 or 1024, or a multiple of 2048"
            if rotated_dim is not None
            else (f"1 to {MAX_BLOCKS} times 64, 128 or 256, or a multiple of 1024")
        )
        raise NotImplementedError(f"rms_norm_backward: {columns} columns: expected {sizes} up to {MAX_COLUMNS}")
    if rotated_dim is not None and rotated_dim not in (32, 64, 128, 256):
        raise NotImplementedError(f"rms_norm_backward: head_dim={rotated_dim}: expected 32, 64, 128 or 256")


@in_default_modes
def rms_norm_backward(
    x: jax.Array,
    dy: jax.Array,
    scale: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    *,
    epsilon: float,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(dx, dscale) of y = RMSNorm(x), or of y = that rotated.

    Args:
        x, dy: [R, D], or with a rotation [R, heads, H]; bfloat16 or float16.
        scale: [D], or [heads, H]; float32.
        rotation: cos and sin of the pairs' angles, [R, H/2] float32 each; None: y was not rotated.
        epsilon: added to the mean square.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        dx in x's shape and dtype; dscale in scale's shape, float32.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    interpret = wg_lib.default_interpret() if interpret is None else interpret
    rows, *shape = x.shape
    columns = scale.size
    check_supported(dtype=x.dtype, columns=columns, rotated_dim=None if rotation is None else shape[-1])
    lie = Rows(columns, rotation is not None)
    padded = rows + -rows % lie.group
    programs = min(CTAS, padded // lie.group)
    if rotation is None:
        view, parts, piece = (columns // lie.block, lie.block), 1, (lie.block,)
    else:
        half = shape[-1] // 2
        heads = lie.block // half  # of a block
        view, parts, piece = (shape[0] // heads, heads, 2, half), 2, (heads, half)

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, padded - rows), *((0, 0),) * (array.ndim - 1)))

    body = functools.partial(
        _body, view=view, parts=parts, lie=lie, groups=padded // lie.group, programs=programs, columns=columns,
        epsilon=epsilon,
    )  # fmt: skip
    tables = () if rotation is None else tuple(pad(table) for table in rotation)
    dx, dscale = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((padded, *view), x.dtype),
            jax.ShapeDtypeStruct((programs, parts * view[0], *piece), jnp.float32),
        ),
        scratch_types=dict(sums_smem=plgpu.SMEM((parts * view[0], lie.group, *piece), jnp.float32)),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # the one place that is read after it was written has a barrier
        ),
        interpret=wg_lib.interpret_params(interpret),
        kernel_name=f"moda_rms_norm_backward_R{rows}_D{columns}" + ("" if rotation is None else f"_H{shape[-1]}"),
    )(pad(x).reshape(padded, *view), pad(dy).reshape(padded, *view), scale.reshape(view), *tables)
    dscale = jnp.sum(dscale, axis=0).reshape(view[0], parts, *piece)
    if rotation is not None:  # halves apart, to heads of two halves
        dscale = dscale.swapaxes(1, 2)
    return dx[:rows].reshape(x.shape), dscale.reshape(scale.shape)


def _body(
    x_ref, dy_ref, scale_ref, *refs, sums_smem, view, parts, lie, groups, programs, columns, epsilon
):  # fmt: skip
    """The kernel. A "piece" is what a program holds of a block's half (or whole, unrotated): [group, *piece]."""
    *tables, dx_ref, dscale_ref = refs
    program = lax.axis_index("program")
    pieces = [(block, part) for block in range(view[0]) for part in range(parts)]
    piece_shape = (lie.group, view[1]) if parts == 1 else (lie.group, view[1], view[3])
    layout = lie.layout(*piece_shape[1:])

    def at(piece):
        """A piece's place behind the rows."""
        block, part = piece
        return (block,) if parts == 1 else (block, slice(None), part)

    def load(ref, index, layout=layout):
        return plgpu.load(ref.at[index], layout=layout, optimized=False).astype(jnp.float32)

    def spread(array, *dimensions):
        """An array over some dimensions of a piece, over all of them."""
        return plgpu.layout_cast(lax.broadcast_in_dim(array, piece_shape, dimensions), layout)

    def row_sum(terms):
        """The sum of the pieces' products over each row: [ROWS]."""
        total = functools.reduce(jnp.add, terms)
        for axis in reversed(range(1, total.ndim)):
            total = jnp.sum(total, axis=axis)
        return total

    def step(i, sums):
        rows = pl.ds(lie.group * (program + i * programs), lie.group)
        # Read again for every row: it is in the L1 cache, and in registers it would cost a third of the warps.
        scale = [spread(load(scale_ref, at(p), layout.reduce(0)), *range(1, len(piece_shape))) for p in pieces]
        x = [load(x_ref, (rows, *at(p))) for p in pieces]
        dy = [load(dy_ref, (rows, *at(p))) for p in pieces]
        if tables:
            cos, sin = (spread(load(table, (rows,), layout.reduce(1)), 0, 2) for table in tables)
            turned = [(a * cos + b * sin, b * cos - a * sin) for a, b in zip(dy[::2], dy[1::2], strict=True)]
            dy = [half for pair in turned for half in pair]
        inverse_rms = lax.rsqrt(row_sum([a * a for a in x]) / columns + epsilon)
        mean = row_sum([d * s * a for a, d, s in zip(x, dy, scale, strict=True)]) / columns
        r, factor = spread(inverse_rms, 0), spread(mean * inverse_rms * inverse_rms, 0)
        for p, a, d, s in zip(pieces, x, dy, scale, strict=True):
            dx_ref[(rows, *at(p))] = (r * (d * s - a * factor)).astype(dx_ref.dtype)
        return tuple(total + d * (a * r) for total, a, d in zip(sums, x, dy, strict=True))

    zeros = tuple(wg_lib.full(piece_shape, 0.0, layout) for _ in pieces)
    sums = lax.fori_loop(0, lax.div(groups - program + programs - 1, programs), step, zeros)
    for i, total in enumerate(sums):
        sums_smem[i] = total
    plgpu.commit_smem()  # also a barrier
    # What a lane had of every row, or where a row fills the warpgroup evenly: the lanes side by side.
    fills = lie.block % LANES == 0
    flat = plgpu.Layout.WG_STRIDED(piece_shape[1:], vec_size=lie.block // LANES) if fills else layout.reduce(0)
    for i in range(len(pieces)):
        rows = [plgpu.load(sums_smem.at[i, row], layout=flat, optimized=fills) for row in range(lie.group)]
        dscale_ref[program, i] = functools.reduce(jnp.add, rows)
