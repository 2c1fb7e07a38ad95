"""LayerNorm, and GELU with its bias: XLA's formulas against autodiff, and which implementation serves a call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import biased_gelu, dispatch, layer_norm, norm


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def on_hopper(monkeypatch):
    """`None` finds the kernels, as on a Hopper."""
    caches = layer_norm._best, biased_gelu._best
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))
    yield
    for cache in caches:
        cache.cache_clear()


def plain_norm(x, scale, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return scale * centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 0.1) + bias


def plain_gelu(x, bias):
    a = x + bias
    return a * jax.scipy.stats.norm.cdf(a)


def test_xla_s_layer_norm_equals_autodiff():
    x, dy, scale, bias = draw(2, 3, 32), draw(2, 3, 32, seed=1), draw(32, seed=2), draw(32, seed=3)
    y = layer_norm.layer_norm(x, scale, bias, epsilon=0.1, implementation="xla")
    np.testing.assert_allclose(y, plain_norm(x, scale, bias), rtol=1e-5, atol=1e-5)
    got = layer_norm.layer_norm_backward(x, dy, scale, epsilon=0.1, implementation="xla")
    for a, b in zip(got, jax.vjp(plain_norm, x, scale, bias)[1](dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_xla_s_gelu_equals_autodiff():
    x, dy, bias = draw(2, 3, 32), draw(2, 3, 32, seed=1), draw(32, seed=2)
    np.testing.assert_allclose(biased_gelu.biased_gelu(x, bias), plain_gelu(x, bias), rtol=1e-5, atol=1e-5)
    got = biased_gelu.biased_gelu_backward(x, bias, dy, implementation="xla")
    for a, b in zip(got, jax.vjp(plain_gelu, x, bias)[1](dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_kernels_and_xla_agree(on_hopper):
    x, dy = (draw(2, 3, 192, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    scale, bias = draw(192, seed=2), draw(192, seed=3).astype(jnp.bfloat16).astype(jnp.float32)
    for run in (
        lambda how: (
            layer_norm.layer_norm(x, scale, bias, epsilon=0.1, implementation=how),
            *layer_norm.layer_norm_backward(x, dy, scale, epsilon=0.1, implementation=how),
        ),
        lambda how: biased_gelu.biased_gelu_backward(x, bias, dy, implementation=how),
    ):
        chosen, kernel, xla = run(None), run("mosaic_gpu"), run("xla")
        jax.tree.map(np.testing.assert_array_equal, chosen, kernel)
        for a, b in zip(kernel, xla, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2, atol=4e-2)


def test_what_the_kernels_do_not_take_goes_to_xla(on_hopper, caplog):
    x, vector = draw(2, 3, 24).astype(jnp.bfloat16), jnp.ones(24)
    with caplog.at_level("INFO", logger="pallas_kernels"):
        assert layer_norm.layer_norm(x, vector, vector, epsilon=0.1).shape == x.shape
        assert biased_gelu.biased_gelu_backward(x, vector, x)[0].shape == x.shape
    assert "LayerNorm: xla (layer_norm: 24 columns" in caplog.text
    assert "GELU's backward: xla (gelu_backward: 24 columns" in caplog.text
    with pytest.raises(NotImplementedError, match="24 columns"):
        layer_norm.layer_norm_backward(x, x, vector, epsilon=0.1, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="24 columns"):
        biased_gelu.biased_gelu_backward(x, vector, x, implementation="mosaic_gpu")


def test_names():
    x, vector = draw(2, 3, 24), jnp.ones(24)
    expected = f"'triton': expected None or one of {norm.IMPLEMENTATIONS}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=expected):
        layer_norm.layer_norm(x, vector, vector, epsilon=0.1, implementation="triton")
    with pytest.raises(ValueError, match=expected):
        biased_gelu.biased_gelu_backward(x, vector, x, implementation="triton")
