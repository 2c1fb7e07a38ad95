"""`layer_norm` and `layer_norm_backward` for Hopper, each in one pass over the rows.

Equations, per row with c = x - mean(x), r = 1 / sqrt(mean(c^2) + epsilon), n = r c, g = scale * dy:
    y = scale * n + bias
    dx = r (g - mean(g) - n mean(g n));  dscale = sum over rows of dy * n;  dbias = sum over rows of dy

Grid, blocks, loop: `narrow_rows`. Resident in the backward: the program's parts of dscale and dbias, float32, in
    registers; added over the rows of a group at the end, and over programs [programs, 2, D] by XLA, in one sum: so
    there are as many programs as run at a time, not more.
Bytes: x in, y out, once each; x and dy in, dx out, once each (dscale, dbias: a row for each program). Mean and r are
    not kept: both sums are over what the backward reads anyway. Bound: memory.
Benchmark: python -m benchmarks.rows.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import narrow_rows
from pallas_kernels.mosaic_gpu.narrow_rows import RowShape

CTAS = 1188  # of the forward: 9 for each multiprocessor of an H100
SETS = 1  # of the forward; 2 was timed only beside the host's own 0.1 ms a call, and was no slower
BACKWARD_CTAS = {3: 396, 4: 264}  # by blocks of a row, fewer: as 3; what registers leave room for on a multiprocessor

check_supported = functools.partial(narrow_rows.check_supported, "layer_norm")


# Jitted, so that the layers of an unrolled model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames=("epsilon", "sets", "interpret"))
@in_default_modes
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, sets: int = SETS, interpret: bool | None = None
) -> jax.Array:
    """y = LayerNorm(x).

    Args:
        x: [R, D]; bfloat16 or float16.
        scale, bias: [D] float32.
        epsilon: added to the variance.
        sets: see `RowShape`.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        [R, D] in x's dtype.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    check_supported(dtype=x.dtype, columns=x.shape[1])
    shape = RowShape(*x.shape, CTAS, sets)

    def body(x_ref, scale_ref, bias_ref, y_ref):
        def step(rows, carry):
            n, _ = _normed(shape, shape.load(x_ref, rows), epsilon)
            scale, bias = shape.load_vector(scale_ref), shape.load_vector(bias_ref)
            shape.store(y_ref, rows, parts=[s * a + b for s, a, b in zip(scale, n, bias, strict=True)])
            return carry

        shape.walk(lax.axis_index("program"), step, ())

    y = plgpu.kernel(body, out_type=shape.of_rows(x.dtype), **shape.options("moda_layer_norm", interpret))(
        *map(shape.view, (x, scale, bias))
    )
    return shape.flat(y)


# Jitted, so that the layers of an unrolled model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames=("epsilon", "programs", "interpret"))
@in_default_modes
def layer_norm_backward(
    x: jax.Array,
    dy: jax.Array,
    scale: jax.Array,
    *,
    epsilon: float,
    programs: int | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx, dscale, dbias) of `layer_norm`.

    Args:
        x, dy: [R, D]; bfloat16 or float16.
        scale: [D] float32.
        epsilon, interpret: as in `layer_norm`.
        programs: at most so many; None: `BACKWARD_CTAS`.

    Returns:
        dx in x's shape and dtype; dscale and dbias [D] float32, summed in the same order in every run.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    check_supported(dtype=x.dtype, columns=x.shape[1])
    blocks = RowShape(*x.shape, 1).blocks
    shape = RowShape(*x.shape, programs or BACKWARD_CTAS[max(blocks, 3)])

    def body(x_ref, dy_ref, scale_ref, dx_ref, sums_ref, dscale_smem, dbias_smem):
        program = lax.axis_index("program")

        def step(rows, sums):
            x, dy = shape.load(x_ref, rows), shape.load(dy_ref, rows)
            n, r = _normed(shape, x, epsilon)
            # Read again for every group: it is in the L1 cache, and in registers it would cost warps.
            g = [d * s for d, s in zip(dy, shape.load_vector(scale_ref), strict=True)]
            mean, along = shape.mean(g), shape.mean([a * b for a, b in zip(g, n, strict=True)])
            shape.store(dx_ref, rows, parts=[r * (a - mean - b * along) for a, b in zip(g, n, strict=True)])
            dscale, dbias = sums
            return (
                tuple(total + d * a for total, d, a in zip(dscale, dy, n, strict=True)),
                tuple(total + d for total, d in zip(dbias, dy, strict=True)),
            )

        dscale, dbias = shape.walk(program, step, (shape.zeros(), shape.zeros()))
        shape.store_sums(sums_ref, program, 0, sums=dscale, smem=dscale_smem)
        shape.store_sums(sums_ref, program, 1, sums=dbias, smem=dbias_smem)

    dx, sums = plgpu.kernel(
        body,
        out_type=(shape.of_rows(x.dtype), shape.of_sums(2)),
        scratch_types=dict(dscale_smem=shape.sums_scratch(), dbias_smem=shape.sums_scratch()),
        **shape.options("moda_layer_norm_backward", interpret),
    )(*map(shape.view, (x, dy, scale)))
    dscale, dbias = shape.totals(sums)
    return shape.flat(dx), dscale, dbias


def _normed(shape: RowShape, x: tuple[jax.Array, ...], epsilon: float) -> tuple[list[jax.Array], jax.Array]:
    """n, and r over the columns."""
    mean = shape.mean(x)
    centred = [a - mean for a in x]
    r = lax.rsqrt(shape.mean([a * a for a in centred]) + epsilon)
    return [a * r for a in centred], r
