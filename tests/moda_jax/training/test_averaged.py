"""The moving average of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moda_jax.config import OptimizerConfig
from moda_jax.parameter import ParameterKind, ParameterKinds
from moda_jax.training.averaged import averaged_params, averaging, restarted_average
from moda_jax.training.optimizer import make_optimizer

KINDS = ParameterKinds((("w", ParameterKind((None,), decays=True)),))


@pytest.mark.parametrize("decay", [0.05, 0.5])
def test_the_average_is_its_recurrence(decay):
    optimizer = optax.chain(optax.sgd(0.1), averaging(decay))
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    expected = weights = np.array([1.0, -2.0])
    for n in range(1, 30):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
        weights = weights - 0.1 * weights
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * weights
    np.testing.assert_allclose(params["w"], weights, rtol=1e-5)
    np.testing.assert_allclose(averaged_params(state)["w"], expected, rtol=1e-5)


def test_the_updates_are_those_of_an_optimizer_without():
    params = {"w": jnp.array([1.0, -2.0])}
    steps = []
    for decay in (0.0, 0.9):
        optimizer = make_optimizer(OptimizerConfig(ema_decay=decay, warmup_steps=0), 5, KINDS)
        state = optimizer.init(params)
        assert (averaged_params(state) is None) == (decay == 0.0)
        steps.append(optimizer.update(params, state, params)[0]["w"])
    np.testing.assert_array_equal(*steps)


def test_an_average_starts_anew_from_other_parameters():
    optimizer = make_optimizer(OptimizerConfig(ema_decay=0.9), 5, KINDS)
    params, others = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    state = restarted_average(state, others)
    np.testing.assert_array_equal(averaged_params(state)["w"], others["w"])
    assert [int(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 0 and leaf.dtype == jnp.int32][-1] == 0
    plain = make_optimizer(OptimizerConfig(), 5, KINDS).init(params)
    assert jax.tree.structure(restarted_average(plain, others)) == jax.tree.structure(plain)
