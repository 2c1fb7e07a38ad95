"""Sums of rows by index, against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moda_jax.numerics.row_sums import BLOCK, sum_rows


def oracle(indices, rows, num_rows):
    out = np.zeros((num_rows, rows.shape[1]))
    for index, row in zip(indices, np.asarray(rows, np.float64), strict=True):
        if 0 <= index < num_rows:
            out[index] += row
    return out


def check(indices, num_rows, dtype=np.float32, width=3):
    rows = np.random.default_rng(len(indices)).normal(size=(len(indices), width)).astype(np.float32)
    rows = jnp.asarray(rows, dtype)
    came = jax.jit(sum_rows, static_argnums=2)(jnp.asarray(indices, jnp.int32), rows, num_rows)
    assert came.shape == (num_rows, width) and came.dtype == jnp.float32
    np.testing.assert_allclose(came, oracle(indices, rows, num_rows), rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3 * BLOCK), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_any_indices(count, num_rows, share_of_one, seed):
    """`share_of_one`: how many rows have one and the same index, as a line break has in a text."""
    random = np.random.default_rng(seed)
    indices = random.integers(0, num_rows, size=count)
    indices[random.random(count) < share_of_one] = random.integers(num_rows)
    check(indices, num_rows)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "runs",
    [[5 * BLOCK], [BLOCK] * 4, [BLOCK - 1, 3 * BLOCK + 1, 1, BLOCK], [1, 2 * BLOCK - 1, BLOCK + 7], [1]],
    ids=str,
)
def test_runs_over_many_blocks(runs, dtype):
    """Run r has index 2 r + 1: sorted, a run ends inside a block, at its end, or spans whole blocks."""
    indices = np.repeat(2 * np.arange(len(runs)) + 1, runs)
    check(np.random.default_rng(0).permutation(indices), 2 * len(runs) + 1, dtype)


def test_indices_outside_count_for_nothing():
    check(np.array([-1, 0, 7, 3, 2**30, 6, 0]), 7)
    check(np.full(200, 9), 4)


def test_no_element_is_written_twice():
    shapes = jax.ShapeDtypeStruct((300,), jnp.int32), jax.ShapeDtypeStruct((300, 4), jnp.bfloat16)
    text = jax.jit(sum_rows, static_argnums=2).lower(*shapes, 50).as_text()
    assert text.count('"stablehlo.scatter"') == text.count("unique_indices = true") == 1
