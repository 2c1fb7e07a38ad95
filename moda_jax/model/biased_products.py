"""Several linear maps of one x with their biases, each bias as a row of its matrix: [x, 1] [[W], [b]] = x W + b.

At a small width a pass over a result costs as much as the product that made it. So no pass adds the biases, and none
sums their gradients: those are a row of the matrices' own. What it costs is x with a few columns more, once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moda_jax.numerics.precision import contract

Array = jax.Array

COLUMNS = 8  # of ones, of which one is used: rows in a narrow dtype stay whole 16 bytes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def biased_products(
    specs: tuple[str, ...], x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]
) -> tuple[Array, ...]:
    """`einsum(spec, x, kernel) + bias` of every spec, kernel and bias.

    Args:
        specs: einsums that sum over x's last axis, a kernel's first, alone.
        x: [..., D], any float dtype.
        kernels: [D, ...] each, of x's dtype.
        biases: a kernel's shape without D, float32; rounded to x's dtype. Their gradients are summed in float32.

    Returns:
        The results, in x's dtype, rounded once.
    """
    return _forward(specs, x, kernels, biases)[0]


def _forward(
    specs: tuple[str, ...], x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]
) -> tuple[tuple[Array, ...], tuple]:
    wide = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, COLUMNS)), constant_values=1)
    results: list[Array] = []
    for spec, kernel, bias in zip(specs, kernels, biases, strict=True):
        unused = jnp.zeros((COLUMNS - 1, *bias.shape), x.dtype)
        taller = jnp.concatenate([kernel, bias.astype(x.dtype)[None], unused])
        # One product after the other: XLA would make one of two, and then two passes that take its result apart.
        own, results = jax.lax.optimization_barrier((wide, results))
        results.append(contract(spec, own, taller))
    return tuple(results), (wide, kernels, biases)


def _backward(
    specs: tuple[str, ...], residuals: tuple, gradients: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    wide, kernels, biases = residuals
    dx, dkernels, dbiases = None, [], []
    for spec, kernel, bias, dy in zip(specs, kernels, biases, gradients, strict=True):
        operands, result = spec.split("->")
        letters, kernel_letters = operands.split(",")
        more = contract(f"{result},{kernel_letters}->{letters}", dy, kernel)
        dx = more if dx is None else dx + more
        dtaller = contract(f"{letters},{result}->{kernel_letters}", wide, dy, jnp.float32)
        width = kernel.shape[0]
        dkernels.append(dtaller[:width].astype(kernel.dtype))
        dbiases.append(dtaller[width].astype(bias.dtype))
    return dx, tuple(dkernels), tuple(dbiases)


biased_products.defvjp(_forward, _backward)
