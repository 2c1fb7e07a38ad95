"""Checkpoints: one directory per step, written by Orbax in the background.

    <workdir>/checkpoints/<step>/state/   the TrainState
    <workdir>/checkpoints/<step>/meta/    JSON: step, data position, resolved config, fingerprints

A restore goes: `saved_steps` (newest first), `check_step` (is the directory whole), the comparison of tensors by name,
then Orbax. Orbax itself checks little: it takes an empty directory for a step, and casts a wrong dtype silently.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from moda_jax.config import CheckpointConfig

_logger = logging.getLogger(__name__)

_STATE = "state"
_META = "meta"
# Without these files a directory is no checkpoint. Orbax writes elsewhere and renames, so a kill makes none.
_REQUIRED_FILES = ("_CHECKPOINT_METADATA", f"{_STATE}/_METADATA", f"{_META}/metadata")


class CheckpointError(ValueError):
    """A saved step that cannot be used; the message names the directory and the reason."""


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a directory, newest first. Looks at names only; creates nothing."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def check_step(directory: Path, step: int) -> None:
    """Checks that the step's directory looks like a complete checkpoint.

    Raises:
        CheckpointError: it does not.
    """
    missing = [name for name in _REQUIRED_FILES if not (directory / str(step) / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory / str(step)}: not a complete checkpoint, {', '.join(missing)} missing. Nothing was changed. "
            "Move this directory away to go on from the step before it"
        )


class Checkpoints:
    """Saves and restores the steps of one run.

    Args:
        directory: created if it is not there.
        config: the checkpoint section, for retention.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        policies: list[Any] = [checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(config.keep_every_steps))
        self._directory = directory.absolute()  # Orbax refuses a relative path
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,  # of a kill during a save
            ),
            item_handlers={_STATE: ocp.StandardCheckpointHandler(), _META: ocp.JsonCheckpointHandler()},
        )

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts a save and returns once the arrays are copied or held, so that the caller may donate them.

        Args:
            step: the directory's name.
            state: a pytree of arrays.
            record: plain JSON values.

        Raises:
            ValueError: the step is there already.
            Exception: what went wrong in the background with the save before.
        """
        arguments = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave(record)}  # type: ignore[arg-type]
        )
        if not self._manager.save(step, args=arguments, force=True):
            raise CheckpointError(f"{self._directory / str(step)}: Orbax did not save this step")

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the record of a saved step.

        Args:
            step: one of `saved_steps`.
            abstract_state: the pytree that is expected, of jax.ShapeDtypeStructs; a leaf's sharding says where the
                array goes, None the default device.

        Raises:
            CheckpointError: the step is not whole or damaged; or a tensor is missing, not expected, or has another
                shape or dtype: each such one is named.
        """
        check_step(self._directory, step)
        place = self._directory / str(step)
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract_state = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or default), abstract_state
        )
        try:
            saved = self._manager.item_metadata(step)[_STATE]
            differences = _differences(_tensors(getattr(saved, "tree", saved)), _tensors(abstract_state))
            if not differences:
                arguments = {_STATE: ocp.args.StandardRestore(abstract_state), _META: ocp.args.JsonRestore()}
                restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # for damaged files Orbax raises anything, bare Exceptions included
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{place}: cannot be restored ({reason})") from error
        if differences:
            raise CheckpointError(f"{place}: does not hold what this config needs:" + "".join(differences))
        return restored[_STATE], restored[_META]

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            Exception: what went wrong with it.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()


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
