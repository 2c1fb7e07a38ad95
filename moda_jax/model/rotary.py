"""Rotary position embedding (RoFormer), alone or right behind a norm, with backwards of their own.

They keep their input, where autodiff would keep float32 intermediates of its size.

Axes: B batch, T tokens, H head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.parallel import norm as norms
from pallas_kernels import norm

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (RoFormer), pairs (i, i + H/2), angle = position * theta^(-2i/H).

    Args:
        x: [B, T, heads, H], any float dtype.
        positions: [B, T] int32; or [B, T, axes], a place of several coordinates: the pairs are then shared out, the
            first H / (2 axes) of them turn with the first coordinate, and so on, each share with angles as above for a
            head of H / axes channels.
        theta: base of the wavelengths.

    Returns:
        [B, T, heads, H] in x's dtype; computed in float32.
    """
    return norm.rotate(x.astype(jnp.float32), *rotary_angles(positions, x.shape[-1], theta)).astype(x.dtype)


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of the pairs' angles: positions [B, T] or [B, T, axes] to [B, T, H/2] float32 each."""
    if positions.ndim == 3:
        parts = [
            rotary_angles(positions[..., i], head_dim // positions.shape[2], theta) for i in range(positions.shape[2])
        ]
        cos, sin = (jnp.concatenate(angles, axis=-1) for angles in zip(*parts, strict=True))
        return cos, sin
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * norm.over_rows(frequency, positions[..., None])
    return jnp.cos(angle), jnp.sin(angle)


def _rotate_forward(x: Array, positions: Array, theta: float) -> tuple[Array, Array]:
    return rotate(x, positions, theta), positions


def _rotate_backward(theta: float, positions: Array, dy: Array) -> tuple[Array, np.ndarray]:
    """A rotation's transpose is the rotation back."""
    cos, sin = rotary_angles(positions, dy.shape[-1], theta)
    dx = norm.rotate(dy.astype(jnp.float32), cos, -sin).astype(dy.dtype)
    return dx, np.zeros(positions.shape, jax.dtypes.float0)


rotate.defvjp(_rotate_forward, _rotate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def norm_rotate(
    x: Array, scale: Array, positions: Array, epsilon: float, theta: float | None, implementation: str | None = None
) -> Array:
    """`rotate` of `rms_norm` over all heads together, or over each, without rounding in between.

    One function for the backward's sake, see `pallas_kernels.norm`: apart they would go over memory once more.

    Args:
        x: [B, T, heads, H], any float dtype.
        scale: [heads, H], or for every head by itself [H]; any float dtype.
        positions: [B, T] int32.
        epsilon: added to the mean square.
        theta: base of the wavelengths; None: no rotation.
        implementation: of the backward, see `pallas_kernels.norm`.

    Returns:
        [B, T, heads, H] in x's dtype; computed in float32.
    """
    wide = x.astype(jnp.float32)
    normed = norm.over_rows(scale, wide) * (wide * norm.inverse_rms(wide, tuple(range(-scale.ndim, 0)), epsilon))
    if theta is not None:
        normed = norm.rotate(normed, *rotary_angles(positions, x.shape[-1], theta))
    return normed.astype(x.dtype)


def _norm_rotate_forward(
    x: Array, scale: Array, positions: Array, epsilon: float, theta: float | None, implementation: str | None = None
) -> tuple[Array, tuple[Array, ...]]:
    return norm_rotate(x, scale, positions, epsilon, theta, implementation), (x, scale, positions)


def _norm_rotate_backward(
    epsilon: float, theta: float | None, implementation: str | None, residuals: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, np.ndarray]:
    x, scale, positions = residuals
    rotation = None if theta is None else rotary_angles(positions, x.shape[-1], theta)
    dx, dscale = norms.rms_norm_backward(
        x, dy, scale, rotation, epsilon=epsilon, per_head=scale.ndim == 1, implementation=implementation
    )
    return dx, dscale, np.zeros(positions.shape, jax.dtypes.float0)


norm_rotate.defvjp(_norm_rotate_forward, _norm_rotate_backward)
