"""The learning rate of every update, against plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import OptimizerConfig
from moda_jax.training.schedule import is_same_plan, learning_rate_schedule, make_plan

SHAPES = {
    "linear": lambda s: 1 - s,
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
    "sqrt": lambda s: 1 - math.sqrt(s),
}


def rates(config, num_steps, updates):
    """Of updates 1 to `updates`."""
    return np.array(jax.jit(jax.vmap(learning_rate_schedule(config, num_steps)))(jnp.arange(updates)))


def test_schedule_values():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_learning_rate_fraction=0.1)
    schedule = learning_rate_schedule(config, 24)
    # Update n is schedule(n - 1): linear to the peak at n = 4, half a cosine to a tenth at n = 24.
    expected = [2.0 * n / 4 for n in range(1, 5)]
    expected += [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (n - 4) / 20)) / 2) for n in range(5, 25)]
    np.testing.assert_allclose([schedule(n - 1) for n in range(1, 25)], expected, rtol=1e-6)
    assert float(schedule(23)) == pytest.approx(0.2)
    assert float(schedule(1000)) == pytest.approx(0.2)
    assert float(schedule(jnp.int32(13))) == pytest.approx(1.1)


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0, [0.55, 0.1]), (2, [0.5, 1.0])])
def test_schedule_without_warmup_and_without_decay(warmup_steps, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup_steps)
    np.testing.assert_allclose([learning_rate_schedule(config, 2)(n) for n in range(2)], expected, rtol=1e-6)


def first_version(peak, warmup_steps, num_steps):
    """The default as it was before there were others, its numbers constants of the program."""

    def schedule(count):
        n = jnp.asarray(count, jnp.float32) + 1.0
        warmup = n / max(warmup_steps, 1)
        progress = jnp.clip((n - warmup_steps) / max(num_steps - warmup_steps, 1), 0.0, 1.0)
        cosine = 0.1 + (1.0 - 0.1) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(n < warmup_steps, warmup, cosine)

    return schedule


older_runs = pytest.mark.parametrize(
    ("peak", "warmup_steps", "num_steps"), [(3e-4, 2000, 10000), (5e-3, 50, 1400), (1.0, 0, 7)]
)


@older_runs
def test_the_default_is_bit_for_bit_what_it_was_before_there_were_others(peak, warmup_steps, num_steps):
    """Runs that were begun then go on with the learning rates that they were planned with."""
    config = OptimizerConfig(learning_rate=peak, warmup_steps=warmup_steps)
    expected = jax.jit(jax.vmap(first_version(peak, warmup_steps, num_steps)))(jnp.arange(num_steps + 2))
    np.testing.assert_array_equal(rates(config, num_steps, num_steps + 2), expected)


@pytest.mark.slow
@pytest.mark.precise
@older_runs
def test_as_arguments_the_numbers_give_the_same_bits(peak, warmup_steps, num_steps):
    """With XLA's own emitters, which users have; without them a program with constants rounds some rates otherwise."""
    config = OptimizerConfig(learning_rate=peak, warmup_steps=warmup_steps)
    counts = jnp.arange(num_steps + 2)
    expected = jax.jit(jax.vmap(first_version(peak, warmup_steps, num_steps)))(counts)
    found = jax.jit(lambda plan: jax.vmap(learning_rate_schedule(config, plan))(counts))(make_plan(config, num_steps))
    np.testing.assert_array_equal(found, expected)


def test_a_constant_one_stays_at_the_peak():
    found = rates(OptimizerConfig(learning_rate=3.0, schedule="constant", warmup_steps=4), 10, 14)
    np.testing.assert_allclose(found, [0.75, 1.5, 2.25] + [3.0] * 11, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_stable_decay(shape):
    config = OptimizerConfig(
        learning_rate=2.0, schedule="wsd", warmup_steps=3, decay_fraction=0.25, decay_shape=shape,
        final_learning_rate_fraction=0.3,
    )  # fmt: skip
    found = rates(config, 40, 45)
    np.testing.assert_allclose(found[:3], [2 / 3, 4 / 3, 2.0], rtol=1e-6)
    assert (found[3:30] == 2.0).all()  # exactly: the stable part has no rounding of its own
    expected = [2.0 * (0.3 + 0.7 * SHAPES[shape]((n - 30) / 10)) for n in range(31, 41)]
    np.testing.assert_allclose(found[30:40], expected, rtol=1e-6)
    np.testing.assert_allclose(found[40:], [0.6] * 5, rtol=1e-6)


def test_whether_a_longer_run_has_the_same_beginning():
    stable = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert is_same_plan(stable, 100, 200, 80)  # the decay of the shorter one begins behind update 80
    assert not is_same_plan(stable, 100, 200, 81)
    assert not is_same_plan(stable, 200, 100, 81)
    assert is_same_plan(OptimizerConfig(schedule="constant"), 100, 200, 100)
    assert is_same_plan(OptimizerConfig(warmup_steps=10), 100, 200, 10)
    assert not is_same_plan(OptimizerConfig(warmup_steps=10), 100, 200, 11)
    assert is_same_plan(OptimizerConfig(final_learning_rate_fraction=1.0), 100, 200, 90)
