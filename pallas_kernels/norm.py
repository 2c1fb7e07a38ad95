"""RMSNorm's backward, also of a norm whose result was rotated (RoPE): the choice between the kernel and XLA.

Memory is all that it costs, and XLA makes two passes over it where the kernel makes one.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch, partition

IMPLEMENTATIONS = ("xla", "mosaic_gpu")


def beside(attention: str | None) -> str | None:
    """The implementation for the norms of a model whose attention runs as `attention` says: without a kernel there, or
    under one that was asked for by another name, XLA; else the best."""
    return None if attention in (None, "mosaic_gpu") else "xla"


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Every pair (i, i + H/2) of x turned by its angle: x cos + (-x[H/2:], x[:H/2]) sin.

    Args:
        x: [..., heads, H] float32.
        cos, sin: [..., H/2] float32, of the angles, the same for all heads.
    """
    # The pairs as an axis that is flipped, and not as two halves that are put together again: so XLA can read x where
    # the result is used.
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    cos, sin = cos[..., None, None, :], sin[..., None, None, :]
    sign = over_rows(jnp.array([[-1.0], [1.0]], jnp.float32), sin)
    return (pairs * cos + jnp.flip(pairs, axis=-2) * (sign * sin)).reshape(x.shape)


def inverse_rms(x: Array, axis: int | tuple[int, ...], epsilon: float, over: tuple[str, ...] = ()) -> Array:
    """1 / sqrt(mean(x^2) + epsilon) over `axis`, which is kept; x is float32. `over`: its mesh axes, if it is split."""
    return jax.lax.rsqrt(mean(jnp.square(x), axis, over) + epsilon)


def mean(x: Array, axis: int | tuple[int, ...], over: tuple[str, ...] = ()) -> Array:
    """Over `axis`, which is kept. `over`: its mesh axes, if it is split."""
    local = jnp.mean(x, axis=axis, keepdims=True)
    return jax.lax.pmean(local, over) if over else local


def over_rows(scale: Array, x: Array) -> Array:
    """scale over the last axes of x [..., *scale.shape] as float32, with as many axes as x.

    Spelled out, so that a norm also runs where JAX was told to refuse such promotions of rank and dtype.
    """
    return scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def rms_norm_backward(
    x: Array,
    dy: Array,
    scale: Array,
    rotation: tuple[Array, Array] | None = None,
    *,
    epsilon: float,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """(dx, dscale) of y = scale * x / sqrt(mean(x^2) + epsilon), the mean over scale's axes, or of that y rotated.

    Args:
        x, dy: [..., *scale.shape], any float dtype; with a rotation [..., heads, H].
        scale: [D]; of heads that are normed together and rotated [heads, H]; of heads that are normed each by itself
            [H], rotated or not. Any float dtype.
        rotation: (cos, sin) as `rotate` takes them, [..., H/2]; None: y was not rotated.
        epsilon: added to the mean square.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Returns:
        dx in x's shape and dtype; dscale in scale's shape and dtype, summed over all rows in float32.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such rows. A head that is normed by itself is
            a row.
    """
    if implementation is None:
        implementation = _best(x.dtype, scale.size, None if rotation is None else scale.shape[-1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return xla_backward(x, dy, scale, rotation, epsilon)
    rotated_dim = None if rotation is None else scale.shape[-1]
    _kernel().check_supported(dtype=x.dtype, columns=scale.size, rotated_dim=rotated_dim)
    dx, dscale = _partitioned(x, dy, scale.astype(jnp.float32), rotation, epsilon)
    return dx, dscale.astype(scale.dtype)


@functools.cache
def _best(dtype: jnp.dtype, columns: int, rotated_dim: int | None) -> str:
    def check() -> None:
        _kernel().check_supported(dtype=dtype, columns=columns, rotated_dim=rotated_dim)

    return dispatch.best_for_rows("RMSNorm's backward", check)


def _partitioned(
    x: Array, dy: Array, scale: Array, rotation: tuple[Array, Array] | None, epsilon: float
) -> tuple[Array, Array]:
    """The kernel, on a mesh of the caller's on each device's own rows; XLA's formula for rows that are cut themselves,
    since their sums go over devices."""
    leading = tuple(f"rows{i}" for i in range(x.ndim - scale.ndim))
    columns = ("columns",) if scale.ndim == 1 else ("heads", "head_dim")
    tables = () if rotation is None else ((*leading, "half"),) * 2
    rule = partition.Rule(
        ((*leading, *columns),) * 2 + (columns,) + tables,
        ((*leading, *columns), columns),
        frozenset({"head_dim", "half"}),
    )

    def local(axes: partition.Axes, x: Array, dy: Array, scale: Array, *tables: Array) -> tuple[Array, Array]:
        if columns[0] in axes:
            dx, dscale = xla_backward(x, dy, scale, tables or None, epsilon, over=axes[columns[0]])
        else:
            rows = math.prod(x.shape[: len(leading)])
            x_rows, dy_rows = (a.reshape(rows, *scale.shape) for a in (x, dy))
            flat = tuple(table.reshape(rows, -1) for table in tables) or None
            dx, dscale = _kernel().rms_norm_backward(x_rows, dy_rows, scale, flat, epsilon=epsilon)
            dx = dx.reshape(x.shape)
        split = tuple(axis for name in leading for axis in axes.get(name, ()))
        return dx, jax.lax.psum(dscale, split) if split else dscale

    dx, dscale = partition.partitioned(local, rule, [x, dy, scale, *(rotation or ())])
    return partition.laid_out_like(dx, x), partition.laid_out_like(dscale, scale)


def _kernel() -> ModuleType:
    """Imported when it is wanted, as `dispatch` does: not every installation of JAX can."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.norm_backward")


def xla_backward(
    x: Array,
    dy: Array,
    scale: Array,
    rotation: tuple[Array, Array] | None,
    epsilon: float,
    over: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    """With n = x / rms and g = scale * unrotated dy: dx = (g - n mean(g n)) / rms.

    A rotation of both factors does not change a sum of products: the mean is taken of dy and the rotated scale * x, so
    that it is known before anything is rotated back, in one pass over both; and of x instead of n, so that it need not
    wait for the rms. `over`: mesh axes over which every row is cut.
    """
    axes = tuple(range(-scale.ndim, 0))
    wide, dwide = x.astype(jnp.float32), dy.astype(jnp.float32)
    r = inverse_rms(wide, axes, epsilon, over)
    wide_scale = over_rows(scale, wide)
    y = wide_scale * wide
    g = dwide
    if rotation is not None:
        cos, sin = rotation
        y, g = rotate(y, cos, sin), rotate(dwide, cos, -sin)
    along = r * mean(dwide * y, axes, over)
    normed = wide * r
    dx = r * (wide_scale * g - normed * along)
    leading = x.shape[: x.ndim - scale.ndim]
    dscale = jnp.sum((g * normed).reshape(*leading, -1), axis=tuple(range(len(leading))))
    return dx.astype(x.dtype), dscale.reshape(scale.shape).astype(scale.dtype)
