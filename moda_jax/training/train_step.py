"""One optimizer step and one evaluation step: pure functions, jitted by the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moda_jax.config import TrainConfig
from moda_jax.tasks.task import Objective
from moda_jax.training.skipped_updates import choose_update
from moda_jax.training.state import TrainState

Array = jax.Array


class StepMetrics(NamedTuple):
    """What a step reports, float32 scalars (but for the counts) that stay on the device until somebody reads them.

    Attributes:
        loss: mean over the step's targets, of language modelling in nats and without z-loss.
        grad_norm: global norm of the gradient before clipping.
        learning_rate: that the update was done with.
        num_targets: targets that counted, over all micro-batches.
        skipped, skipped_in_a_row: steps without an update so far, see `UpdateCounts`; int32.
    """

    loss: Array
    grad_norm: Array
    learning_rate: Array
    num_targets: Array
    skipped: Array
    skipped_in_a_row: Array


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, schedule: optax.Schedule, config: TrainConfig
) -> Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]:
    """The function (state, batch) -> (state, metrics); jit it with the state donated.

    What is minimised is the mean over all targets of the step (over all micro-batches and devices). A batch without
    targets gives loss 0 and gradient 0. A step whose loss or gradient is not finite updates nothing but the counts, see
    `skipped_updates`.

    Args:
        objective: the task's.
        optimizer, schedule: see `optimizer`.
        config: the training section, for `accumulation_steps`, `z_loss` and `max_skipped_in_a_row`.
    """

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        num_targets = objective.weight(batch)
        divisor = jnp.maximum(num_targets, 1.0)

        def mean(params: Any, micro_batch: Any) -> tuple[Array, Array]:
            total, sums = objective.loss(params, micro_batch, config.z_loss)
            return total / divisor, sums.loss / divisor

        def gradient(micro_batch: Any) -> tuple[Array, Any]:
            (_, loss), grads = jax.value_and_grad(mean, has_aux=True)(state.params, micro_batch)
            return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        loss, grads = _sum_over_micro_batches(gradient, batch, config.accumulation_steps)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
            grad_norm = optax.tree.norm(grads)
            (params, optimizer_state), counts = choose_update(
                jnp.isfinite(loss) & jnp.isfinite(grad_norm), state.counts,
                (optax.apply_updates(state.params, updates), optimizer_state), (state.params, state.optimizer_state),
                config.max_skipped_in_a_row,
            )  # fmt: skip
            learning_rate = schedule(state.counts.updates)
        metrics = StepMetrics(
            loss, grad_norm, learning_rate, num_targets, counts.skipped, counts.skipped_in_a_row
        )  # fmt: skip
        return TrainState(state.step + 1, params, optimizer_state, state.key, counts), metrics

    return train_step


def make_eval_step(objective: Objective, config: TrainConfig) -> Callable[[Any, Any], Any]:
    """The function (params, batch) -> the objective's sums, in micro-batches of the training's size; jit it.

    Args:
        objective: the task's.
        config: the training section, for `accumulation_steps`.
    """

    def eval_step(params: Any, batch: Any) -> Any:
        return _sum_over_micro_batches(
            lambda micro_batch: objective.evaluate(params, micro_batch), batch, config.accumulation_steps
        )

    return eval_step


def _sum_over_micro_batches(function: Callable[[Any], Any], batch: Any, count: int) -> Any:
    """Sum of `function` over `count` micro-batches, one at a time. Micro-batch i takes rows i, i + count, ...: when the
    rows are sharded in blocks over devices, every device then has its share of each micro-batch."""
    if count == 1:
        return function(batch)
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro_batches))
    )
    total, _ = jax.lax.scan(
        lambda sums, micro_batch: (jax.tree.map(jnp.add, sums, function(micro_batch)), None), zeros, micro_batches
    )
    return total
