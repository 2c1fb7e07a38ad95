"""A run from start to end: open, restore, step, log, evaluate, save, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from moda_jax.config import Config
from moda_jax.parallel import peers
from moda_jax.paths import expand_home
from moda_jax.quantities import duration, quantity
from moda_jax.tasks.registry import make_task
from moda_jax.tasks.task import Batches
from moda_jax.training import workdir as workdir_lib
from moda_jax.training.averaged import AVERAGE_PREFIX, averaged_params, restarted_average
from moda_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    SkippedStep,
    newest_good_step,
    saved_steps,
    warn_of_skipped,
)
from moda_jax.training.lock import WorkdirLock
from moda_jax.training.metrics_file import MetricsWriter, NoMetrics, plot_curves, read_metrics
from moda_jax.training.peak_flops import peak_flops
from moda_jax.training.program import Program, resolve
from moda_jax.training.replay import fault_error
from moda_jax.training.result import RunResult
from moda_jax.training.signals import StopRequest
from moda_jax.training.spikes import LossSpikes
from moda_jax.training.status_line import StatusLine
from moda_jax.training.trackers import check_trackers, group_scalars, open_trackers
from moda_jax.training.train_step import StepMetrics
from moda_jax.training.watchdog import Watchdog

_logger = logging.getLogger(__name__)

_RECORDED_VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")


class TrainingRun:
    """One run in one directory, good for one call of `train`.

    The constructor does all that can fail by the user's fault: it checks the directory's config, opens the data, traces
    the step and restores the newest good checkpoint. Until these checks have passed nothing but prepared data and the
    lock of a directory that is there is written, and the step is not compiled. `train` then trains. From the
    constructor to the end of `train` the run holds the directory's lock.

    Args:
        config: the run.
        workdir: its directory; created if it is not there.
        starting_params: reads what `train.init_from` names, called with the config where the run has no checkpoint yet;
            `moda_jax.interop.start.starting_params`. Needed for a config that names something.

    Raises:
        ValueError: a mistake in config, data or directory; the message names the field. Or another process trains here.
        NotImplementedError: the config asks for what this device or version cannot do.
    """

    def __init__(self, config: Config, workdir: str | Path, starting_params: Callable[[Config], Any] | None = None):
        self._began = time.monotonic()
        self._starting_params = starting_params
        self.workdir = Path(workdir)
        self.config = resolve(config)
        check_trackers(self.config)
        self._task = make_task(self.config)
        changes = workdir_lib.check_config(self.workdir, self.config)
        self._checkpoint_directory = self.workdir / workdir_lib.CHECKPOINT_DIRECTORY
        self._lock: WorkdirLock | None = None
        if self._looks_finished():
            found, _ = newest_good_step(self._checkpoint_directory)
            self.is_finished = found is not None and found >= self.config.train.num_steps
            if self.is_finished:  # nothing will be written, so whoever holds the directory may go on holding it
                self.step = found
                return
        self.is_finished = False
        try:
            self._set_up(changes)
        except BaseException:
            self._release()
            raise

    def train(self, *, stop_at_step: int | None = None) -> RunResult:
        """Trains to the end, or to `stop_at_step`, and saves there.

        Args:
            stop_at_step: stop early at this step, to be resumed; the schedule stays that of the whole run.
        """
        if self.is_finished:
            return self._result(resumed_finished=True)
        last = min(self.config.train.num_steps, stop_at_step or self.config.train.num_steps)
        first = self._distribution.is_first
        with contextlib.ExitStack() as at_the_end:  # the last one first
            at_the_end.callback(self._release)
            at_the_end.callback(self._checkpoints.close)
            metrics = MetricsWriter(self.workdir, self.step) if first else NoMetrics()
            self._metrics = at_the_end.enter_context(contextlib.closing(metrics))
            self._trackers = open_trackers(self.config, self.workdir, self.step) if first else []
            for tracker in self._trackers:
                at_the_end.enter_context(contextlib.closing(tracker))
            batches = at_the_end.enter_context(contextlib.closing(self._data.train_batches(self._position)))
            self._watchdog = at_the_end.enter_context(contextlib.closing(Watchdog(self.config.train.watchdog_seconds)))
            progress = StatusLine(_logger, None if first else io.StringIO())
            self._progress = at_the_end.enter_context(contextlib.closing(progress))
            self._stop = at_the_end.enter_context(StopRequest())
            self._compile()
            self._loop(batches, last)
            self._progress.close()
            sample = self._finish() if self.step == self.config.train.num_steps else None
            self._await_last_save()
        return self._result(sample=sample, stopped_by=self._stop.reason if self.step < last else None)

    def start_from(self, params: Any) -> None:
        """Instead of training: gives a new run these parameters, and saves it at step 0. `train` goes on from there.

        Args:
            params: nested dicts of float32 arrays, as the model names them.

        Raises:
            ValueError: the run has done steps, or the parameters are not this model's.
        """
        try:
            if self.step:
                raise ValueError(f"workdir={str(self.workdir)!r}: has done {self.step} steps; name a new directory")
            params = self._task.adapted(params)
            optimizer_state = restarted_average(self._state.optimizer_state, params)
            state = dataclasses.replace(self._state, params=params, optimizer_state=optimizer_state)
            self._checkpoints.save(self.step, state, self._record())
            if not self._checkpoints.wait():
                raise CheckpointError(f"{self._checkpoint_directory}: step 0 could not be saved; the log says why")
        finally:
            self._checkpoints.close()
            self._release()

    # Set-up.

    def _looks_finished(self) -> bool:
        steps = saved_steps(self._checkpoint_directory)
        return bool(steps) and steps[0] >= self.config.train.num_steps

    def _set_up(self, changes: list[workdir_lib.Change]) -> None:
        """All that precedes the first step, in an order in which a refused run leaves nothing behind."""
        self._program = Program(self.config, self._task)
        self._distribution = self._program.distribution
        is_new = workdir_lib.read_config(self.workdir) is None
        if not is_new:
            self._lock_directory()
        self._data = self._task.open_data(self._distribution.rows, self.workdir)
        start = self._read_start()
        self._traced = self._program.trace_train_step()
        if is_new:
            self._lock_directory()
            changes = workdir_lib.check_config(self.workdir, self.config)  # another may have been quicker
        found, skipped = newest_good_step(self._checkpoint_directory)
        self.step = found or 0
        if found is None:
            self._write_config(changes)
        self._distribution.agree("config written")  # and with it the directory
        self._checkpoints = Checkpoints(self._checkpoint_directory, self.config.checkpoint)
        self._restore_or_initialize(found, skipped, start)
        if found is not None:  # a restore can still be refused, so only now
            self._write_config(changes)
        group = peers.current()
        if group is not None:
            group.write_to(self.workdir / workdir_lib.PROCESS_DIRECTORY)
        for name, text in (("directory", self.workdir), *self._description()):
            _logger.info("%-9s %s", name, text)

    def _lock_directory(self) -> None:
        """One run, one writer: the first process, which does the writing."""
        if jax.process_index() == 0:
            self._lock = WorkdirLock(self.workdir)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _write_config(self, changes: list[workdir_lib.Change]) -> None:
        if self._distribution.is_first:
            workdir_lib.write_config(self.workdir, self.config, changes, self.step)
            for name, file in self._data.carried_files().items():
                workdir_lib.carry(self.workdir, name, file)

    def _description(self) -> list[tuple[str, str]]:
        """For people: a line of text on each of device, model, data and plan."""
        devices, task = jax.devices(), self._task
        items, train = self._items_per_step, self.config.train
        axes = " x ".join(f"{axis} {size}" for axis, size in self._distribution.sizes.items() if size > 1)
        mesh = f", mesh {axes}" if axes else ""
        epochs = train.num_steps * items / self._data.num_items
        return [
            ("device", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){mesh}"),
            *task.description(),
            ("data", self._data.description()),
            ("plan", f"{train.num_steps} steps of {items} {task.items} ({train.batch_size} x {task.items_per_row} in "
                     f"{train.accumulation_steps} parts), {epochs:.2f} epochs"),
        ]  # fmt: skip

    @property
    def _items_per_step(self) -> int:
        return self.config.train.batch_size * self._task.items_per_row

    def _read_start(self) -> Any:
        """The parameters of `train.init_from`, for a run that has no checkpoint yet; None: fresh ones."""
        place = self.config.train.init_from
        if place is None or saved_steps(self._checkpoint_directory):
            return None
        if expand_home(place, "train.init_from").resolve() == self.workdir.resolve():
            raise ValueError(f"train.init_from={place!r}: is the run's own directory; a run goes on by itself")
        if self._starting_params is None:
            raise ValueError(
                f"train.init_from={place!r}: is read by moda_jax.interop.start.starting_params; give it to TrainingRun"
            )
        return self._task.adapted(self._starting_params(self.config))

    def _restore_or_initialize(self, found: int | None, skipped: list[SkippedStep], start: Any) -> None:
        self._position = 0
        if found is None:
            self._state = self._program.initialize()
            if start is not None:
                params = self._distribution.place_params(start, self._program.abstract_state.params)
                optimizer_state = restarted_average(self._state.optimizer_state, params)
                self._state = dataclasses.replace(self._state, params=params, optimizer_state=optimizer_state)
            self._spikes = LossSpikes(self.config.train.loss_spike_deviations)
            return
        wanted = self._program.abstract_state
        older = self._task.older_shapes(wanted)
        self._state, record = self._checkpoints.restore(found, wanted, older=older, is_checked=True)
        for name, value in self._data.fingerprints().items():
            if record[name] != value and not self._data.accept_older(name, record[name]):
                data = self.config.data
                raise CheckpointError(
                    f"{self._checkpoint_directory / str(self.step)}: was trained on other data: its {name} is "
                    f"{record[name]!r}, that of data.source={data.source!r} under data.tokenizer={data.tokenizer!r} "
                    f"is {value!r}"
                )
        known, validation = record.get("validation_fingerprint"), self._data.validation_fingerprint
        if None not in (known, validation) and known != validation:
            _logger.warning(
                "the validation split is not that of step %d: validation losses from here on cannot be compared with "
                "those before", found,
            )  # fmt: skip
        self._position = record["data_position"]
        self._spikes = LossSpikes(self.config.train.loss_spike_deviations, record["loss_spikes"])
        warn_of_skipped(skipped)
        self._checkpoints.set_aside(step for step, _ in skipped)
        steps = ", ".join(map(str, reversed(saved_steps(self._checkpoint_directory))))
        _logger.info(
            "resuming from step %d of %d (checkpoints found: %s)", found, self.config.train.num_steps, steps
        )  # fmt: skip
        if self.config.train.init_from is not None:
            _logger.info("train.init_from=%r: was where this run started; it is not read", self.config.train.init_from)

    # The loop.

    def _compile(self) -> None:
        self._progress.show("compiling the train step", milestone=False)
        began = time.monotonic()
        self._train_step = self._traced.lower().compile()
        self._plan = self._distribution.place_everywhere(self._program.plan)
        _logger.info("compiled the train step in %s", duration(time.monotonic() - began))

    def _loop(self, batches: Batches, last: int) -> None:
        """Steps from `self.step` to `last`. The host reads a step's metrics after it has handed the next one over."""
        config, first = self.config, self.step + 1
        self._mark()
        self._timed_from = first  # seconds per step are counted from the end of this step on
        group = peers.current()
        self._batches: deque[tuple[int, Any]] = deque(maxlen=2)  # the host learns of a fault one step late
        pending: StepMetrics | None = None
        for step in range(first, last + 1):
            self._watchdog.beat()
            if group is not None:
                group.at_step(step)
            self._batches.append((step, next(batches)))
            batch = self._distribution.place(self._batches[-1][1])
            self._state, metrics = self._train_step(self._state, batch, self._plan)
            if pending is not None:
                self._report(step - 1, pending)
            pending, self.step, self._position = metrics, step, batches.position
            evaluate = _due(step, config.eval.interval_steps, config.train.num_steps)
            stop = self._stop.reached_at(step)
            save = _due(step, config.checkpoint.interval_steps, config.train.num_steps) or step == last or stop
            if step == first or evaluate or save:
                self._report(step, pending, evaluate=evaluate)
                pending = None
            if step == first:
                self._timed_since = time.monotonic()
                _logger.info("first step done %s after the start", duration(time.monotonic() - self._began))
            self._checkpoints.poll()
            if save:
                self._save()
            if evaluate or save or step == first:
                self._mark()
            if stop:
                break

    def _report(self, step: int, metrics: StepMetrics, *, evaluate: bool = False) -> None:
        """Waits for a step's metrics; a line for the terminal, and one for the files if the step is a logged one."""
        config, task = self.config, self._task
        values = jax.tree.map(lambda x: x.item(), metrics)
        self._check_numbers(step, values)
        speed = (step - self._marked_step) * self._items_per_step / (time.monotonic() - self._marked_time)
        left = ""
        if step > self._timed_from:  # the first step is slow: programs are loaded, libraries and the network start
            seconds_per_step = (time.monotonic() - self._timed_since) / (step - self._timed_from)  # with evaluations
            left = f" | {duration((config.train.num_steps - step) * seconds_per_step)} left"
        logged = _due(step, config.train.log_interval_steps, config.train.num_steps)
        self._progress.show(
            f"step {step}/{config.train.num_steps} | loss {values.loss:.4f} | {quantity(speed)} {task.items}/s{left}",
            milestone=logged,
        )
        if not (logged or evaluate):
            return
        entry = {
            "step": step,
            "num_steps": config.train.num_steps,
            task.items: step * self._items_per_step,
            **{name: _finite(value) for name, value in task.values({"loss": values.loss}).items()},
            "grad_norm": _finite(values.grad_norm),
            "learning_rate": values.learning_rate,
            "skipped_updates": values.skipped,
            "loss_spikes": self._spikes.count,
            f"{task.items}_per_second": speed,
            "mfu": self._flops_utilisation(speed),
        }
        if evaluate:
            entry |= self._evaluate(step)
        self._metrics.write(entry)
        for tracker in self._trackers:
            tracker.write(step, group_scalars(entry))
        self._mark_at(step)

    def _check_numbers(self, step: int, values: StepMetrics) -> None:
        """Speaks of a skipped update and of a loss spike; too many skipped ones end the run."""
        if values.skipped_in_a_row:
            most = self.config.train.max_skipped_in_a_row
            _logger.warning(
                "step %d: no update, because it is not finite (loss %s, gradient norm %s); %d of at most %d in a row, "
                "%d in this run", step, values.loss, values.grad_norm, values.skipped_in_a_row, most, values.skipped,
            )  # fmt: skip
            if values.skipped_in_a_row > most:
                self._watchdog.beat()
                batch = dict(self._batches)[step]
                raise fault_error(self.workdir, self._task, step, self._state, batch, values)
        elif self._spikes.add(values.loss):
            _logger.warning("step %d: loss spike, %.4f (number %d)", step, values.loss, self._spikes.count)

    def _evaluate(self, step: int) -> dict[str, float]:
        """The task's metrics over the validation split, or over `eval.num_batches` batches spread over it; those of
        averaged weights, if there are any, with "ema_" in front."""
        config, program = self.config, self._program
        weights = {"": self._state.params, AVERAGE_PREFIX: averaged_params(self._state.optimizer_state)}
        weights = {prefix: params for prefix, params in weights.items() if params is not None}
        self._progress.show(f"step {step}/{config.train.num_steps} | evaluating", milestone=False)
        batches = self._data.validation_batches()
        measured = {}
        if program.measures:
            batch = next(batches)
            batches = itertools.chain([batch], batches)
            measured = {name: float(measure(self._state.params, batch)) for name, measure in program.measures.items()}
        totals: dict[str, dict[str, float]] = {prefix: {} for prefix in weights}
        placed = map(self._distribution.place, batches)
        evaluated = ([program.eval_step(params, batch) for params in weights.values()] for batch in placed)
        for all_sums in _one_late(evaluated):
            self._watchdog.beat()
            for total, sums in zip(totals.values(), all_sums, strict=True):
                total |= {name: total.get(name, 0.0) + float(value) for name, value in sums._asdict().items()}
        found = {}
        for prefix, total in totals.items():
            count = max(total.get("num_targets", 0.0), 1.0)
            values = self._task.values({name: value / count for name, value in total.items()} or {"loss": 0.0})
            found |= {f"validation_{prefix}{name}": value for name, value in values.items()}
        first = self._task.metrics[0]
        _logger.info("step %d: validation %s", step, first.text(found[f"validation_{first.name}"]))
        return found | measured

    def _save(self) -> None:
        self._metrics.sync()
        self._checkpoints.save(self.step, self._state, self._record())

    def _record(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        record = {
            "step": self.step,
            "data_position": self._position,
            "config": self.config.to_dict(),
            "versions": {name: importlib.metadata.version(name) for name in _RECORDED_VERSIONS},
            "loss_spikes": self._spikes.save(),
            "validation_fingerprint": self._data.validation_fingerprint,
        }
        return record | self._data.fingerprints()

    def _await_last_save(self) -> None:
        """Returns when the last step is on disk; tries again as often as the config allows."""
        while not self._checkpoints.wait():
            pause = self.config.checkpoint.retry_pause_seconds
            _logger.warning("trying again to save step %d in %s s", self.step, pause)
            time.sleep(pause)
            self._watchdog.beat()
            self._save()

    def _mark(self) -> None:
        self._mark_at(self.step)

    def _mark_at(self, step: int) -> None:
        """Speed counts from here."""
        self._marked_step, self._marked_time = step, time.monotonic()

    def _flops_utilisation(self, items_per_second: float) -> float | None:
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind, self.config.model.dtype)
        if peak is None:
            return None
        return items_per_second * self._task.train_flops_per_item / (peak * jax.device_count())

    # The end.

    def _finish(self) -> str | None:
        """Draws the loss curves and makes a sample, while the last checkpoint is being written."""
        first = self._distribution.is_first
        try:
            if first:
                _logger.info("loss curves in %s", plot_curves(self.workdir, self._task.metrics[0]))
        except OSError as error:  # of a full disk; the checkpoint matters more
            _logger.error("the loss curves could not be drawn (%s)", error)
        key = jax.random.fold_in(self._state.key, self.step)
        text = self._task.sample(self._state.params, self._data, key)
        if text is None:
            return None
        try:
            if first:
                (self.workdir / workdir_lib.SAMPLE_FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            _logger.error("the sample could not be written (%s)", error)
        return text

    def _result(
        self, *, resumed_finished: bool = False, sample: str | None = None, stopped_by: str | None = None
    ) -> RunResult:
        first, prefix = self._task.metrics[0].name, "validation_"
        entries = [entry for entry in read_metrics(self.workdir) if f"{prefix}{first}" in entry]
        last = entries[-1] if entries else {}
        values = {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}
        validation = self._task.describe(values)
        averaged = {name.removeprefix(AVERAGE_PREFIX): value for name, value in values.items() if name.startswith(
            AVERAGE_PREFIX
        )}  # fmt: skip
        if averaged:
            validation += f"; averaged weights: {self._task.describe(averaged)}"
        return RunResult(
            workdir=self.workdir, step=self.step, num_steps=self.config.train.num_steps,
            resumed_finished=resumed_finished, validation_loss=values.get(first),
            validation=validation, sample=sample, stopped_by=stopped_by,
        )  # fmt: skip


def _finite(value: float) -> float | None:
    """The value, or None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _one_late[Item](items: Iterable[Item]) -> Iterator[Item]:
    """The items, each after the next one was asked for: the device has work while the host reads."""
    previous: list[Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _due(step: int, interval: int, num_steps: int) -> bool:
    """Every `interval` steps and at the end."""
    return interval > 0 and (step % interval == 0 or step == num_steps)
