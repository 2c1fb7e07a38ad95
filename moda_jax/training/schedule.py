"""The learning rate by the number of the update: warm-up, and what follows it.

With n the number of the update, counted from 1, W = warmup_steps, N = num_steps, f = final_learning_rate_fraction and
D = decay_steps, the learning rate is the peak times

    n / W                                           while n < W, and then
    cosine    f + (1 - f) (1 + cos(pi s)) / 2       s = (n - W) / (N - W)
    constant  1
    wsd       f + (1 - f) d(s)                      s = (n - (N - D)) / D, d(s) = 1 while s <= 0
              d(s) = 1 - s, (1 + cos(pi s)) / 2 or 1 - sqrt(s), as decay_shape says

with s at most 1: beyond N the learning rate stays.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moda_jax.config import OptimizerConfig

Array = jax.Array

# What is left of a height when the share s of the decay is done.
_SHAPES: dict[str, Callable[[float, Array], Array]] = {
    "linear": lambda height, s: height * (1.0 - s),
    "cosine": lambda height, s: height * 0.5 * (1.0 + jnp.cos(jnp.pi * s)),
    "sqrt": lambda height, s: height * (1.0 - jnp.sqrt(s)),
}


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of updates already done.

    Args:
        config: the optimizer's section.
        num_steps: updates of the whole run.

    Returns:
        count -> float32 scalar; `count` is an int or an int32 scalar array, n - 1.
    """
    decay_steps = config.decay_steps(num_steps)
    decay_start = _decay_start(config, num_steps)
    final = config.final_learning_rate_fraction

    def after_warmup(n: Array) -> Array | float:
        if config.schedule == "constant":
            return 1.0
        progress = jnp.clip((n - decay_start) / decay_steps, 0.0, 1.0)
        if config.schedule == "cosine":
            return final + _SHAPES["cosine"](1.0 - final, progress)
        return jnp.where(progress > 0.0, final + _SHAPES[config.decay_shape](1.0 - final, progress), 1.0)

    def schedule(count: jax.typing.ArrayLike) -> Array:
        n = jnp.asarray(count, jnp.float32) + 1.0
        warmup = n / max(config.warmup_steps, 1)
        return config.learning_rate * jnp.where(n < config.warmup_steps, warmup, after_warmup(n))

    return schedule


def is_same_plan(config: OptimizerConfig, num_steps: int, other: int, step: int) -> bool:
    """Whether a run that did `step` updates of `num_steps` has so far had the learning rates of one of `other`."""
    if config.schedule == "constant" or config.final_learning_rate_fraction == 1.0:
        return True
    return step <= min(_decay_start(config, steps) for steps in (num_steps, other))


def _decay_start(config: OptimizerConfig, num_steps: int) -> int:
    """The last update at the peak."""
    return config.warmup_steps if config.schedule == "cosine" else num_steps - config.decay_steps(num_steps)
