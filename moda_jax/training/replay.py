"""A step that stopped the run, kept so that one command does it again and names what is not finite.

What is kept:

    <workdir>/faults/<step>/batch.npz       the batch, one array per field of the task's layout
    <workdir>/faults/<step>/fault.json      step, loss, gradient norm, the tensors that are not finite
    <workdir>/faults/<step>/checkpoints/    the state that met the batch

The command:

    python -m moda_jax.training.replay WORKDIR/faults/STEP
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moda_jax.config import CheckpointConfig, Config, check_local
from moda_jax.exit_codes import RunStoppedError
from moda_jax.tasks.registry import make_task
from moda_jax.tasks.task import Task
from moda_jax.training.checkpoint import Checkpoints, saved_steps
from moda_jax.training.diagnosis import NonFiniteTensor, non_finite_tensors
from moda_jax.training.program import state_maker
from moda_jax.training.state import TrainState
from moda_jax.training.train_step import StepMetrics
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY, FAULT_DIRECTORY

_logger = logging.getLogger(__name__)

_BATCH_FILE = "batch.npz"
_REPORT_FILE = "fault.json"


def dump_fault(workdir: Path, config: Config, step: int, state: TrainState, batch: Any, values: dict) -> Path:
    """Writes batch, state and report of a step; returns its directory. A former dump of the same step is replaced.

    Args:
        workdir: the run's directory.
        config: the resolved config.
        step: its number.
        state: with the parameters that the step met.
        batch: of this process.
        values: for the report, plain JSON values.

    Raises:
        OSError, RunStoppedError: it cannot be written.
    """
    directory = workdir / FAULT_DIRECTORY / str(step)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    np.savez(directory / _BATCH_FILE, **batch._asdict())
    report = {"step": step, "config": config.to_dict()} | values
    (directory / _REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    checkpoints = Checkpoints(directory / CHECKPOINT_DIRECTORY, CheckpointConfig(max_failed_saves=1))
    try:
        checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
    finally:
        checkpoints.close()
    return directory


def fault_error(
    workdir: Path, task: Task, step: int, state: TrainState, batch: Any, values: StepMetrics
) -> RunStoppedError:
    """Names what is not finite in a step that ends the run, keeps the step for a replay, and makes the error of it.

    Args:
        workdir, step, state, batch: see `dump_fault`.
        task: of the run.
        values: the step's metrics as Python numbers.
    """
    config = task.config
    message = (
        f"{workdir}: step {step}: {values.skipped_in_a_row} steps in a row had a loss or gradient that is not "
        f"finite (train.max_skipped_in_a_row={config.train.max_skipped_in_a_row}); "
    )
    if jax.process_count() > 1:  # a process has its own rows of the batch only, so none can do the step alone
        return RunStoppedError(
            f"{message}the first such tensor is looked for in runs of one process only: the same command in one "
            "process goes on from the newest checkpoint, and stops here with its name"
        )
    found = next(non_finite_tensors(task, state.params, batch), None)
    message += f"the first such tensor is: {found or 'none, when the step is done again layer by layer'}. "
    numbers = {"loss": str(values.loss), "grad_norm": str(values.grad_norm), "first_non_finite_tensor": str(found)}
    try:
        directory = dump_fault(workdir, config, step, state, batch, numbers)
    except (OSError, ValueError, RunStoppedError) as error:  # a full disk: what was found is worth more than the dump
        return RunStoppedError(f"{message}The step could not be kept for a replay ({error})")
    return RunStoppedError(f"{message}To do this step again: python -m moda_jax.training.replay {directory}")


def replay(directory: Path) -> list[NonFiniteTensor]:
    """Does the dumped step again, tensor by tensor.

    Args:
        directory: from `dump_fault`.

    Returns:
        What is not finite, in the order of the computation; nothing if the step is sound here.

    Raises:
        ValueError: the directory holds no dump, or a damaged one.
    """
    check_local("directory", str(directory))
    try:
        report = json.loads((directory / _REPORT_FILE).read_text(encoding="utf-8"))
        task = make_task(Config.from_dict(report["config"]))
        with np.load(directory / _BATCH_FILE) as arrays:
            batch = type(task.layout)(**arrays)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(directory)!r}: holds no dump of a step ({error}); expected WORKDIR/faults/STEP"
        ) from error
    place = directory / CHECKPOINT_DIRECTORY
    steps = saved_steps(place)
    if not steps:
        raise ValueError(f"{place}: holds no state, so the step cannot be done again")
    checkpoints = Checkpoints(place, task.config.checkpoint)
    try:
        wanted = jax.eval_shape(state_maker(task.config, task), task.config.train.seed)
        state, _ = checkpoints.restore(steps[0], wanted, older=task.older_shapes(wanted))
    finally:
        checkpoints.close()
    return list(non_finite_tensors(task, state.params, batch))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if the fault is there again, 1 if not, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m moda_jax.training.replay", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="WORKDIR/faults/STEP")
    directory: Any = parser.parse_args(arguments).directory
    try:
        found = replay(directory)
    except ValueError as error:
        parser.error(str(error))  # exits with status 2
    for number, tensor in enumerate(found):
        print(f"{'first not finite' if number == 0 else 'then'}: {tensor}")
    if not found:
        print("every tensor of this step is finite here: the fault did not come again")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
