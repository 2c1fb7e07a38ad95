"""The hand-written backward passes of norms and biases, against autodiff of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.hand_written_backward import assert_gradients_equal, draw, numbers_kept

from moda_jax.model.layers import GELUNetwork, Projection, layer_norm, rms_norm


def test_rms_norm():
    def plain(x, scale):
        return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)

    arguments = draw(2, 3, 8), draw(8, seed=1)
    assert_gradients_equal(lambda x, scale: rms_norm(x, scale, 0.1), plain, arguments, argnums=(0, 1))


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


def test_a_gelu_network_computed_again_is_the_same():
    options = {"bias": True, "initializer_range": 0.3, "dtype": jnp.float32}
    kept, again = (GELUNetwork(8, 16, keep_hidden=keep, rngs=nnx.Rngs(0), **options) for keep in (True, False))
    assert_gradients_equal(again, kept, (draw(2, 3, 8),), argnums=(0,))
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(again, draw(2, 3, 8))[1]) if leaf.shape[-1:] == (16,)]
    assert not [leaf for leaf in kept if leaf.ndim == 3]  # no hidden activation


def test_what_a_norm_keeps_for_the_backward():
    """Its input, not widened."""
    x = jnp.zeros((2, 16, 4, 32), jnp.bfloat16)
    assert numbers_kept(lambda x: rms_norm(x, jnp.ones(32), 1e-6), x) == x.size
    assert numbers_kept(lambda x: layer_norm(x, jnp.ones(32), jnp.ones(32), 1e-6), x) == x.size
