"""Checkpoints: one directory per step, written by Orbax in the background, with checksums of every file.

    <workdir>/checkpoints/<step>/state/       the TrainState
    <workdir>/checkpoints/<step>/meta/        JSON: step, data position, resolved config, fingerprints
    <workdir>/checkpoints/<step>/CHECKSUMS    see `checksums`

A save goes: Orbax writes `<step>.saving`, the checksums are written into it, all is put on disk, and a rename to
`<step>` commits it. So a directory with a number for its name was whole once, and whatever differs from its checksums
is damage. A restore goes: `newest_good_step`, the comparison of tensors by name, then Orbax. Orbax itself checks
little: it takes an empty directory for a step, restores a flipped bit silently, and casts a wrong dtype silently.

    python -m moda_jax.training.checkpoint verify WORKDIR
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moda_jax.config import CheckpointConfig, check_local
from moda_jax.exit_codes import RunStoppedError
from moda_jax.training import event_loops
from moda_jax.training.checksums import MANIFEST_FILE, find_damage, flush, total_bytes, write_manifest
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY

_logger = logging.getLogger(__name__)

FORMAT = 2  # of the TrainState and the record. 1: without checksums, and without counts of updates
_STATE = "state"
_META = "meta"
_SAVING = ".saving"
_DELETING = ".deleting"
_SET_ASIDE = ".damaged"


class CheckpointError(ValueError):
    """A saved step that cannot be used; the message names the directory and the reason."""


class SkippedStep(NamedTuple):
    """A saved step that is not good."""

    step: int
    reason: str


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a directory, newest first. Looks at names only; creates nothing."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def check_step(directory: Path, step: int) -> None:
    """Checks that every file of the step is, bit for bit, as it was written.

    Raises:
        CheckpointError: it is not; each wrong file is named.
    """
    damage = find_damage(directory / str(step))
    if damage:
        raise CheckpointError(f"{directory / str(step)}: {_reason(directory / str(step), damage)}")


def find_good_step(directory: Path) -> tuple[int | None, list[SkippedStep]]:
    """The newest step whose files are as they were written, and the newer ones that were passed over.

    Returns:
        The step, or None where no step is good; and what was skipped, newest first. Writes nothing.
    """
    skipped = []
    for step in saved_steps(directory):
        damage = find_damage(directory / str(step))
        if not damage:
            return step, skipped
        skipped.append(SkippedStep(step, _reason(directory / str(step), damage)))
    return None, skipped


def warn_of_skipped(skipped: Iterable[SkippedStep]) -> None:
    """A line in the log for each step that was passed over, and why."""
    for step, reason in skipped:
        _logger.warning("the checkpoint of step %d is not good and was passed over: %s", step, reason)


def newest_good_step(directory: Path) -> tuple[int | None, list[SkippedStep]]:
    """`find_good_step` for a run that goes on.

    Returns:
        The step, or None where nothing was ever saved; and what was skipped, newest first.

    Raises:
        CheckpointError: there are steps and none is good: to begin anew is for a person to decide.
    """
    step, skipped = find_good_step(directory)
    if step is None and skipped:
        listing = "".join(f"\n  {step}: {reason}" for step, reason in skipped)
        raise CheckpointError(
            f"{directory}: no saved step is good. Nothing was changed; move the directory away to begin anew:{listing}"
        )
    return step, skipped


def steps_to_delete(steps: Iterable[int], config: CheckpointConfig) -> list[int]:
    """The good steps that retention gives up: all but the last `keep_last` and every `keep_every_steps`-th."""
    newest_first = sorted(steps, reverse=True)
    every = config.keep_every_steps
    return [step for step in newest_first[config.keep_last :] if not every or step % every]


class Checkpoints:
    """Saves and restores the steps of one run; its caller holds the run's lock.

    A save that fails leaves the former checkpoints as they are, is reported in the log, and counts;
    `checkpoint.max_failed_saves` of them in a row are an error. With several processes every one calls every method;
    the first one writes the checksums, commits and deletes.

    Args:
        directory: created if it is not there; what an interrupted save left in it is removed.
        config: the checkpoint section.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        self._directory = directory.absolute()  # Orbax refuses a relative path
        self._config = config
        self._failures = 0
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._last_is_saved = True
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._remove_leftovers()
        except OSError as error:
            raise CheckpointError(f"{self._directory}: cannot be written ({error})") from error
        event_loops.install()
        self._checkpointer = _new_checkpointer()
        self._committer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="commit checkpoint")

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts a save and returns once the arrays are copied or held, so that the caller may donate them.

        Waits for the save before. Whether this one succeeds is known later: see `wait`.

        Args:
            step: the directory's name.
            state: a pytree of arrays.
            record: plain JSON values.

        Raises:
            ValueError: the step is there already.
            RunStoppedError: too many saves in a row have failed.
        """
        self._settle()
        if (self._directory / str(step)).exists():
            raise CheckpointError(f"{self._directory / str(step)}: step {step} already exists")
        self._last_is_saved = False
        arguments = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave({"format": FORMAT} | record)}
        )
        try:
            self._remove_unfinished()
            self._checkpointer.save(self._staging(step), args=arguments)
        except Exception as error:  # on a full disk Orbax raises anything; the cause is logged, and raised in the end
            self._failed(step, error)
            return
        self._pending = (step, self._committer.submit(self._commit, step))

    def poll(self) -> None:
        """Reports a save that has ended by now; does not wait.

        Raises:
            RunStoppedError: too many saves in a row have failed.
        """
        if self._pending is not None and self._pending[1].done() and jax.process_count() == 1:
            self._settle()  # several processes settle together, in the next `save` or `wait`

    def wait(self) -> bool:
        """Returns when no save is going on: True if the last one is on disk, False if it failed.

        Raises:
            RunStoppedError: too many saves in a row have failed.
        """
        self._settle()
        return self._last_is_saved

    def restore(
        self, step: int, abstract_state: Any, *, older: Any = None, is_checked: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The state and the record of a saved step.

        Args:
            step: one of `saved_steps`.
            abstract_state: the pytree that is expected, of jax.ShapeDtypeStructs; a leaf's sharding says where the
                array goes, None the default device.
            older: the same pytree with smaller shapes that older checkpoints may have; what such a one lacks is zero.
            is_checked: the checksums were compared just now, as `newest_good_step` does.

        Raises:
            CheckpointError: the step is damaged or of another format; or a tensor is missing, not expected, or has
                another shape or dtype: each such one is named.
        """
        if not is_checked:
            check_step(self._directory, step)
        place = self._directory / str(step)
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract_state = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or default), abstract_state
        )
        try:
            record = self._restore_item(place, _META, ocp.args.JsonRestore())
            saved = self._checkpointer.metadata(place).item_metadata[_STATE]
            tensors = _tensors(getattr(saved, "tree", saved))
            differences = _differences(tensors, _tensors(abstract_state))
            is_older = bool(differences) and older is not None and not _differences(tensors, _tensors(older))
            if record.get("format") == FORMAT and (is_older or not differences):
                arguments = ocp.args.StandardRestore(abstract_state, strict=not is_older)  # else Orbax pads with zeros
                state = self._restore_item(place, _STATE, arguments)
        except Exception as error:  # Orbax raises anything, bare Exceptions included
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{place}: cannot be restored ({reason})") from error
        if record.get("format") != FORMAT:
            raise CheckpointError(f"{place}: has format {record.get('format')}, this version reads {FORMAT}")
        if differences and not is_older:
            raise CheckpointError(f"{place}: does not hold what this config needs:" + "".join(differences))
        return state, record

    def set_aside(self, steps: Iterable[int]) -> None:
        """Renames saved steps that are not good, so that the run can save these steps anew; nothing is deleted."""
        if jax.process_index() != 0:
            return
        for step in steps:
            place = self._directory / str(step)
            number, target = 1, self._directory / f"{step}{_SET_ASIDE}"
            while target.exists():
                number += 1
                target = self._directory / f"{step}{_SET_ASIDE}-{number}"
            place.rename(target)
            _logger.warning("%s: set aside as %s", place, target.name)

    def close(self) -> None:
        """Waits, and ends the background threads. A failed save is logged, not raised."""
        with contextlib.suppress(RunStoppedError):
            self._settle(is_closing=True)  # others may be gone
        self._committer.shutdown()
        self._checkpointer.close()

    def _restore_item(self, place: Path, name: str, argument: Any) -> Any:
        return self._checkpointer.restore(place, args=ocp.args.Composite(**{name: argument}))[name]

    def _staging(self, step: int) -> Path:
        return self._directory / f"{step}{_SAVING}"

    def _commit(self, step: int) -> None:
        """In the background: waits for Orbax, then writes checksums, renames, and applies retention."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        write_manifest(self._staging(step))
        self._staging(step).rename(self._directory / str(step))
        flush(self._directory)
        committed = [s for s in saved_steps(self._directory) if (self._directory / str(s) / MANIFEST_FILE).is_file()]
        for old in steps_to_delete(committed, self._config):
            place = self._directory / str(old)
            try:
                shutil.rmtree(place.rename(self._directory / f"{old}{_DELETING}"))
            except OSError as error:
                _logger.warning("%s: cannot be deleted (%s)", place, error)

    def _settle(self, *, is_closing: bool = False) -> None:
        """Waits for the save that is going on, and counts what became of it: in all processes the same."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if jax.process_count() > 1 and not is_closing:
            failed = multihost_utils.process_allgather(np.array(error is not None))
            if error is None and failed.any():
                error = OSError(f"it failed in process {np.flatnonzero(failed)[0]}")
        if error is not None:
            self._failed(step, error)
        else:
            self._failures, self._last_is_saved = 0, True

    def _failed(self, step: int, error: BaseException) -> None:
        self._failures += 1
        self._discard_checkpointer()
        self._remove_unfinished()
        good, most = saved_steps(self._directory), self._config.max_failed_saves
        newest = f"the newest checkpoint is that of step {good[0]}" if good else "there is no checkpoint yet"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _logger.error(
            "CHECKPOINT NOT SAVED at step %d (failure %d of at most %d in a row; %s): %s",
            step, self._failures, most, newest, reason,
        )  # fmt: skip
        if self._failures >= most:
            raise RunStoppedError(
                f"{self._directory}: the last {self._failures} saves have failed (checkpoint.max_failed_saves={most}); "
                f"{newest}. The last failure, at step {step}: {reason}"
            ) from error

    def _discard_checkpointer(self) -> None:
        """After a failure Orbax's object reports old errors, each at a later save: a new one knows of none."""
        old, self._checkpointer = self._checkpointer, _new_checkpointer()
        try:
            old.close()
        except Exception as error:  # one that belongs to the failure that was reported already
            _logger.debug("while closing Orbax's checkpointer after a failed save: %s", error)

    def _remove_unfinished(self) -> None:
        """Removes what failed saves left, which may be what fills the disk."""
        if jax.process_index() != 0:
            return
        for path in self._directory.glob(f"*{_SAVING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for path in sorted(self._directory.iterdir()):
            step, _, kind = path.name.partition(".")
            if step.isdecimal() and (kind.startswith((_SAVING[1:], "orbax-checkpoint-tmp")) or kind == _DELETING[1:]):
                _logger.warning("%s: removing what an interrupted process left", path)
                shutil.rmtree(path)


def verify(workdir: Path) -> tuple[str, bool]:
    """A report on every saved step of a run, for people; and whether the newest step is good.

    Raises:
        ValueError: no such run.
    """
    check_local("workdir", str(workdir))
    directory = workdir / CHECKPOINT_DIRECTORY
    if not directory.is_dir():
        raise ValueError(f"workdir={str(workdir)!r}: holds no {CHECKPOINT_DIRECTORY}/")
    lines, good, began, read = [], [], time.monotonic(), 0
    steps = saved_steps(directory)
    for step in steps:
        damage = find_damage(directory / str(step))
        size = total_bytes(directory / str(step))
        read += size
        if not damage:
            good.append(step)
        lines.append(f"step {step}: " + (f"good, {size} bytes" if not damage else f"NOT GOOD, {'; '.join(damage)}"))
    others = sorted(p.name for p in directory.iterdir() if not (p.name.isdecimal() and int(p.name) in steps))
    lines += [f"{name}: not a saved step" for name in others]
    seconds = max(time.monotonic() - began, 1e-9)
    newest = f"latest good step: {good[0]}" if good else "no good step"
    lines.append(f"{newest} ({read} bytes checked in {seconds:.2f} s, {read / seconds / 1e9:.2f} GB/s)")
    return "\n".join(lines), bool(steps) and good[:1] == steps[:1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if the newest step is good, 1 if not, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m moda_jax.training.checkpoint", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="compare every file of every saved step with its checksums")
    command.add_argument("workdir", type=Path)
    try:
        report, is_good = verify(parser.parse_args(arguments).workdir)
    except ValueError as error:
        parser.error(str(error))  # exits with status 2
    print(report)
    return 0 if is_good else 1


def _new_checkpointer() -> ocp.AsyncCheckpointer:
    handlers = {_STATE: ocp.StandardCheckpointHandler(), _META: ocp.JsonCheckpointHandler()}
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(**handlers),
        # Made in the background, directories that cannot be made leave threads that wait five minutes for them, and
        # the process waits for the threads.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )


def _reason(place: Path, damage: list[str]) -> str:
    if not (place / MANIFEST_FILE).exists():
        if (place / _STATE).exists():
            return f"{damage[0]}: removed, or written by a version before checkpoint format {FORMAT}, which had none"
        return f"{damage[0]}: not a complete checkpoint"
    return "; ".join(damage)


def _tensors(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by dotted name. A typed PRNG key counts as the integers that it is stored as."""
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        name = ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        tensors[name] = (tuple(leaf.shape), str(leaf.dtype))
    return tensors


def _differences(saved: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """A line for each tensor that is not as expected."""
    lines = []
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved:
            lines.append(f"\n  {name}: missing")
        elif name not in expected:
            lines.append(f"\n  {name}: not expected")
        elif saved[name] != expected[name]:
            (shape, dtype), (expected_shape, expected_dtype) = saved[name], expected[name]
            lines.append(f"\n  {name}: {dtype}{list(shape)}, expected {expected_dtype}{list(expected_shape)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
