"""Weighted sums of a token's slots: their kernels beside XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.weighted_sums import weighted_sums, weighted_sums_backward


def draw(tokens=4, sums=2):
    """Two slots of three are filled; the other holds NaN."""
    rng = np.random.default_rng(0)
    hidden, dhidden = (rng.standard_normal((2, tokens, 3, 128)) for _ in range(2))
    hidden[:, :, 2] = np.nan
    weights, dout = rng.standard_normal((2, tokens, sums, 3)), rng.standard_normal((2, tokens, sums, 128))
    half = jnp.bfloat16
    return jnp.asarray(hidden, half), jnp.float32(weights), jnp.asarray(dout, half), jnp.asarray(dhidden, half)


def run(implementation, hidden, weights, dout, dhidden):
    length = jnp.int32(2)
    out = weighted_sums(hidden, weights, length, implementation=implementation)
    more = weighted_sums_backward(hidden, weights, length, dout, dhidden, implementation=implementation)
    return jax.tree.leaves((out, more))


def test_kernels_are_xla():
    """Interpreted, where there is no Hopper GPU."""
    for came, expected in zip(run("mosaic_gpu", *draw()), run("xla", *draw()), strict=True):
        assert came.dtype == expected.dtype and came.shape == expected.shape
        error = np.asarray(came, np.float64) - np.asarray(expected, np.float64)
        assert np.linalg.norm(error) < 5e-3 * np.linalg.norm(np.asarray(expected, np.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 3}, "6 tokens: expected a multiple of 4"), ({"sums": 5}, "5 sums: expected at most 4")],
)
def test_what_the_kernels_do_not_take_is_xlas_unless_they_were_asked_for(monkeypatch, options, message):
    with pytest.raises(NotImplementedError, match=message):
        run("mosaic_gpu", *draw(**options))
    with pytest.raises(ValueError, match="implementation='cuda': expected None or one of"):
        run("cuda", *draw(**options))
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))  # as on a Hopper GPU
    for came, expected in zip(run(None, *draw(**options)), run("xla", *draw(**options)), strict=True):
        np.testing.assert_array_equal(np.asarray(came, np.float32), np.asarray(expected, np.float32))
