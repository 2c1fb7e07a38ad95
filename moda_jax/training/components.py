"""What a run is made of, built from its config before the first step: data, model, and the two jitted functions."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from moda_jax.config import Config
from moda_jax.data.packing import Batch
from moda_jax.data.pipeline import TrainBatches, open_dataset, train_batches, validation_batches
from moda_jax.data.tokenizer import check_vocabulary, load_tokenizer
from moda_jax.model.accounting import param_count
from moda_jax.model.function import model_function
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.distribution import Distribution, resolved_mesh
from moda_jax.quantities import quantity
from moda_jax.training.optimizer import learning_rate_schedule, make_optimizer
from moda_jax.training.state import initial_state
from moda_jax.training.train_step import make_depth_mass, make_eval_step, make_train_step

_logger = logging.getLogger(__name__)

_PADDING = 0.1  # share of the vocabulary that may be unused without a word: more than anybody pads


class Components:
    """Data, model and jitted functions of one run. The constructor does all that a mistake in the config can stop:
    nothing but prepared data is written, nothing is compiled, and no array is allocated.

    Args:
        config: the run, from `resolve`.
        distribution: of its arrays.
        carried_tokenizer: where the run keeps a copy of its tokenizer.json, or will.

    Raises:
        ValueError: a mistake in config or data; the message names the field.
        NotImplementedError: the config asks for what this device or version cannot do.

    Attributes:
        tokenizer, train_data, validation_data: the last one is None where `eval.interval_steps` is 0.
        model: the model as a function of its parameters.
        initialize: () -> the state before the first step, on the mesh; jitted, so that parameters are made on the
            device and not one operation at a time.
        abstract_state: shapes, dtypes and shardings of that state.
        traced_train_step: (state, batch) -> (state, metrics), traced; to be lowered and compiled.
        eval_step: (params, batch) -> sums, jitted.
        depth_mass: (params, batch) -> attention's mass on the depth slots over the batch's first micro-batch; None
            where there is nothing to measure, or `eval.depth_mass` is off, or there is a mesh.
    """

    def __init__(self, config: Config, distribution: Distribution, carried_tokenizer: Path | None = None):
        self._config, self._carried_tokenizer = config, carried_tokenizer
        self._distribution = distribution
        self._open_data()
        self._check_sample()
        self._trace_steps()

    def train_batches(self, position: int) -> TrainBatches:
        """This process's rows of the batches after global row `position`."""
        config, rows = self._config, self._distribution.rows
        return train_batches(
            self.train_data, config.data, batch_size=config.train.batch_size, seed=config.train.seed,
            position=position, process_index=rows.index, process_count=rows.count,
        )  # fmt: skip

    def validation_batches(self) -> Iterator[Batch]:
        """This process's rows of the validation split, or of the `eval.num_batches` batches spread over it."""
        config, rows = self._config, self._distribution.rows
        return validation_batches(
            self.validation_data, config.data, batch_size=config.train.batch_size, num_batches=config.eval.num_batches,
            process_index=rows.index, process_count=rows.count,
        )  # fmt: skip

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint and the data of the run that goes on from it must agree in."""
        return {
            "dataset_fingerprint": self.train_data.fingerprint,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
        }

    @property
    def validation_fingerprint(self) -> str | None:
        """Of the validation split; None where it is not opened."""
        return None if self.validation_data is None else self.validation_data.fingerprint

    def description(self) -> list[tuple[str, str]]:
        """For people: a line of text on each of device, model, attention, data and plan."""
        config, devices = self._config, jax.devices()
        tokens_per_step = config.train.batch_size * config.data.sequence_length
        epochs = config.train.num_steps * tokens_per_step / self.train_data.num_tokens
        parameters = param_count(config.model)
        axes = " x ".join(f"{axis} {size}" for axis, size in self._distribution.sizes.items() if size > 1)
        mesh = f", mesh {axes}" if axes else ""
        return [
            ("device", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){mesh}"),
            ("model", f"{quantity(parameters)} parameters ({parameters}), {config.model.num_layers} layers, "
                      f"depth={config.model.depth}, compute dtype {config.model.dtype}"),
            ("attention", config.model.attention_implementation or "the best implementation for this device"),
            ("data", f"{config.data.source}: {quantity(self.train_data.num_tokens)} training tokens in "
                     f"{self.train_data.num_documents} documents"),
            ("plan", f"{config.train.num_steps} steps of {tokens_per_step} tokens ({config.train.batch_size} x "
                     f"{config.data.sequence_length} in {config.train.accumulation_steps} parts), {epochs:.2f} epochs"),
        ]  # fmt: skip

    def _open_data(self) -> None:
        config = self._config
        self.tokenizer = load_tokenizer(config.data, self._carried_tokenizer)
        check_vocabulary(self.tokenizer, config.model.vocab_size, config.data)
        unused = config.model.vocab_size - self.tokenizer.vocab_size
        if unused > _PADDING * config.model.vocab_size:
            _logger.warning(
                "model.vocab_size=%d: data.tokenizer=%r uses only %d of it",
                config.model.vocab_size, config.data.tokenizer, self.tokenizer.vocab_size,
            )  # fmt: skip
        self.train_data = open_dataset(config.data, "train", self.tokenizer)
        evaluates = config.eval.interval_steps > 0
        self.validation_data = open_dataset(config.data, "validation", self.tokenizer) if evaluates else None

    def accept_older_data(self, fingerprint: str) -> bool:
        """Takes the source as the first version read it, if that gives the data that a checkpoint speaks of.

        Since then more kinds of files are read, hidden names are not, and one text file is split by position.
        """
        config = self._config.data
        try:
            older = open_dataset(config, "train", self.tokenizer, as_before=True)
            if older.fingerprint != fingerprint:
                return False
            if self.validation_data is not None:
                self.validation_data = open_dataset(config, "validation", self.tokenizer, as_before=True)
        except ValueError:  # not a source of that version
            return False
        self.train_data = older
        _logger.warning(
            "data.source=%r: this run was begun when other files of it were read, or shared out otherwise; it goes on "
            "with the documents it began with", config.source,
        )  # fmt: skip
        return True

    def _check_sample(self) -> None:
        """The sample is the last thing that a run does: a prompt that does not fit must not wait until then."""
        train, longest = self._config.train, self._config.model.max_sequence_length
        if not train.sample_prompt:
            return
        prompt_tokens = len(self.tokenizer.encode(train.sample_prompt))
        if prompt_tokens + train.sample_tokens > longest:
            raise ValueError(
                f"train.sample_tokens={train.sample_tokens}: expected at most {longest - prompt_tokens}, because the "
                f"prompt has {prompt_tokens} tokens and model.max_sequence_length={longest}"
            )

    def _trace_steps(self) -> None:
        """Builds and traces the two jitted functions; shapes only."""
        config, distribution = self._config, self._distribution
        self.model = model_function(config.model)
        optimizer = make_optimizer(config.optimizer, config.train.num_steps, self.model.kinds)
        schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
        self.initialize = distribution.initializer(  # the seed is an argument: one program for all seeds
            functools.partial(initial_state, config.model, optimizer), np.int32(config.train.seed)
        )
        self.abstract_state = distribution.abstract_state(self.initialize)
        train_step = make_train_step(self.model, optimizer, schedule, config.train)
        jitted = distribution.jit_train_step(train_step, self.abstract_state)
        self.traced_train_step = jitted.trace(self.abstract_state, distribution.abstract_batch())
        self.eval_step = distribution.jit_eval_step(make_eval_step(self.model, config.train))
        measured = config.eval.depth_mass and config.model.depth_slots > 0 and distribution.mesh is None
        self.depth_mass = jax.jit(make_depth_mass(self.model, config.train)) if measured else None


def resolve(config: Config) -> Config:
    """The config with what depends on the device filled in, so that config.json says what the run computes.

    Raises:
        ValueError: the mesh does not fit the devices.
    """
    dtype = np.dtype(compute_dtype(config.model.dtype)).name
    config = resolved_mesh(config)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
