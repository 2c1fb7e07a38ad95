"""Where numbers stop being finite: the tensors of one step in the order in which they come to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moda_jax.tasks.task import Objective, Task

Array = jax.Array


class NonFiniteTensor(NamedTuple):
    """A tensor with values that are NaN or infinite: its name, how many of them, and of how many values."""

    name: str
    count: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} ({self.count} of {self.size} values)"


def non_finite_tensors(task: Task, params: Any, batch: Any) -> Iterator[NonFiniteTensor]:
    """The tensors of a step that are not finite, in order: batch, parameters, what the task's forward pass computes,
    gradients. Once the forward pass has one, gradients are not computed: they would all be.

    Runs micro-batch by micro-batch, and takes its time.

    Args:
        task: of the run.
        params: see `TrainState`.
        batch: as the task's layout names its arrays.
    """
    named = [(f"batch.{name}", a) for name, a in batch._asdict().items() if jnp.issubdtype(a.dtype, jnp.floating)]
    named += [(f"parameter {_name(path)}", leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    found = False
    for tensor in _non_finite(named):
        found = True
        yield tensor
    divisor = jnp.maximum(task.objective.weight(batch), 1.0)
    gradient = _gradient_function(task.objective, task.config.train.z_loss)
    parts = task.config.train.accumulation_steps
    for number in range(parts):
        where = f" in micro-batch {number}" if parts > 1 else ""
        micro_batch = jax.tree.map(lambda x, n=number: x[n::parts], batch)
        tensors = task.tensors(params, micro_batch)
        for tensor in _non_finite((name + where, value) for name, value in tensors):
            found = True
            yield tensor
    for number in range(0 if found else parts):
        where = f" in micro-batch {number}" if parts > 1 else ""
        micro_batch = jax.tree.map(lambda x, n=number: x[n::parts], batch)
        gradients = gradient(params, micro_batch, divisor)
        named = ((f"gradient of {_name(path)}{where}", leaf) for path, leaf in jax.tree.leaves_with_path(gradients))
        yield from _non_finite(named)


def _gradient_function(objective: Objective, z_loss: float) -> Callable:
    """(params, batch, divisor) -> the gradient of the batch's share of the objective."""

    def share(params: Any, batch: Any, divisor: Array) -> Array:
        return objective.loss(params, batch, z_loss)[0] / divisor

    return jax.jit(jax.grad(share))


def _non_finite(named: Any) -> Iterator[NonFiniteTensor]:
    for name, value in named:
        if isinstance(value, tuple):  # counted already
            count, size = value
        else:
            value = jnp.asarray(value)
            count, size = int(jnp.sum(~jnp.isfinite(value))), value.size
        if count:
            yield NonFiniteTensor(name, count, size)


def _name(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)
