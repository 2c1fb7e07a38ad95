"""OLMo 2's optimizer: AdamW with clipping, a schedule, and no weight decay on norms and embeddings."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from moda_jax.config import OptimizerConfig
from moda_jax.parameter import ParameterKinds
from moda_jax.training.schedule import learning_rate_schedule


def make_optimizer(config: OptimizerConfig, num_steps: int, kinds: ParameterKinds) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, learning rate; moments in the parameters' dtype (float32).

    Args:
        config: the optimizer's section.
        num_steps: updates of the whole run, for the schedule.
        kinds: what the parameters are: weight decay acts on those that say so.
    """
    decayed = functools.partial(kinds.map, lambda kind, _: kind.decays)
    return _in_default_modes(
        optax.chain(
            optax.clip_by_global_norm(config.gradient_clip_norm),
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
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
