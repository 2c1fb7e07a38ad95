"""The interface of a task: model, batches, loss, metrics, and what a person gets to see of them.

A task is made from a run's config alone and is cheap to make: what costs (a traced model) is made when it is asked for.
Its data are opened apart, as `TaskData`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from moda_jax.config import Config
from moda_jax.model.function import ModelFunction
from moda_jax.parallel.batches import RowShare

Array = jax.Array


class Metric(NamedTuple):
    """A number that training or evaluation gives.

    Attributes:
        name: in metrics.jsonl; of the validation split with "validation_" in front.
        unit: "nats per token"; "" where it has none.
        digits: behind the point, for people.
    """

    name: str
    unit: str = ""
    digits: int = 4

    def text(self, value: float) -> str:
        """ "loss 1.2345 nats per token"."""
        return f"{self.name} {value:.{self.digits}f} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """Of an axis: "loss (nats per token)"."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


class Objective(Protocol):
    """What a step minimises."""

    def weight(self, batch: Any) -> Array:
        """What the sums of a batch are divided by, float32: its number of targets."""
        ...

    def loss(self, params: Any, batch: Any, z_loss: float) -> tuple[Array, Any]:
        """The objective and its sums, over the batch.

        Args:
            params: the model's.
            batch: arrays as the task's layout names them, of any number of rows.
            z_loss: weight of the z-loss, for a task that has one.

        Returns:
            What is differentiated, float32; and a NamedTuple of float32 scalars that add up over batches, `loss` and
            `num_targets` among them.
        """
        ...

    def evaluate(self, params: Any, batch: Any) -> Any:
        """The sums of a batch of the validation split: those of `loss`, without what belongs to training alone."""
        return self.loss(params, batch, 0.0)[1]


class Batches(Protocol):
    """An iterator of a run's training batches, this process's rows; closed at the end.

    Attributes:
        position: global rows that were given out, with which an iterator goes on.
    """

    position: int

    def __next__(self) -> Any: ...

    def close(self) -> None:
        """Ends what reads ahead."""
        ...


class TaskData(Protocol):
    """The data of a run, opened."""

    def train_batches(self, position: int) -> Batches:
        """The batches after global row `position`."""
        ...

    def validation_batches(self) -> Iterator[Any]:
        """This process's rows of the validation split, or of the `eval.num_batches` batches spread over it."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint and the data of the run that goes on from it must agree in."""
        ...

    @property
    def validation_fingerprint(self) -> str | None:
        """Of the validation split; None where it is not opened."""
        ...

    def accept_older(self, name: str, fingerprint: str) -> bool:
        """Takes the data as an earlier version read them, if that gives the fingerprint that a checkpoint speaks of."""
        ...

    def carried_files(self) -> Mapping[str, Path]:
        """Files that the run keeps copies of, by their name in its directory."""
        ...

    def description(self) -> str:
        """A line for people."""
        ...

    @property
    def num_items(self) -> int:
        """Of the training split, in the task's `items`."""
        ...


class Task:
    """The base of all tasks.

    Class attributes:
        items: what a row of a batch is made of: "tokens". Speed is counted in them.

    Args:
        config: of the run.
    """

    items: ClassVar[str]

    def __init__(self, config: Config):
        self.config = config

    # The model and what it learns.

    @property
    def model(self) -> ModelFunction:
        """The model as a function of its parameters."""
        raise NotImplementedError

    @property
    def objective(self) -> Objective:
        """What a step minimises."""
        raise NotImplementedError

    @property
    def layout(self) -> Any:
        """Of a global batch: a NamedTuple of `ArrayLayout`. Batches are NamedTuples of that class."""
        raise NotImplementedError

    def initial_params(self, key: Array) -> Any:
        """Fresh parameters, nested dicts of float32 arrays. Traceable."""
        raise NotImplementedError

    def older_shapes(self, state: Any) -> Any:
        """A training state's shapes as older checkpoints may have them, smaller; what they lack is zero."""
        return state

    def adapted(self, params: Any) -> Any:
        """Parameters of the model, as they come from elsewhere, as `initial_params` lays them out.

        Raises:
            ValueError: they are not this model's.
        """
        raise NotImplementedError

    def open_data(self, share: RowShare, directory: Path | None = None) -> TaskData:
        """Opens the data.

        Args:
            share: the rows of every batch that this process reads.
            directory: of a run, where copies of `TaskData.carried_files` may be.

        Raises:
            ValueError: a mistake in config or data; the message names the field.
        """
        raise NotImplementedError

    # What people and files get.

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `values` may give; the first is on the progress line, in the plots, and where spikes are looked for."""
        raise NotImplementedError

    def values(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics that can be had from the objective's sums over their targets; training has "loss" alone."""
        raise NotImplementedError

    @property
    def items_per_row(self) -> int:
        """`items` in a row of a batch."""
        raise NotImplementedError

    @property
    def train_flops_per_item(self) -> float:
        """FLOPs of forward and backward that MFU counts."""
        raise NotImplementedError

    def description(self) -> list[tuple[str, str]]:
        """For people: what the model is, in lines with a name each."""
        raise NotImplementedError

    # What happens at a step.

    def measures(self) -> dict[str, Callable[[Any, Any], Array]]:
        """What an evaluation on one device also logs: functions (params, validation batch) -> float32, jitted by the
        caller."""
        return {}

    def sample(self, params: Any, data: TaskData, key: Array) -> str | None:
        """At the end of a run, for people: something that the model makes. Every process calls it."""
        del params, data, key

    def tensors(self, params: Any, batch: Any) -> Iterator[tuple[str, Array | tuple[int, int]]]:
        """What a forward pass computes, in order, by name, so that the first that is not finite can be told; of what is
        inside a loop how many values are not finite, and how many there are."""
        raise NotImplementedError

    def describe(self, values: Mapping[str, float]) -> str:
        """Metrics for people: "loss 1.2345 nats per token, perplexity 3.437"."""
        return ", ".join(metric.text(values[metric.name]) for metric in self.metrics if metric.name in values)
