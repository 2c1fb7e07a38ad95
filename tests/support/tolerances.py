"""The one table of tolerances for attention, and the comparison that uses it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

# Relative L2 error against float64, for every output and gradient of a float32 computation; for the narrow dtypes also
# what is always allowed (lse is float32 there too).
FLOAT32 = 1e-5

# bfloat16 and float16: how many times the error of the dense computation in the same dtype.
DENSE_FACTOR_OUTPUT = 2.0
DENSE_FACTOR_GRADIENT = 3.0


def bound(name: str, dtype: np.dtype, dense_error: float | None) -> float:
    """The largest relative L2 error that `name` ("out", "lse" or "d...") may have in `dtype`."""
    if dtype == jnp.float32:
        return FLOAT32
    factor = DENSE_FACTOR_GRADIENT if name.startswith("d") else DENSE_FACTOR_OUTPUT
    return max(FLOAT32, factor * dense_error)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """L2 error relative to the expected norm; for an expected zero the root mean square of what came."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.size == 0:
        return 0.0
    same = actual == expected  # also two equal infinities
    difference = np.where(same, 0.0, actual - np.where(same, 0.0, expected))
    norm = np.linalg.norm(np.where(np.isfinite(expected), expected, 0.0))
    return float(np.linalg.norm(difference) / (norm if norm > 1e-12 else np.sqrt(actual.size)))


def assert_close(
    actual: dict[str, Array], expected: dict[str, np.ndarray], dtype: np.dtype, dense: dict[str, Array] | None = None
) -> None:
    """Every array of `actual` is within its bound of `expected`; `dense` is needed for a dtype other than float32.

    The failure says, for every array that is off, its name, error, bound and the worst coordinate.
    """
    failures = []
    for name, array in actual.items():
        came, wanted = np.asarray(array, np.float64), expected[name]
        if came.shape != wanted.shape:
            failures.append(f"{name}: shape {came.shape}, expected {wanted.shape}")
            continue
        limit = bound(name, dtype, None if dtype == jnp.float32 else relative_error(dense[name], wanted))
        error = relative_error(came, wanted)
        if not error <= limit:  # a NaN fails
            distance = np.abs(came - wanted)
            worst = np.unravel_index(np.argmax(np.where(np.isnan(distance), np.inf, distance)), came.shape)
            worst = tuple(int(index) for index in worst)
            failures.append(
                f"{name}: relative error {error:.3g}, allowed {limit:.3g}; worst at {worst}: "
                f"{came[worst]:.6g}, expected {wanted[worst]:.6g}"
            )
    assert not failures, "\n".join(failures)
