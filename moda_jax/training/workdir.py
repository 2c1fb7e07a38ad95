"""A run's working directory: whether it belongs to this config, and its config.json.

What lies in it:

    config.json      the resolved config
    tokenizer.json   the run's tokenizer, unless it is "bytes", so that the run can be moved
    metrics.jsonl    a line per logged step
    tensorboard/     the same values as TensorBoard events
    checkpoints/     one directory per saved step
    faults/          the step that stopped the run, to be replayed
    lock             who trains here, see `lock`
    loss.png         the loss curves, drawn when the run ends
    sample.txt       the text sample, written when the run ends

Everything but config.json is written by others; the names stand here.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from moda_jax.config import Config

_logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
CHECKPOINT_DIRECTORY = "checkpoints"
FAULT_DIRECTORY = "faults"
PLOT_FILE = "loss.png"
SAMPLE_FILE = "sample.txt"


_MAY_CHANGE = (
    "data.cache_dir", "train.num_steps", "train.max_skipped_in_a_row", "train.loss_spike_deviations",
    "train.watchdog_seconds",
    "train.deterministic",
)  # fmt: skip


class Change(NamedTuple):
    """A field that differs between the directory's config and the one that came."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} in the directory, {self.new!r} now"


def may_change(field: str) -> bool:
    """Whether a resumed run may differ in this field: nothing that a finished step depends on may."""
    section, *_, key = field.split(".")
    return section in ("mesh", "checkpoint") or key.endswith("interval_steps") or field in _MAY_CHANGE


def config_changes(old: Config, new: Config) -> list[Change]:
    """The fields that differ, in the order of the config."""
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    return [Change(field, before[field], value) for field, value in after.items() if before[field] != value]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level: "model.moda.ffn_kv"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_config(workdir: Path) -> Config | None:
    """The directory's config, or None if it holds none.

    Raises:
        ValueError: config.json is there and is not a config.
    """
    path = workdir / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Config.from_dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a config of this version of moda_jax ({error})") from error


def check_config(workdir: Path, config: Config) -> list[Change]:
    """Checks that the directory is empty of config or holds this one, up to the fields that may change.

    Args:
        workdir: the run's directory; need not exist.
        config: the resolved config.

    Returns:
        The changes, all of them permitted.

    Raises:
        ValueError: workdir is a file, or holds another config: the message lists each differing field and both values.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir={str(workdir)!r}: is not a directory")
    old = read_config(workdir)
    if old is None:
        others = [name for name in (METRICS_FILE, CHECKPOINT_DIRECTORY) if (workdir / name).exists()]
        if others:
            raise ValueError(
                f"workdir={str(workdir)!r}: holds {' and '.join(others)} but no {CONFIG_FILE}, so nobody knows what "
                "run they belong to; use another --workdir"
            )
        return []
    changes = config_changes(old, config)
    refused = [change for change in changes if not may_change(change.field)]
    if refused:
        listing = "".join(f"\n  {change}" for change in refused)
        raise ValueError(
            f"workdir={str(workdir)!r}: holds a run with a different config; use another --workdir, or the same config:"
            f"{listing}"
        )
    return changes


def carry_tokenizer(workdir: Path, tokenizer_file: Path) -> None:
    """Copies the run's tokenizer.json into its directory, all or nothing, unless there is one.

    Raises:
        ValueError: the directory cannot be written.
    """
    path = workdir / TOKENIZER_FILE
    if path.exists():
        return
    temporary = path.with_suffix(".json.new")
    try:
        temporary.write_bytes(tokenizer_file.read_bytes())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"workdir={str(workdir)!r}: the tokenizer cannot be copied there ({error})") from error


def write_config(workdir: Path, config: Config, changes: list[Change]) -> None:
    """Creates the directory and writes config.json, all or nothing; says what changed.

    Raises:
        ValueError: the directory cannot be written.
    """
    for change in changes:
        _logger.info("config changed: %s", change)
        if change.field == "train.num_steps":
            _logger.warning(
                "the learning-rate schedule spans train.num_steps, so it changed too: from here on it is that of a run "
                "of %d steps, which the steps before did not follow",
                change.new,
            )
    path = workdir / CONFIG_FILE
    temporary = path.with_suffix(".json.new")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"workdir={str(workdir)!r}: cannot be written ({error})") from error
