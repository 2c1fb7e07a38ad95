"""The functions of a run, built in one place: the state's maker, the train step and the evaluation step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moda_jax.config import Config
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.distribution import Distribution, resolved_mesh
from moda_jax.tasks.registry import make_task
from moda_jax.tasks.task import Task
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.schedule import LearningRatePlan, learning_rate_schedule, make_plan
from moda_jax.training.state import TrainState, initial_state
from moda_jax.training.train_step import StepMetrics, make_eval_step, make_train_step


class Program:
    """What a config computes. Nothing is compiled here, and no array is allocated.

    Args:
        config: the run.
        task: what it learns; None: what the config says.
        devices: None: all devices of all processes.

    Raises:
        ValueError: the mesh fits neither devices nor parameters, batch and sequence; the field is named.
        NotImplementedError: the config asks for what this device or version cannot do.

    Attributes:
        task: see above.
        distribution: of the arrays.
        initialize: () -> the state before the first step, on the mesh; jitted, so that parameters are made on the
            device and not one operation at a time.
        abstract_state: shapes, dtypes and shardings of that state.
        plan: the numbers of the learning rate, on the host: the last argument of `train_step`. The compiled step does
            not depend on their values.
        train_step: (state, batch, plan) -> (state, metrics), jitted, the state donated; batches as from
            `distribution.place`.
        eval_step: (params, batch) -> sums, jitted.
        measures: name -> (params, batch) -> float32, jitted: what an evaluation also logs; none on a mesh.
    """

    def __init__(self, config: Config, task: Task | None = None, devices: Sequence[jax.Device] | None = None):
        self.task = make_task(config) if task is None else task
        self.distribution = Distribution(config, self.task.layout, self.task.model.kinds, devices)
        self.initialize = self.distribution.initializer(  # the seed is an argument: one program for all seeds
            state_maker(config, self.task), np.int32(config.train.seed)
        )
        self.abstract_state = self.distribution.abstract_state(self.initialize)
        self.plan = make_plan(config.optimizer, config.train.num_steps)

        def train_step(state: TrainState, batch: Any, plan: LearningRatePlan) -> tuple[TrainState, StepMetrics]:
            optimizer = make_optimizer(config.optimizer, plan, self.task.model.kinds)
            schedule = learning_rate_schedule(config.optimizer, plan)
            return make_train_step(self.task.objective, optimizer, schedule, config.train)(state, batch)

        self.train_step = self.distribution.jit_train_step(train_step, self.abstract_state)
        self.eval_step = self.distribution.jit_eval_step(make_eval_step(self.task.objective, config.train))
        on_one = self.distribution.mesh is None
        self.measures = {name: jax.jit(function) for name, function in self.task.measures().items()} if on_one else {}

    def trace_train_step(self) -> Any:
        """The train step, traced for the batches of the config; to be lowered and compiled."""
        return self.train_step.trace(self.abstract_state, self.distribution.abstract_batch(), self.plan)


def state_maker(config: Config, task: Task) -> Callable[[Any], TrainState]:
    """(seed) -> the state before the first step, on one device. Traceable."""
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, task.model.kinds)
    return functools.partial(initial_state, task.initial_params, optimizer)


def resolve(config: Config) -> Config:
    """The config with what depends on the device filled in, so that config.json says what the run computes.

    Raises:
        ValueError: the mesh does not fit the devices.
    """
    dtype = np.dtype(compute_dtype(config.model.dtype)).name
    config = resolved_mesh(config)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
