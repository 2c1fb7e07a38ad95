"""LayerNorm's kernels and GELU's backward: interpreted with race detection, lowered for CUDA, and run on the chip."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.mosaic_gpu import gelu_backward as gelu
from pallas_kernels.mosaic_gpu import layer_norm as layer_norms
from pallas_kernels.mosaic_gpu.gelu_backward import gelu_backward
from pallas_kernels.mosaic_gpu.layer_norm import layer_norm, layer_norm_backward

EPSILON = 1e-2
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}  # relative L2 error of what is rounded, whose rounding is all there is
SUMS = 1e-5
on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]

# rows, columns, dtype
CASES = [(37, 192, jnp.bfloat16), (3, 384, jnp.float16), (5, 1024, jnp.bfloat16)]
GELU_CASES = [(9, 768, jnp.bfloat16), (5, 1536, jnp.float16), (37, 64, jnp.bfloat16)]
LARGE = [(100864, 192, jnp.bfloat16), (4097, 384, jnp.float16), (32768, 1024, jnp.bfloat16), (999, 768, jnp.bfloat16)]
GELU_LARGE = [(6000, 768, jnp.bfloat16), (1025, 1536, jnp.float16), (501, 3072, jnp.bfloat16)]


def draw(rows, columns, dtype):
    """x, dy, scale, bias."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((rows, columns)) + mean, dtype) for mean in (3, 0))
    return x, dy, *(jnp.asarray(rng.standard_normal(columns) / 2 + mean, jnp.float32) for mean in (1, 0))


def norm_oracle(x, dy, scale, bias):
    """y, dx, dscale and dbias in float64."""
    x, dy, scale, bias = (np.asarray(a, np.float64) for a in (x, dy, scale, bias))
    variance = np.var(x, axis=1, keepdims=True) + EPSILON
    n, g = (x - np.mean(x, axis=1, keepdims=True)) / np.sqrt(variance), scale * dy
    columns = x.shape[1]
    # The Jacobian of a row's n: (1 - 1 1^T / D - n n^T / D) / sqrt(variance).
    dx = (g - (g @ np.ones((columns, columns)) + n * np.sum(g * n, axis=1, keepdims=True)) / columns) / variance**0.5
    return scale * n + bias, dx, np.sum(dy * n, axis=0), np.sum(dy, axis=0)


def gelu_oracle(x, bias, dy):
    """dx and dbias in float64."""
    x, bias, dy = (np.asarray(a, np.float64) for a in (x, bias, dy))
    a = x + bias
    below = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(a)
    dx = dy * (below + a * np.exp(-a * a / 2) / math.sqrt(2 * math.pi))
    return dx, np.sum(dx, axis=0)


def compare(names, got, wanted, dtype):
    """Rounded arrays and then sums."""
    for name, a, b in zip(names, got, wanted, strict=True):
        tolerance = SUMS if a.ndim == 1 else TOLERANCE[jnp.dtype(dtype).name]
        assert a.dtype == (jnp.float32 if a.ndim == 1 else dtype)
        assert a.shape == b.shape
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < tolerance, f"{name}: {error:.1e}"
    if jax.default_backend() != "gpu":
        assert not gpu_callbacks.get_races().races_found


def check_norm(case):
    x, dy, scale, bias = draw(*case)
    y = layer_norm(x, scale, bias, epsilon=EPSILON)
    gradients = layer_norm_backward(x, dy, scale, epsilon=EPSILON)
    compare(("y", "dx", "dscale", "dbias"), (y, *gradients), norm_oracle(x, dy, scale, bias), case[2])
    return y, *gradients


def check_gelu(case):
    x, dy, _, bias = draw(*case)
    gradients = gelu_backward(x, bias, dy)
    compare(("dx", "dbias"), gradients, gelu_oracle(x, bias, dy), case[2])
    return gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm(case):
    check_norm(case)


@pytest.mark.parametrize("case", GELU_CASES, ids=str)
def test_gelu(case):
    check_gelu(case)


def test_more_rows_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(layer_norms, "CTAS", 2)
    monkeypatch.setattr(layer_norms, "BACKWARD_CTAS", {3: 2})
    monkeypatch.setattr(gelu, "CTAS", 3)
    check_norm((70, 128, jnp.bfloat16))
    check_gelu((50, 320, jnp.bfloat16))


def test_two_sets_of_rows_at_a_time():
    x, _, scale, bias = draw(100, 192, jnp.bfloat16)
    one, two = (layer_norm(x, scale, bias, epsilon=EPSILON, sets=sets) for sets in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_a_row_far_from_zero_keeps_its_variance():
    """The mean is taken off before anything is squared."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(1000 + 8 * rng.integers(-2, 3, (16, 64)), jnp.bfloat16)  # in steps that bfloat16 has there
    ones = jnp.ones(64)
    y = layer_norm(x, ones, 0 * ones, epsilon=1e-6)
    wide = np.asarray(x, np.float64)
    wanted = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, atol=1e-2)


def lowered(run, *arrays):
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_layer_norm_lowers_for_cuda(case):
    x, dy, scale, bias = jax.eval_shape(lambda: draw(*case))
    options = {"epsilon": EPSILON, "interpret": False}
    assert "moda_layer_norm_R" in lowered(functools.partial(layer_norm, **options), x, scale, bias)
    assert "moda_layer_norm_backward_R" in lowered(functools.partial(layer_norm_backward, **options), x, dy, scale)


@pytest.mark.parametrize("case", GELU_LARGE, ids=str)
def test_gelu_lowers_for_cuda(case):
    x, dy, _, bias = jax.eval_shape(lambda: draw(*case))
    assert "moda_gelu_backward_R" in lowered(functools.partial(gelu_backward, interpret=False), x, bias, dy)


@pytest.mark.parametrize(
    ("check", "dtype", "columns", "message"),
    [
        (layer_norms.check_supported, jnp.float32, 192, "layer_norm: dtype=float32: expected bfloat16"),
        (layer_norms.check_supported, jnp.bfloat16, 96, "layer_norm: 96 columns: expected 1 to 4 times"),
        (layer_norms.check_supported, jnp.bfloat16, 320, "layer_norm: 320 columns"),
        (layer_norms.check_supported, jnp.bfloat16, 2048, "layer_norm: 2048 columns"),
        (gelu.check_supported, jnp.float32, 256, "gelu_backward: dtype=float32"),
        (gelu.check_supported, jnp.bfloat16, 96, "gelu_backward: 96 columns: expected a multiple of 64"),
    ],
)
def test_what_is_not_supported(check, dtype, columns, message):
    with pytest.raises(NotImplementedError, match=message):
        check(dtype=dtype, columns=columns)


@pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(check_norm, case, marks=on_the_gpu) for case in LARGE]
    + [pytest.param(check_gelu, case, marks=on_the_gpu) for case in GELU_LARGE],
)
def test_on_the_gpu(check, case):
    first, again = check(case), check(case)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again, strict=True))
