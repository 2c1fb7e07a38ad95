"""GELU and SwiGLU: their hand-written backward passes, against autodiff of the plain formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hand_written_backward import assert_gradients_equal, draw, numbers_kept

from moda_jax.model.activations import gelu, swiglu


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_swiglu(keep_hidden):
    def plain(x, gate, up, down):
        a = jnp.einsum("btd,df->btf", x, gate, precision="highest")
        product = a / (1 + jnp.exp(-a)) * jnp.einsum("btd,df->btf", x, up, precision="highest")
        return jnp.einsum("btf,fd->btd", product, down, precision="highest")

    arguments = draw(2, 3, 4), draw(4, 6, seed=1), draw(4, 6, seed=2), draw(6, 4, seed=3)
    assert_gradients_equal(lambda *a: swiglu(keep_hidden, *a), plain, arguments, argnums=(0, 1, 2, 3))


def test_gelu_and_its_gradient_are_those_of_the_normal_distribution():
    """Of float64 NumPy, far into both tails; the backward keeps x alone."""
    x = np.linspace(-9.0, 9.0, 401)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in x])
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    value, pull = jax.vjp(gelu, jnp.float32(x))
    np.testing.assert_allclose(value, x * below, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.full(401, 2.0))[0], 2.0 * (below + x * density), atol=1e-6, rtol=1e-6)
    kept = jax.tree.leaves(jax.vjp(gelu, jnp.ones(7, jnp.bfloat16))[1])
    assert [(leaf.shape, leaf.dtype) for leaf in kept if leaf.ndim] == [((7,), jnp.bfloat16)]


@pytest.mark.parametrize(("keep_hidden", "times"), [(True, 7), (False, 1)])
def test_what_swiglu_keeps_for_the_backward(keep_hidden, times):
    """Its input, and if wanted three hidden activations twice as wide, not widened."""
    x, matrix, down = (jnp.zeros(shape, jnp.bfloat16) for shape in ((2, 16, 32), (32, 64), (64, 32)))
    assert numbers_kept(lambda x: swiglu(keep_hidden, x, matrix, matrix, down), x) == times * x.size


def test_gelu_in_half_precision_is_rounded_as_exact_gelu_is():
    """But for what lies between two bfloat16: at most one unit in the last place, and that rarely; both tails too.
    Where the gradient's two terms cancel, near -0.75, their error is what is left."""
    x = jnp.linspace(-12.0, 12.0, 20001).astype(jnp.bfloat16)
    value, pull = jax.vjp(gelu, x)
    wide = np.asarray(x, np.float64)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2.0)) for v in wide])
    density = np.exp(-0.5 * wide * wide) / math.sqrt(2.0 * math.pi)
    for got, exact in ((value, wide * below), (pull(jnp.ones_like(x))[0], below + wide * density)):
        expected = jnp.float32(exact).astype(jnp.bfloat16)
        steps = np.abs(np.asarray(got).view(np.int16).astype(int) - np.asarray(expected).view(np.int16).astype(int))
        error = np.abs(np.asarray(got, np.float64) - exact)
        assert np.all((steps <= 1) | (error < 1e-5)) and np.mean(steps > 0) < 0.005
