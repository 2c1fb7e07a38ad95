"""The hand-written backward passes of the layers' parts, against autodiff of the plain formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.model.layers import GELUNetwork, Projection, gelu, layer_norm, norm_rotate, rms_norm, rotate, swiglu


def draw(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def assert_gradients_equal(function, plain, arguments, *, argnums):
    """Of a random weighting of the output, by every argument in `argnums`."""
    weights = draw(*function(*arguments).shape, seed=9)
    np.testing.assert_allclose(function(*arguments), plain(*arguments), rtol=2e-5, atol=2e-6)
    gradients, expected = (
        jax.grad(lambda *a, f=f: jnp.sum(weights * f(*a)), argnums=argnums)(*arguments) for f in (function, plain)
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == wanted.dtype
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_rms_norm():
    def plain(x, scale):
        return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)

    arguments = draw(2, 3, 8), draw(8, seed=1)
    assert_gradients_equal(lambda x, scale: rms_norm(x, scale, 0.1), plain, arguments, argnums=(0, 1))


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_swiglu(keep_hidden):
    def plain(x, gate, up, down):
        a = jnp.einsum("btd,df->btf", x, gate, precision="highest")
        product = a / (1 + jnp.exp(-a)) * jnp.einsum("btd,df->btf", x, up, precision="highest")
        return jnp.einsum("btf,fd->btd", product, down, precision="highest")

    arguments = draw(2, 3, 4), draw(4, 6, seed=1), draw(4, 6, seed=2), draw(6, 4, seed=3)
    assert_gradients_equal(lambda *a: swiglu(keep_hidden, *a), plain, arguments, argnums=(0, 1, 2, 3))


def test_rotate():
    positions = jnp.int32([[0, 5, 100], [7, 1, 3]])
    theta = 50.0

    def plain(x):
        """Pair (i, i + H/2) as a complex number, times e^(i angle)."""
        half = x.shape[-1] // 2
        angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    assert_gradients_equal(lambda x: rotate(x, positions, theta), plain, (draw(2, 3, 2, 8),), argnums=(0,))


@pytest.mark.parametrize(("per_head", "theta"), [(False, 50.0), (True, 50.0), (True, None)])
def test_norm_rotate_is_the_norm_of_all_heads_or_of_each_and_then_the_rotation(per_head, theta):
    positions = jnp.int32([[0, 5, 100], [7, 1, 3]])
    scale = draw(8, seed=1) if per_head else draw(2, 8, seed=1)

    def plain(x, scale):
        flat = x if per_head else x.reshape(2, 3, 16)
        flat = scale.reshape(-1) * flat / jnp.sqrt(jnp.mean(flat**2, axis=-1, keepdims=True) + 0.1)
        return flat if theta is None else rotate(flat.reshape(x.shape), positions, theta)

    assert_gradients_equal(
        lambda x, scale: norm_rotate(x, scale, positions, 0.1, theta), plain, (draw(2, 3, 2, 8), scale), argnums=(0, 1)
    )


def test_layer_norm_is_its_formula():
    def plain(x, scale, bias):
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 0.1) * scale + bias

    arguments = draw(2, 3, 8) + 3.0, draw(8, seed=1), draw(8, seed=2)
    assert_gradients_equal(lambda x, scale, bias: layer_norm(x, scale, bias, 0.1), plain, arguments, argnums=(0, 1, 2))


def test_a_bias_has_its_gradient_summed_in_float32():
    """In bfloat16 the sum over 4096 rows came to -82.5 where it is -84.6."""
    layer = Projection("btd,df->btf", (8, 16), bias=True, initializer_range=0.5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 1024, 8), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(1), (4, 1024, 16), jnp.bfloat16)
    graph, params = nnx.split(layer)
    (gradient,) = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)[1](dy)
    expected = np.sum(np.asarray(dy, np.float64), axis=(0, 1))
    np.testing.assert_allclose(gradient["bias"][...], expected, rtol=1e-5, atol=1e-4)


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


def test_a_gelu_network_computed_again_is_the_same():
    options = {"bias": True, "initializer_range": 0.3, "dtype": jnp.float32}
    kept, again = (GELUNetwork(8, 16, keep_hidden=keep, rngs=nnx.Rngs(0), **options) for keep in (True, False))
    assert_gradients_equal(again, kept, (draw(2, 3, 8),), argnums=(0,))
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(again, draw(2, 3, 8))[1]) if leaf.shape[-1:] == (16,)]
    assert not [leaf for leaf in kept if leaf.ndim == 3]  # no hidden activation


def test_places_of_two_coordinates_turn_half_of_the_pairs_each():
    x, places = draw(1, 2, 3, 8), jnp.int32([[[4, 7], [0, 2]]])
    got = rotate(x, places, 50.0)
    for coordinate, channels in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
        expected = rotate(x[..., jnp.array(channels)], places[..., coordinate], 50.0)
        np.testing.assert_allclose(got[..., jnp.array(channels)], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", ["rms_norm", "swiglu", "swiglu again", "rotate", "norm_rotate"])
def test_what_is_kept_for_the_backward(function):
    """Nothing of an activation's size is kept in float32 when the activations are bfloat16."""
    x = jnp.zeros((2, 16, 4, 32), jnp.bfloat16)
    positions = jnp.zeros((2, 16), jnp.int32)
    matrix, down = jnp.zeros((32, 64), jnp.bfloat16), jnp.zeros((64, 32), jnp.bfloat16)
    run, numbers = {
        "rms_norm": (lambda: jax.vjp(lambda x: rms_norm(x, jnp.ones(32), 1e-6), x), x.size),
        "swiglu": (lambda: jax.vjp(lambda x: swiglu(True, x, matrix, matrix, down), x[:, :, 0]), 7 * x[:, :, 0].size),
        "swiglu again": (lambda: jax.vjp(lambda x: swiglu(False, x, matrix, matrix, down), x[:, :, 0]), 0),
        "rotate": (lambda: jax.vjp(lambda x: rotate(x, positions, 10.0), x), 0),
        "norm_rotate": (lambda: jax.vjp(lambda x: norm_rotate(x, jnp.ones((4, 32)), positions, 1e-6, 10.0), x), x.size),
    }[function]
    kept = [leaf for leaf in jax.tree.leaves(run()[1]) if leaf.ndim >= 3]
    assert all(leaf.dtype == jnp.bfloat16 or leaf.shape[-1] == 1 for leaf in kept)
    kept_numbers = sum(leaf.size for leaf in kept if leaf.dtype == jnp.bfloat16)
    assert kept_numbers == (numbers or (x[:, :, 0].size if function == "swiglu again" else 0))
