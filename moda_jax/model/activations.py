"""What stands between an FFN's matrix products, with backwards of its own for what they keep: GELU and SwiGLU.

Autodiff would keep float32 intermediates of the size of the activations, several for each; these keep their input.

Axes: B batch, T tokens, D model width, F FFN hidden.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moda_jax.numerics.precision import contract
from moda_jax.parallel import norm as norms
from moda_jax.parallel.mesh import constrain
from pallas_kernels import biased_gelu as biased
from pallas_kernels.normal_distribution import below_and_density

Array = jax.Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """`x Phi(x)` with the normal distribution itself, see `pallas_kernels.normal_distribution`, in float32.

    Args:
        x: any shape and float dtype.

    Returns:
        The same shape and dtype.
    """
    wide = x.astype(jnp.float32)
    return (wide * below_and_density(wide, x.dtype)[0]).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    """d (x Phi(x)) / dx = Phi(x) + x phi(x)."""
    wide = x.astype(jnp.float32)
    below, density = below_and_density(wide, x.dtype)
    return (((below + wide * density) * dy.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def biased_gelu(x: Array, bias: Array, implementation: str | None = None) -> Array:
    """`gelu(x + bias)`, whose backward keeps x and sums the bias' gradient in float32.

    Args:
        x: [..., F], any float dtype.
        bias: [F] float32; rounded to x's dtype.
        implementation: of the backward, see `pallas_kernels.biased_gelu`.

    Returns:
        [..., F] in x's dtype.
    """
    del implementation
    return biased.biased_gelu(x, bias)


def _biased_gelu_forward(x: Array, bias: Array, implementation: str | None = None) -> tuple[Array, tuple[Array, Array]]:
    return biased_gelu(x, bias, implementation), (x, bias)


def _biased_gelu_backward(implementation: str | None, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, bias = residuals
    dx, dbias = norms.biased_gelu_backward(x, bias, dy, implementation=implementation)
    return dx, dbias.astype(bias.dtype)


biased_gelu.defvjp(_biased_gelu_forward, _biased_gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu(keep_hidden: bool, x: Array, gate: Array, up: Array, down: Array) -> Array:
    """`(silu(x gate) * (x up)) down`.

    Args:
        keep_hidden: keep what stands between the matrix products for the backward pass, 3 F numbers a token; else it
            is computed again from x.
        x: [B, T, D].
        gate, up: [D, F], x's dtype.
        down: [F, D], x's dtype.

    Returns:
        [B, T, D] in x's dtype.
    """
    return _swiglu_forward(keep_hidden, x, gate, up, down)[0]


def _hidden(x: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    axes = ("batch", "tokens", "ffn")
    return (
        constrain(contract("btd,df->btf", x, gate), *axes),
        constrain(contract("btd,df->btf", x, up), *axes),
    )


def _swiglu_forward(keep_hidden: bool, x: Array, gate: Array, up: Array, down: Array) -> tuple[Array, tuple]:
    hidden = _hidden(x, gate, up)
    product = jax.nn.silu(hidden[0]) * hidden[1]
    return contract("btf,fd->btd", product, down), (x, gate, up, down, (*hidden, product) if keep_hidden else None)


def _swiglu_backward(keep_hidden: bool, residuals: tuple, dy: Array) -> tuple[Array, Array, Array, Array]:
    """With s = sigmoid(a), a = x gate, b = x up: d silu(a) / da = s (1 + a (1 - s))."""
    del keep_hidden
    x, gate, up, down, hidden = residuals
    a, b, *product = _hidden(x, gate, up) if hidden is None else hidden
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dproduct = contract("btd,fd->btf", dy, down).astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(a)
    silu = a * sigmoid
    da = (dproduct * b * sigmoid * (1.0 + a * (1.0 - sigmoid))).astype(x.dtype)
    db = (dproduct * silu).astype(x.dtype)
    product = product[0] if product else (silu * b).astype(x.dtype)
    dx = contract("btf,df->btd", da, gate) + contract("btf,df->btd", db, up)
    return (
        dx,
        contract("btd,btf->df", x, da),
        contract("btd,btf->df", x, db),
        contract("btf,btd->fd", product, dy),
    )


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
