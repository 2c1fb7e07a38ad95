"""The normal distribution for GELU, against `math.erfc`, which is float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import normal_distribution

A = np.linspace(-12.5, 12.5, 40001).astype(np.float32)  # float32's normal numbers end at Phi(-12.9)
BELOW = np.array([0.5 * math.erfc(-float(a) / math.sqrt(2.0)) for a in A])
DENSITY = np.exp(-0.5 * A.astype(np.float64) ** 2) / math.sqrt(2.0 * math.pi)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 2e-5), ("bfloat16", normal_distribution.RELATIVE_ERROR), ("float16", 3.2e-5)]
)
def test_the_lower_tail_keeps_its_digits(dtype, error):
    """exp(-a^2 / 2) in float32 is off by a^2 / 2 units of its last place: 1e-5 at the ends."""
    below, density = jax.jit(lambda a: normal_distribution.below_and_density(a, dtype))(A)
    assert below.dtype == density.dtype == jnp.float32
    bound = error + 2.0**-24 * (2.0 + A.astype(np.float64) ** 2)
    assert np.all(np.abs(np.asarray(below, np.float64) / BELOW - 1.0) < bound)
    assert np.all(np.abs(np.asarray(density, np.float64) / DENSITY - 1.0) < bound - error + 1e-6)


def test_float32_has_all_digits_where_it_matters():
    near = np.abs(A) < 4
    below = np.asarray(normal_distribution.below_and_density(A[near], jnp.float32)[0], np.float64)
    np.testing.assert_allclose(below, BELOW[near], rtol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_at_the_ends(dtype):
    below, density = normal_distribution.below_and_density(
        jnp.float32([-jnp.inf, -40.0, 40.0, jnp.inf, jnp.nan]), dtype
    )
    np.testing.assert_array_equal(below, [0.0, 0.0, 1.0, 1.0, np.nan])
    np.testing.assert_array_equal(density, [0.0, 0.0, 0.0, 0.0, np.nan])
