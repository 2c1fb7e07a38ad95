"""GELU of a matrix product and its bias: the forward, and for the backward the choice between the kernel and XLA.

One function for what it keeps and for what it reads: the product alone is kept, which the forward need not write once
more with its bias; and the bias' gradient is summed where the product's is made.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch, norm, partition
from pallas_kernels.norm import IMPLEMENTATIONS
from pallas_kernels.normal_distribution import below_and_density


def biased_gelu(x: Array, bias: Array) -> Array:
    """a Phi(a) of a = x + bias, with the normal distribution itself (`normal_distribution`), in float32.

    Not differentiated: `biased_gelu_backward` is its backward.

    Args:
        x: [..., F], any float dtype.
        bias: [F], any float dtype; rounded to x's.

    Returns:
        [..., F] in x's dtype.
    """
    a = _biased(x, bias)
    return (a * below_and_density(a, x.dtype)[0]).astype(x.dtype)


def biased_gelu_backward(x: Array, bias: Array, dy: Array, *, implementation: str | None = None) -> tuple[Array, Array]:
    """(dx, dbias) of `biased_gelu`.

    Args:
        x, dy: [..., F], any float dtype.
        bias: [F], any float dtype.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Returns:
        dx in x's shape and dtype; dbias [F] float32, summed over all rows in float32.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such rows.
    """
    if implementation is None:
        implementation = _best(x.dtype, x.shape[-1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return _xla(x, bias, dy)
    _kernel().check_supported(dtype=x.dtype, columns=x.shape[-1])
    leading = tuple(f"rows{i}" for i in range(x.ndim - 1))
    rows = (*leading, "columns")
    rule = partition.Rule((rows, ("columns",), rows), (rows, ("columns",)), frozenset())

    def local(axes: partition.Axes, x: Array, bias: Array, dy: Array) -> tuple[Array, Array]:
        try:
            _kernel().check_supported(dtype=x.dtype, columns=x.shape[-1])
        except NotImplementedError:  # of a device's share of the columns
            dx, dbias = _xla(x, bias, dy)
        else:
            x_rows, dy_rows = (a.reshape(-1, x.shape[-1]) for a in (x, dy))
            dx, dbias = _kernel().gelu_backward(x_rows, bias, dy_rows)
        split = tuple(axis for name in leading for axis in axes.get(name, ()))
        return dx.reshape(x.shape), jax.lax.psum(dbias, split) if split else dbias

    dx, dbias = partition.partitioned(local, rule, [x, _rounded(bias, x), dy.astype(x.dtype)])
    return partition.laid_out_like(dx, x), partition.laid_out_like(dbias, bias)


@functools.cache
def _best(dtype: jnp.dtype, columns: int) -> str:
    return dispatch.best_for_rows("GELU's backward", lambda: _kernel().check_supported(dtype=dtype, columns=columns))


def _kernel() -> ModuleType:
    """Imported when it is wanted, as `dispatch` does: not every installation of JAX can."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.gelu_backward")


def _rounded(bias: Array, x: Array) -> Array:
    return bias.astype(x.dtype).astype(jnp.float32)


def _biased(x: Array, bias: Array) -> Array:
    """x + bias in x's dtype, as float32."""
    return (x + norm.over_rows(bias, x).astype(x.dtype)).astype(jnp.float32)


def _xla(x: Array, bias: Array, dy: Array) -> tuple[Array, Array]:
    """d (a Phi(a)) / da = Phi(a) + a phi(a)."""
    a = _biased(x, bias)
    below, density = below_and_density(a, x.dtype)
    dx = ((below + a * density) * dy.astype(jnp.float32)).astype(x.dtype)
    # Without the barrier XLA sums what is not rounded yet, and writes that too: twice the bytes of all that is here.
    dx = jax.lax.optimization_barrier(dx)
    return dx, jnp.sum(dx.astype(jnp.float32), axis=tuple(range(dx.ndim - 1)))
