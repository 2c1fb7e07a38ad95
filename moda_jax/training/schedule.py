"""The learning rate by the number of the update: warm-up, and what follows it.

With n the number of the update, counted from 1, W = warmup_steps, N = num_steps, f = final_learning_rate_fraction and
D = decay_steps, the learning rate is the peak times

    n / W                                           while n < W, and then
    cosine    f + (1 - f) (1 + cos(pi s)) / 2       s = (n - W) / (N - W)
    constant  1
    wsd       f + (1 - f) d(s)                      s = (n - (N - D)) / D, d(s) = 1 while s <= 0
              d(s) = 1 - s, (1 + cos(pi s)) / 2 or 1 - sqrt(s), as decay_shape says

with s at most 1: beyond N the learning rate stays.

The numbers in these formulas are arguments of the compiled train step, a `LearningRatePlan`: runs that differ in them,
but not in `schedule` and `decay_shape`, share one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moda_jax.config import OptimizerConfig

Array = jax.Array

# What is left of the height h when the share s of the decay is done; of "cosine" h is half of the height.
_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "linear": lambda h, s: h * (1.0 - s),
    "cosine": lambda h, s: h * (1.0 + jnp.cos(jnp.pi * s)),
    "sqrt": lambda h, s: h * (1.0 - jnp.sqrt(s)),
}


class LearningRatePlan(NamedTuple):
    """The numbers of a run's schedule, float32 scalars: what the runs of a sweep may differ in.

    Where a formula divides by a number its reciprocal is kept: so does XLA with a constant, and the learning rates of
    a run are the same bits whether its numbers are constants or arguments.

    Attributes:
        learning_rate: the peak.
        matrix_learning_rate: the peak of what Muon updates.
        warmup_steps: W.
        warmup_per_update: 1 / W.
        decay_start: the last update before the decay, W or N - D.
        decay_per_update: the share of the decay that an update does, 1 / (N - W) or 1 / D.
        final_fraction: f.
        height: 1 - f, or half of that where the decay is a cosine.
    """

    learning_rate: Array | np.float32
    matrix_learning_rate: Array | np.float32
    warmup_steps: Array | np.float32
    warmup_per_update: Array | np.float32
    decay_start: Array | np.float32
    decay_per_update: Array | np.float32
    final_fraction: Array | np.float32
    height: Array | np.float32


def make_plan(config: OptimizerConfig, num_steps: int) -> LearningRatePlan:
    """The plan of a run, on the host.

    Args:
        config: the optimizer's section.
        num_steps: updates of the whole run.
    """
    own, final = config.muon.learning_rate, config.final_learning_rate_fraction
    return LearningRatePlan(
        learning_rate=np.float32(config.learning_rate),
        matrix_learning_rate=np.float32(config.learning_rate if own is None else own),
        warmup_steps=np.float32(config.warmup_steps),
        warmup_per_update=_reciprocal(config.warmup_steps),
        decay_start=np.float32(_decay_start(config, num_steps)),
        decay_per_update=_reciprocal(config.decay_steps(num_steps)),
        final_fraction=np.float32(final),
        height=np.float32((1.0 - final) * (0.5 if _decay_shape(config) == "cosine" else 1.0)),
    )


def learning_rate_schedule(
    config: OptimizerConfig, plan: LearningRatePlan | int, *, of_matrices: bool = False
) -> optax.Schedule:
    """The learning rate by the number of updates already done.

    Args:
        config: the optimizer's section, of which nothing is read but `schedule` and `decay_shape` if there is a plan.
        plan: the numbers, which may be traced; or the updates of the whole run, whose plan is made here.
        of_matrices: of what Muon updates.

    Returns:
        count -> float32 scalar; `count` is an int or an int32 scalar array, n - 1.
    """
    plan = plan if isinstance(plan, LearningRatePlan) else make_plan(config, plan)
    peak = plan.matrix_learning_rate if of_matrices else plan.learning_rate

    def after_warmup(n: Array) -> Array | float:
        if config.schedule == "constant":
            return 1.0
        progress = jnp.clip((n - plan.decay_start) * plan.decay_per_update, 0.0, 1.0)
        decayed = plan.final_fraction + _SHAPES[_decay_shape(config)](plan.height, progress)
        return decayed if config.schedule == "cosine" else jnp.where(progress > 0.0, decayed, 1.0)

    def schedule(count: jax.typing.ArrayLike) -> Array:
        n = jnp.asarray(count, jnp.float32) + 1.0
        return peak * jnp.where(n < plan.warmup_steps, n * plan.warmup_per_update, after_warmup(n))

    return schedule


def is_same_plan(config: OptimizerConfig, num_steps: int, other: int, step: int) -> bool:
    """Whether a run that did `step` updates of `num_steps` has so far had the learning rates of one of `other`."""
    if config.schedule == "constant" or config.final_learning_rate_fraction == 1.0:
        return True
    return step <= min(_decay_start(config, steps) for steps in (num_steps, other))


def _decay_start(config: OptimizerConfig, num_steps: int) -> int:
    """The last update at the peak."""
    return config.warmup_steps if config.schedule == "cosine" else num_steps - config.decay_steps(num_steps)


def _decay_shape(config: OptimizerConfig) -> str:
    return "cosine" if config.schedule == "cosine" else config.decay_shape


def _reciprocal(steps: int) -> np.float32:
    return np.float32(1) / np.float32(max(steps, 1))
