"""`gelu_backward`: the gradient of `gelu(x + bias)` and of the bias, for Hopper, in one pass.

Equations, with a = x + bias, Phi and phi the normal distribution and its density:
    dx = dy (Phi(a) + a phi(a));  dbias = sum over rows of dx

Grid: (programs, chunks of the columns). Blocks, loop: `narrow_rows`, of a chunk's columns. Resident: the program's part
    of dbias, float32, in registers; added over the rows of a group at the end, and over programs [programs, F] by XLA.
Bytes: x and dy in, dx out, once each. Instructions: about 28 a number (`normal_distribution`). Bound: memory.
Benchmark: python -m benchmarks.rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import narrow_rows
from pallas_kernels.mosaic_gpu.narrow_rows import LANE_COLUMNS, LANES, MAX_BLOCKS, RowShape
from pallas_kernels.normal_distribution import below_and_density

CTAS = 528  # 4 for each multiprocessor of an H100, as many as run at a time: XLA adds up a row of sums for each


def check_supported(*, dtype: jnp.dtype, columns: int) -> None:
    """Raises NotImplementedError, with the reason, if the kernel does not take such rows; as in `narrow_rows`."""
    narrow_rows.check_supported("gelu_backward", dtype=dtype, columns=LANE_COLUMNS * LANES[0])
    if not columns or columns % (LANE_COLUMNS * LANES[0]):
        raise NotImplementedError(f"gelu_backward: {columns} columns: expected a multiple of {LANE_COLUMNS * LANES[0]}")


def _chunk(columns: int) -> int:
    """Columns that a program takes: as many lanes a row, and then as many blocks, as divide them."""
    block = next(LANE_COLUMNS * n for n in reversed(LANES) if columns % (LANE_COLUMNS * n) == 0)
    return block * next(n for n in range(MAX_BLOCKS, 0, -1) if columns // block % n == 0)


# Jitted, so that the layers of an unrolled model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames="interpret")
@in_default_modes
def gelu_backward(
    x: jax.Array, bias: jax.Array, dy: jax.Array, *, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """(dx, dbias) of `gelu(x + bias)`.

    Args:
        x, dy: [R, F]; bfloat16 or float16.
        bias: [F] float32.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        dx in x's shape and dtype; dbias [F] float32, summed in the same order in every run.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    rows, columns = x.shape
    check_supported(dtype=x.dtype, columns=columns)
    chunk = _chunk(columns)
    chunks = columns // chunk
    shape = RowShape(rows, chunk, max(CTAS // chunks, 1))

    def view(array: jax.Array) -> jax.Array:
        array = array.reshape(*array.shape[:-1], chunks, shape.blocks, shape.block)
        if array.ndim == 3 or shape.padded == rows:
            return array
        return jnp.pad(array, ((0, shape.padded - rows), *((0, 0),) * 3))

    def body(x_ref, bias_ref, dy_ref, dx_ref, dbias_ref, smem):
        program, at = lax.axis_index("program"), lax.axis_index("chunk")

        def step(rows, sums):
            x, dy, bias = shape.load(x_ref, rows, at), shape.load(dy_ref, rows, at), shape.load_vector(bias_ref, at)
            dx = [d * _slope(a + b, x_ref.dtype) for a, b, d in zip(x, bias, dy, strict=True)]
            shape.store(dx_ref, rows, at, parts=dx)
            return tuple(total + d for total, d in zip(sums, dx, strict=True))

        sums = shape.walk(program, step, shape.zeros())
        shape.store_sums(dbias_ref, program, at, sums=sums, smem=smem)

    options = shape.options("moda_gelu_backward", interpret, approximate=True)
    dx, dbias = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((shape.padded, chunks, shape.blocks, shape.block), x.dtype),
            jax.ShapeDtypeStruct((shape.programs, chunks, shape.blocks, shape.block), jnp.float32),
        ),
        scratch_types=dict(smem=shape.sums_scratch()),
        **options | {"grid": (shape.programs, chunks), "grid_names": ("program", "chunk")},
    )(view(x), view(bias), view(dy))
    return dx.reshape(shape.padded, columns)[:rows], jnp.sum(dbias, axis=0).reshape(columns)


def _slope(a: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """d (a Phi(a)) / da."""
    below, density = below_and_density(a, dtype)
    return below + a * density
