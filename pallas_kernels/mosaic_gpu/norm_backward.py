"""`rms_norm_backward`: RMSNorm's gradient, also of one whose result was rotated (RoPE), for Hopper.

Equation, per row with mean square 1 / r^2 (epsilon in it), n = r x and g = scale * unrotated dy:
    dx = r (g - n mean(g n));  dscale = sum over rows of (unrotated dy) * n

Grid: at most `CTAS` programs of one warpgroup; a program takes every CTAS-th group of 4 rows.
Blocks: a warp owns a row of the group, a lane 8 columns out of every 256; sums over a row stay inside the warp, so no
    warp waits for another. With a rotation a row is [heads, 2, H/2] and its two halves are loaded apart: the partners
    of a pair then meet in one lane.
Loop: over groups of rows. Resident: the row's x and dy, and the warp's part of dscale, float32, in registers; the four
    parts are added at the end, and the programs' rows [programs, columns] by XLA.
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
ROWS = 4  # of a program at a time, one for each warp
LANE_COLUMNS = 8  # of a lane: 16 bytes
BLOCK_COLUMNS = 32 * LANE_COLUMNS  # of a warp
MAX_COLUMNS = 1024  # a lane then holds 32 numbers each of x, dy, scale and dscale


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
    if columns > MAX_COLUMNS:
        raise NotImplementedError(f"rms_norm_backward: {columns} columns: expected at most {MAX_COLUMNS}")
    unit = BLOCK_COLUMNS if rotated_dim is None else 2 * BLOCK_COLUMNS
    if columns % unit:
        raise NotImplementedError(f"rms_norm_backward: {columns} columns: expected a multiple of {unit}")
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
    padded = rows + -rows % ROWS
    programs = min(CTAS, padded // ROWS)
    if rotation is None:
        view, parts, piece = (columns // BLOCK_COLUMNS, BLOCK_COLUMNS), 1, (BLOCK_COLUMNS,)
        layout = plgpu.Layout.TILED(fragmented_array.Tiling(((ROWS, BLOCK_COLUMNS), (LANE_COLUMNS,))), (-3,), (-2,), -1)
    else:
        half = shape[-1] // 2
        heads = BLOCK_COLUMNS // half  # of a block
        view, parts, piece = (shape[0] // heads, heads, 2, half), 2, (heads, half)
        layout = plgpu.Layout.TILED(
            fragmented_array.Tiling(((ROWS, heads, half), (LANE_COLUMNS,))), (-4,), (-3, -2), -1
        )

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, padded - rows), *((0, 0),) * (array.ndim - 1)))

    body = functools.partial(
        _body, view=view, parts=parts, layout=layout, groups=padded // ROWS, programs=programs, columns=columns,
        epsilon=epsilon,
    )  # fmt: skip
    tables = () if rotation is None else tuple(pad(table) for table in rotation)
    dx, dscale = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((padded, *view), x.dtype),
            jax.ShapeDtypeStruct((programs, parts * view[0], *piece), jnp.float32),
        ),
        scratch_types=dict(sums_smem=plgpu.SMEM((parts * view[0], ROWS, *piece), jnp.float32)),
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
    x_ref, dy_ref, scale_ref, *refs, sums_smem, view, parts, layout, groups, programs, columns, epsilon
):  # fmt: skip
    """The kernel. A "piece" is what a program holds of a block's half (or whole, unrotated): [ROWS, *piece]."""
    *tables, dx_ref, dscale_ref = refs
    program = lax.axis_index("program")
    pieces = [(block, part) for block in range(view[0]) for part in range(parts)]
    piece_shape = (ROWS, view[1]) if parts == 1 else (ROWS, view[1], view[3])

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
        rows = pl.ds(ROWS * (program + i * programs), ROWS)
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
    flat = plgpu.Layout.WG_STRIDED(piece_shape[1:], vec_size=BLOCK_COLUMNS // 128)
    for i in range(len(pieces)):
        warps = [plgpu.load(sums_smem.at[i, warp], layout=flat) for warp in range(ROWS)]
        dscale_ref[program, i] = functools.reduce(jnp.add, warps)
