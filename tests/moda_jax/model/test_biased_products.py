"""Linear maps with their biases as rows of the matrices, against products and sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.model.biased_products import biased_products

SPECS = "btd,dnh->btnh", "btd,dkh->btkh", "btd,df->btf"
SHAPES = (12, 3, 4), (12, 2, 4), (12, 5)


def draw(dtype):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    x, kernels = jnp.asarray(normal((2, 400, 12)), dtype), tuple(jnp.asarray(normal(s), dtype) for s in SHAPES)
    biases = tuple(jnp.asarray(jnp.asarray(normal(s[1:]), dtype), jnp.float32) for s in SHAPES)
    gradients = tuple(jnp.asarray(normal((2, 400, *s[1:])), dtype) for s in SHAPES)
    return x, kernels, biases, gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_results_and_gradients(dtype, tolerance):
    x, kernels, biases, gradients = draw(dtype)
    got, vjp = jax.vjp(lambda *arguments: biased_products(SPECS, *arguments), x, kernels, biases)
    dx, dkernels, dbiases = vjp(gradients)
    wide = np.asarray(x, np.float64)
    expected_dx = np.zeros_like(wide)
    for y, kernel, bias, dy, dkernel, dbias in zip(got, kernels, biases, gradients, dkernels, dbiases, strict=True):
        flat, dflat = np.asarray(kernel, np.float64).reshape(12, -1), np.asarray(dy, np.float64).reshape(2, 400, -1)
        expected_dx += dflat @ flat.T
        for a, b, bound in (
            (y, wide @ flat + np.asarray(bias, np.float64).reshape(-1), tolerance),
            (dkernel, np.einsum("btd,btf->df", wide, dflat), tolerance),
            (dbias, dflat.sum((0, 1)), 1e-6),  # in float32, whatever x is
        ):
            error = np.linalg.norm(np.asarray(a, np.float64).reshape(b.shape) - b) / np.linalg.norm(b)
            assert error < bound, error
        assert y.dtype == dkernel.dtype == dtype
        assert dbias.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(dx, np.float64) - expected_dx) / np.linalg.norm(expected_dx)
    assert error < tolerance
    assert dx.dtype == dtype


def test_the_gradient_keeps_one_array_of_the_size_of_x():
    x, kernels, biases, _ = draw("bfloat16")
    _, vjp = jax.vjp(lambda *arguments: biased_products(SPECS, *arguments), x, kernels, biases)
    large = [leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.size > 1000]
    assert large == [(2, 400, 20)]
