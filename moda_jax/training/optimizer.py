"""The optimizer: AdamW as OLMo 2 has it, without weight decay on norms and embeddings, or Muon and AdamW."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from moda_jax.config import OptimizerConfig
from moda_jax.parameter import ParameterKinds
from moda_jax.training.averaged import averaging
from moda_jax.training.muon import is_matrix, muon
from moda_jax.training.schedule import LearningRatePlan, learning_rate_schedule


def make_optimizer(
    config: OptimizerConfig, plan: LearningRatePlan | int, kinds: ParameterKinds
) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Muon, decoupled weight decay, learning rate; moments are float32, as parameters are.

    Args:
        config: the optimizer's section.
        plan: of the learning rate, its numbers possibly traced; or the updates of the whole run.
        kinds: what the parameters are: weight decay acts on those that say so, Muon on those that are matrices.
    """
    clip = optax.clip_by_global_norm(config.gradient_clip_norm)
    decayed = functools.partial(kinds.map, lambda kind, _: kind.decays)
    adamw = (
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(config, plan)),
    )
    average = [averaging(config.ema_decay)] if config.ema_decay else []
    if config.name == "adamw":
        return _in_default_modes(optax.chain(clip, *adamw, *average))
    own = config.muon
    matrices = (
        muon(own, kinds),
        optax.add_decayed_weights(config.weight_decay if own.weight_decay is None else own.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, plan, of_matrices=True)),
    )
    labels = functools.partial(kinds.map, lambda kind, _: "muon" if is_matrix(kind) else "adamw")
    by_kind = optax.partition({"adamw": optax.chain(*adamw), "muon": optax.chain(*matrices)}, labels)
    return _in_default_modes(optax.chain(clip, by_kind, *average))


def _in_default_modes(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same where promotions of dtype or rank are forbidden: Optax raises a decay rate to an int32 power."""

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(init, update)
