"""OLMo 2's optimizer: AdamW with warm-up, cosine decay, clipping, and no weight decay on norms and embeddings."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moda_jax.config import OptimizerConfig
from moda_jax.parameter import ParameterKinds
from moda_jax.training.averaged import averaging


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of updates already done.

    Update number n (counted from 1) runs at peak * n / warmup_steps during warm-up, at the peak when n = warmup_steps,
    and then falls along half a cosine to final_learning_rate_fraction of the peak at n = num_steps, where it stays.

    Args:
        config: the optimizer's section.
        num_steps: updates of the whole run.

    Returns:
        count -> float32 scalar; `count` is an int or an int32 scalar array, n - 1.
    """
    decay_steps = max(num_steps - config.warmup_steps, 1)
    final = config.final_learning_rate_fraction

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(count, jnp.float32) + 1.0
        warmup = n / max(config.warmup_steps, 1)
        progress = jnp.clip((n - config.warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(n < config.warmup_steps, warmup, cosine)

    return schedule


def make_optimizer(config: OptimizerConfig, num_steps: int, kinds: ParameterKinds) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, learning rate; moments in the parameters' dtype (float32).

    Args:
        config: the optimizer's section.
        num_steps: updates of the whole run, for the schedule.
        kinds: what the parameters are: weight decay acts on those that say so.
    """
    decayed = functools.partial(kinds.map, lambda kind, _: kind.decays)
    average = [averaging(config.ema_decay)] if config.ema_decay else []
    return _in_default_modes(
        optax.chain(
            optax.clip_by_global_norm(config.gradient_clip_norm),
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
            *average,
        )
    )


def _in_default_modes(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same where promotions of dtype or rank are forbidden: Optax raises a decay rate to an int32 power."""

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(init, update)
