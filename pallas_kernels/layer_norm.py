"""LayerNorm and its backward: the choice between the kernels and XLA, as `pallas_kernels.norm` makes it for RMSNorm.

Memory is all that both cost: the kernels make one pass over it, where XLA makes one for each sum.
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


def layer_norm(x: Array, scale: Array, bias: Array, *, epsilon: float, implementation: str | None = None) -> Array:
    """scale * (x - mean(x)) / sqrt(variance(x) + epsilon) + bias over the last axis, computed in float32.

    Not differentiated: `layer_norm_backward` is its backward.

    Args:
        x: [..., D], any float dtype.
        scale, bias: [D], any float dtype.
        epsilon: added to the variance.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such rows.
    """
    if _resolve(x, implementation) == "xla":
        return _xla(x, scale, bias, epsilon)
    leading = _leading(x)
    rule = partition.Rule(((*leading, "columns"), ("columns",), ("columns",)), ((*leading, "columns"),), frozenset())

    def local(axes: partition.Axes, x: Array, scale: Array, bias: Array) -> tuple[Array]:
        if "columns" in axes:
            return (_xla(x, scale, bias, epsilon, axes["columns"]),)
        y = _kernel().layer_norm(x.reshape(-1, x.shape[-1]), scale, bias, epsilon=epsilon)
        return (y.reshape(x.shape),)

    (y,) = partition.partitioned(local, rule, [x, scale.astype(jnp.float32), bias.astype(jnp.float32)])
    return partition.laid_out_like(y, x)


def layer_norm_backward(
    x: Array, dy: Array, scale: Array, *, epsilon: float, implementation: str | None = None
) -> tuple[Array, Array, Array]:
    """(dx, dscale, dbias) of `layer_norm`.

    Args:
        x, dy: [..., D], any float dtype.
        scale: [D], any float dtype.
        epsilon, implementation: as in `layer_norm`.

    Returns:
        dx in x's shape and dtype; dscale and dbias [D] float32, summed over all rows in float32.

    Raises:
        As `layer_norm`.
    """
    if _resolve(x, implementation) == "xla":
        return _xla_backward(x, dy, scale, epsilon)
    leading = _leading(x)
    rows = (*leading, "columns")
    rule = partition.Rule((rows, rows, ("columns",)), (rows, ("columns",), ("columns",)), frozenset())

    def local(axes: partition.Axes, x: Array, dy: Array, scale: Array) -> tuple[Array, Array, Array]:
        if "columns" in axes:
            dx, *sums = _xla_backward(x, dy, scale, epsilon, axes["columns"])
        else:
            x_rows, dy_rows = (a.reshape(-1, x.shape[-1]) for a in (x, dy))
            dx, *sums = _kernel().layer_norm_backward(x_rows, dy_rows, scale, epsilon=epsilon)
            dx = dx.reshape(x.shape)
        split = tuple(axis for name in leading for axis in axes.get(name, ()))
        return dx, *(jax.lax.psum(total, split) if split else total for total in sums)

    dx, *sums = partition.partitioned(local, rule, [x, dy.astype(x.dtype), scale.astype(jnp.float32)])
    return partition.laid_out_like(dx, x), *(partition.laid_out_like(total, scale) for total in sums)


def _resolve(x: Array, implementation: str | None) -> str:
    if implementation is None:
        return _best(x.dtype, x.shape[-1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")
    if implementation == "mosaic_gpu":
        _kernel().check_supported(dtype=x.dtype, columns=x.shape[-1])
    return implementation


@functools.cache
def _best(dtype: jnp.dtype, columns: int) -> str:
    return dispatch.best_for_rows("LayerNorm", lambda: _kernel().check_supported(dtype=dtype, columns=columns))


def _leading(x: Array) -> tuple[str, ...]:
    return tuple(f"rows{i}" for i in range(x.ndim - 1))


def _kernel() -> ModuleType:
    """Imported when it is wanted, as `dispatch` does: not every installation of JAX can."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.layer_norm")


def _centred(x: Array, over: tuple[str, ...]) -> Array:
    """x less its mean over the last axis, float32. `over`: its mesh axes, if it is split."""
    wide = x.astype(jnp.float32)
    return wide - norm.mean(wide, -1, over)


def _xla(x: Array, scale: Array, bias: Array, epsilon: float, over: tuple[str, ...] = ()) -> Array:
    centred = _centred(x, over)
    normed = norm.over_rows(scale, centred) * (centred * norm.inverse_rms(centred, -1, epsilon, over))
    return (normed + norm.over_rows(bias, normed)).astype(x.dtype)


def _xla_backward(
    x: Array, dy: Array, scale: Array, epsilon: float, over: tuple[str, ...] = ()
) -> tuple[Array, Array, Array]:
    """RMSNorm's of the centred rows, centred."""
    wide = dy.astype(jnp.float32)
    dcentred, dscale = norm.xla_backward(_centred(x, over), wide, scale.astype(jnp.float32), None, epsilon, over)
    leading = tuple(range(wide.ndim - 1))
    return _centred(dcentred, over).astype(x.dtype), dscale, jnp.sum(wide, axis=leading)
