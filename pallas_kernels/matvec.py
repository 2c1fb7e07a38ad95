"""The products of a decode step, with what stands before and behind them: the choice between the kernel and XLA.

    x' = x [+ add]  or  x + norm(add);   h = x'  or  norm(x');   a = h matrix^T
    of the first 2F outputs, gate and up:  silu(gate) * up

norm is the RMSNorm `scale * z / sqrt(mean(z^2) + epsilon)`. A step of one row is bound by reading the matrices, and by
the launches around it: the kernel is one launch and one stream of the matrix.

Axes: B rows, D inputs, O outputs, F gated ones.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch, norm

IMPLEMENTATIONS = ("xla", "mosaic_gpu")


class Results(NamedTuple):
    """Of `matvec`.

    Attributes:
        total: x', [B, D].
        gated: silu(gate) * up, [B, F]; None: F is 0.
        outputs: the others, [B, O - 2F]; None: there are none.
    """

    total: Array
    gated: Array | None
    outputs: Array | None


def matvec(
    x: Array,
    matrix: Array,
    add: Array | None = None,
    add_scale: Array | None = None,
    input_scale: Array | None = None,
    *,
    gated: int = 0,
    epsilon: float = 0.0,
    implementation: str | None = None,
) -> Results:
    """See the equations above.

    Args:
        x: [B, D], any float dtype. x', the norms' results and the outputs are rounded to it; sums are in float32.
        matrix: [O, D] of that dtype: a row for each output.
        add: [B, D] of that dtype; None: x' = x.
        add_scale: [D] float32, of its norm; None: it is added as it is.
        input_scale: [D] float32, of the norm of x'; None: h = x'.
        gated: F.
        epsilon: of the norms.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such a product.
    """
    (rows, inputs), outputs = x.shape, matrix.shape[0]
    if implementation is None:
        implementation = _best(x.dtype, rows, inputs, outputs, gated)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return xla_matvec(x, matrix, add, add_scale, input_scale, gated=gated, epsilon=epsilon)
    _kernel().check_supported(dtype=x.dtype, rows=rows, inputs=inputs, outputs=outputs, gated=gated)
    found = _kernel().matvec(
        x[0], matrix, None if add is None else add[0], add_scale, input_scale, gated=gated, epsilon=epsilon
    )
    return Results(*(None if array is None else array[None] for array in found))


@functools.cache
def _best(dtype: jnp.dtype, rows: int, inputs: int, outputs: int, gated: int) -> str:
    def check() -> None:
        _kernel().check_supported(dtype=dtype, rows=rows, inputs=inputs, outputs=outputs, gated=gated)

    return dispatch.best_for_rows("products of a decode step", check)


def _kernel() -> ModuleType:
    """Imported when it is wanted, as `dispatch` does: not every installation of JAX can."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.matvec")


def xla_matvec(
    x: Array,
    matrix: Array,
    add: Array | None,
    add_scale: Array | None,
    input_scale: Array | None,
    *,
    gated: int,
    epsilon: float,
) -> Results:
    """The same by XLA, for any rows."""
    if add is not None:
        x = x + (add if add_scale is None else _normed(add, add_scale, epsilon))
    found = product(x if input_scale is None else _normed(x, input_scale, epsilon), matrix)
    if not gated:
        return Results(x, None, found)
    rest = found[:, 2 * gated :]
    return Results(x, gate(found, gated), rest if rest.shape[1] else None)


def gate(outputs: Array, gated: int) -> Array:
    """silu(gate) * up, [B, F], of a product's outputs [B, O]: gate, up, and others.

    Args:
        gated: F.
    """
    return jax.nn.silu(outputs[:, :gated]) * outputs[:, gated : 2 * gated]


def product(x: Array, matrix: Array) -> Array:
    """x [B, D] times [O, D] transposed: [B, O] in x's dtype, summed in float32.

    One row on a GPU: as a sum along the rows of the matrix. XLA would make sums of a product of one row too, but over
    products that it rounds, and writes to memory where there are two axes to sum over.
    """

    def sums(x: Array, matrix: Array) -> Array:
        return jnp.sum(x.astype(jnp.float32) * matrix.astype(jnp.float32), axis=1)[None].astype(x.dtype)

    def dot(x: Array, matrix: Array) -> Array:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        return jnp.einsum("bd,od->bo", x, matrix, precision=precision, preferred_element_type=x.dtype)

    return dot(x, matrix) if x.shape[0] > 1 else jax.lax.platform_dependent(x, matrix, cpu=dot, default=sums)


def _normed(x: Array, scale: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    return (norm.over_rows(scale, wide) * (wide * norm.inverse_rms(wide, -1, epsilon))).astype(x.dtype)
