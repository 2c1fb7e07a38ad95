"""The balanced order of tokens over the context axis; the op itself is tested by training on it."""

import numpy as np
import pytest

from moda_jax.parallel.attention import balanced_order


@pytest.mark.parametrize("context", [1, 2, 4, 8])
def test_every_token_once_and_equal_causal_work(context):
    order = balanced_order(64, context)
    assert sorted(order) == list(range(64))
    work = (order + 1).reshape(context, -1).sum(axis=1)  # keys that each device's queries see
    assert len(set(work.tolist())) == 1


def test_devices_hold_an_early_and_a_late_piece():
    np.testing.assert_array_equal(balanced_order(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(balanced_order(5, 1), range(5))
