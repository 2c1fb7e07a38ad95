"""The training state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moda_jax.training.skipped_updates import UpdateCounts

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint must hold beside the data position.

    Attributes:
        step: int32 scalar, steps done; a batch each.
        params: nested dicts of float32 arrays, named as the model names them, as the task lays them out.
        optimizer_state: optax's.
        key: a typed PRNG key, the same in every step; a random part of step n folds n into it.
        counts: how many of the steps updated the parameters, and how many were skipped.
    """

    step: Array
    params: Any
    optimizer_state: optax.OptState
    key: Array
    counts: UpdateCounts = dataclasses.field(default_factory=UpdateCounts.zero)


def initial_state(
    initial_params: Callable[[Array], Any], optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step. Traceable: `jax.eval_shape` of it is the state's structure, without the memory.

    Args:
        initial_params: a typed PRNG key -> parameters; a task's.
        optimizer: from `make_optimizer`.
        seed: `train.seed`.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = initial_params(init_key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer_state=optimizer.init(params), key=run_key)
