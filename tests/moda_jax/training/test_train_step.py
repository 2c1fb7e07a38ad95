import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import OptimizerConfig, TrainConfig
from moda_jax.data.packing import Batch
from moda_jax.numerics.cross_entropy import loss_sums
from moda_jax.parameter import ParameterKind, ParameterKinds
from moda_jax.tasks.language import LanguageObjective
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.schedule import learning_rate_schedule
from moda_jax.training.state import TrainState
from moda_jax.training.train_step import make_eval_step, make_train_step

V, D, B, T = 13, 5, 8, 6


class Bigram:
    """The smallest model with a matrix and a table: it stands in for the Transformer, which has its own tests."""

    def __call__(self, params, tokens, segment_ids=None, positions=None):
        return self.hidden(params, tokens) @ params["head"]["kernel"]

    def hidden(self, params, tokens, segment_ids=None, positions=None):
        return params["embedding"]["table"][tokens]

    def vocab_size(self, params):
        return V

    def output_table(self, params):
        return params["head"]["kernel"].T


bigram = Bigram()
KINDS = ParameterKinds((
    ("embedding.table", ParameterKind(("vocabulary", "width"))),
    ("head.kernel", ParameterKind(("width", "vocabulary"), decays=True)),
))  # fmt: skip


def new_state(optimizer):
    random = np.random.default_rng(0)
    params = {
        "embedding": {"table": jnp.float32(random.normal(size=(V, D)))},
        "head": {"kernel": jnp.float32(random.normal(size=(D, V)))},
    }
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))


def new_batch(seed=1, rows=B):
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(0, V, size=(2, rows, T)).astype(np.int32)
    mask = (random.random(size=(rows, T)) < 0.7).astype(np.float32)
    mask[0], mask[1] = 0, 1  # rows, and so micro-batches, of unequal weight
    return Batch(tokens, targets, np.zeros_like(tokens), np.zeros_like(tokens), mask)


def build(optimizer_config=None, **train_fields):
    config = TrainConfig(**{"num_steps": 10, "batch_size": B, "z_loss": 0.01} | train_fields)
    optimizer_config = optimizer_config or OptimizerConfig(warmup_steps=2, learning_rate=0.1)
    optimizer = make_optimizer(optimizer_config, config.num_steps, KINDS)
    schedule = learning_rate_schedule(optimizer_config, config.num_steps)
    objective = LanguageObjective(bigram)
    step = make_train_step(objective, optimizer, schedule, config)
    return new_state(optimizer), step, make_eval_step(objective, config)


def objective(params, batch, z_loss):
    sums = loss_sums(bigram(params, batch.tokens), batch.targets, batch.target_mask)
    return (sums.loss + z_loss * sums.z_loss) / sums.num_targets


def test_metrics_say_what_the_step_did():
    state, step, _ = build(z_loss=0.5)
    batch = new_batch()
    new, metrics = jax.jit(step)(state, batch)
    assert float(metrics.num_targets) == batch.target_mask.sum()
    np.testing.assert_allclose(metrics.loss, objective(state.params, batch, 0.0), rtol=1e-6)  # without z-loss
    gradient = jax.grad(objective)(state.params, batch, 0.5)  # with it
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert float(metrics.learning_rate) == pytest.approx(0.05)
    assert int(new.step) == 1
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


def test_grad_norm_is_that_before_clipping():
    norms = []
    for clip in (1e-3, 1e3):
        state, step, _ = build(OptimizerConfig(warmup_steps=2, gradient_clip_norm=clip))
        norms.append(float(jax.jit(step)(state, new_batch())[1].grad_norm))
    assert norms[0] == norms[1] > 1e-3


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_one_big_batch(parts):
    state, whole, whole_eval = build()
    _, accumulated, accumulated_eval = build(accumulation_steps=parts)
    batch = new_batch()
    expected_state, expected = jax.jit(whole)(state, batch)
    new, metrics = jax.jit(accumulated)(state, batch)
    np.testing.assert_allclose(metrics, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new.params, expected_state.params)
    np.testing.assert_allclose(accumulated_eval(state.params, batch), whole_eval(state.params, batch), rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_without_targets_is_no_nan(parts):
    state, step, _ = build(accumulation_steps=parts)
    batch = new_batch()._replace(target_mask=np.zeros((B, T), np.float32))
    new, metrics = jax.jit(step)(state, batch)
    assert float(metrics.loss) == 0.0
    assert float(metrics.grad_norm) == 0.0
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(new.params))
    np.testing.assert_array_equal(new.params["embedding"]["table"], state.params["embedding"]["table"])


def test_the_old_state_can_be_donated():
    state, step, _ = build()
    jitted = jax.jit(step, donate_argnums=0)
    for seed in range(3):
        old, (state, metrics) = state, jitted(state, new_batch(seed))
        assert old.params["head"]["kernel"].is_deleted()
    assert float(metrics.loss) > 0


def test_steps_lower_the_loss():
    state, step, evaluate = build(num_steps=60)
    step, batch = jax.jit(step), new_batch()
    before = evaluate(state.params, batch)
    for _ in range(60):
        state, _ = step(state, batch)
    after = evaluate(state.params, batch)
    assert float(after.loss) < 0.8 * float(before.loss)
    assert float(after.num_targets) == batch.target_mask.sum()


def test_state_is_immutable():
    state, _, _ = build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 3
