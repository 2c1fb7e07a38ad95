"""The training state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moda_jax.config import TransformerConfig
from moda_jax.model.function import ModelFunction, model_function, parameter_kinds, split_model
from moda_jax.parallel.parameters import pad_vocabulary, padded_vocabulary
from moda_jax.training.skipped_updates import UpdateCounts

Array = jax.Array

__all__ = ["ModelFunction", "TrainState", "initial_state", "model_function", "split_model"]  # three of the model's own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint must hold beside the data position.

    Attributes:
        step: int32 scalar, steps done; a batch each.
        params: nested dicts of float32 arrays, named as the model names them, the vocabulary padded.
        optimizer_state: optax's.
        key: a typed PRNG key, the same in every step; a random part of step n folds n into it.
        counts: how many of the steps updated the parameters, and how many were skipped.
    """

    step: Array
    params: Any
    optimizer_state: optax.OptState
    key: Array
    counts: UpdateCounts = dataclasses.field(default_factory=UpdateCounts.zero)


def unpadded(state: Any, config: TransformerConfig) -> Any:
    """Shapes of a state without the vocabulary's padding, as checkpoints held it once."""
    return jax.eval_shape(lambda state: pad_vocabulary(state, parameter_kinds(config), config.vocab_size), state)


def initial_state(config: TransformerConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. Traceable: `jax.eval_shape` of it is the state's structure, without the memory.

    Args:
        config: the model's section.
        optimizer: from `make_optimizer`.
        seed: `train.seed`.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    model, params = split_model(config, init_key)
    params = pad_vocabulary(params, model.kinds, padded_vocabulary(config.vocab_size))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer_state=optimizer.init(params), key=run_key)
