"""LayerNorm, and for its backward the choice between kernel and XLA, as `pallas_kernels.norm` makes it for RMSNorm.

Memory is all that both cost. The forward is XLA's, which fuses it with what makes or reads its rows: a kernel was no
faster on an H200. In the backward the kernel makes one pass, where XLA makes one for each sum.
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


def layer_norm(x: Array, scale: Array, bias: Array, *, epsilon: float) -> Array:
    """scale * (x - mean(x)) / sqrt(variance(x) + epsilon) + bias over the last axis, computed in float32.

    Not differentiated: `layer_norm_backward` is its backward.

    Args:
        x: [..., D], any float dtype.
        scale, bias: [D], any float dtype.
        epsilon: added to the variance.

    Returns:
        [..., D] in x's dtype.
    """
    centred = _centred(x)
    normed = norm.over_rows(scale, centred) * (centred * norm.inverse_rms(centred, -1, epsilon))
    return (normed + norm.over_rows(bias, normed)).astype(x.dtype)


def layer_norm_backward(
    x: Array, dy: Array, scale: Array, *, epsilon: float, implementation: str | None = None
) -> tuple[Array, Array, Array]:
    """(dx, dscale, dbias) of `layer_norm`.

    Args:
        x, dy: [..., D], any float dtype.
        scale: [D], any float dtype.
        epsilon: as in `layer_norm`.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Returns:
        dx in x's shape and dtype; dscale and dbias [D] float32, summed over all rows in float32.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such rows.
    """
    if implementation is None:
        implementation = _best(x.dtype, x.shape[-1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return _xla_backward(x, dy, scale, epsilon)
    _kernel().check_supported(dtype=x.dtype, columns=x.shape[-1])
    leading = tuple(f"rows{i}" for i in range(x.ndim - 1))
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


@functools.cache
def _best(dtype: jnp.dtype, columns: int) -> str:
    def check() -> None:
        _kernel().check_supported(dtype=dtype, columns=columns)

    return dispatch.best_for_rows("LayerNorm's backward", check)


def _kernel() -> ModuleType:
    """Imported when it is wanted, as `dispatch` does: not every installation of JAX can."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.layer_norm")


def _centred(x: Array, over: tuple[str, ...] = ()) -> Array:
    """x less its mean over the last axis, float32. `over`: its mesh axes, if it is split."""
    wide = x.astype(jnp.float32)
    return wide - norm.mean(wide, -1, over)


def _xla_backward(
    x: Array, dy: Array, scale: Array, epsilon: float, over: tuple[str, ...] = ()
) -> tuple[Array, Array, Array]:
    """RMSNorm's of the centred rows, centred."""
    wide = dy.astype(jnp.float32)
    dcentred, dscale = norm.xla_backward(_centred(x, over), wide, scale.astype(jnp.float32), None, epsilon, over)
    leading = tuple(range(wide.ndim - 1))
    return _centred(dcentred, over).astype(x.dtype), dscale, jnp.sum(wide, axis=leading)
