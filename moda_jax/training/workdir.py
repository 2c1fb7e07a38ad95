"""A run's working directory: whether it belongs to this config, its config.json and what was changed in it.

What lies in it:

    config.json      the resolved config
    tokenizer.json   the task's copies of files, so that the run can be moved: the tokenizer, unless it is "bytes"
    changes.jsonl    a line per field that a resumed run changed: step, field, old, new
    metrics.jsonl    a line per logged step
    tensorboard/     the same values as TensorBoard events, see `trackers`
    wandb_id.txt     under which Weights & Biases knows the run; what it has not sent lies in wandb/
    checkpoints/     one directory per saved step
    faults/          the step that stopped the run, to be replayed
    processes/       of a run of many processes: what libraries said, and the stacks when a peer was lost
    lock             who trains here, see `lock`
    loss.png         the loss curves, drawn when the run ends
    sample.txt       the text sample, written when the run ends

Everything but config.json and changes.jsonl is written by others; the names stand here.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from moda_jax.config import Config, check_local
from moda_jax.training.schedule import is_same_plan

_logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
CHANGES_FILE = "changes.jsonl"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_ID_FILE = "wandb_id.txt"
CHECKPOINT_DIRECTORY = "checkpoints"
FAULT_DIRECTORY = "faults"
PROCESS_DIRECTORY = "processes"
PLOT_FILE = "loss.png"
SAMPLE_FILE = "sample.txt"


# What a resumed run may differ in: what changes neither the function that is trained nor the data. Rounding may differ.
_FREE_SECTIONS = ("mesh", "checkpoint", "eval")
_FREE_FIELDS = (
    "model.attention_implementation", "model.depth_gradient_group", "model.layer_loop", "model.remat",
    "data.cache_dir", "data.images.threads", "data.images.workers", "data.prefetch_batches",
    "train.accumulation_steps", "train.deterministic", "train.log_interval_steps", "train.loss_spike_deviations",
    "train.max_skipped_in_a_row", "train.num_steps", "train.peer_timeout_seconds", "train.sample_prompt",
    "train.sample_tokens", "train.trackers", "train.watchdog_seconds",
)  # fmt: skip
# Names of places: another name is good if the same data is there, which the checkpoint's fingerprints decide.
_PLACES = ("data.source", "data.tokenizer", "data.end_of_text")
# With these, sums are added up in another order.
_ROUNDING = (
    "model.attention_implementation", "model.depth_gradient_group", "model.layer_loop", "model.remat",
    "train.accumulation_steps", "train.deterministic",
)  # fmt: skip


class Change(NamedTuple):
    """A field that differs between the directory's config and the one that came."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} in the directory, {self.new!r} now"


def may_change(field: str) -> bool:
    """Whether a resumed run may differ in this field: neither the function that is trained nor the data depends on it.

    True also for the names of places (a moved folder, a moved tokenizer.json): whether the same data is there is seen
    when it is opened.
    """
    return field.split(".")[0] in _FREE_SECTIONS or field in _FREE_FIELDS or field in _PLACES


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


def read_run_config(workdir: str | Path) -> Config:
    """The config of a run's directory.

    Raises:
        ValueError: there is no such directory, or it holds no run.
    """
    check_local("--workdir", str(workdir))
    workdir = Path(workdir)
    if not workdir.is_dir():
        kind = "is not a directory" if workdir.exists() else "no such directory"
        raise ValueError(f"--workdir={workdir}: {kind}; name the directory of a run, as train.py's --workdir did")
    config = read_config(workdir)
    if config is None:
        raise ValueError(f"--workdir={workdir}: holds no {CONFIG_FILE}, so it is no run's directory; train one first")
    return config


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
    check_local("workdir", str(workdir))
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


def carry(workdir: Path, name: str, file: Path) -> None:
    """Copies a file that the run needs into its directory, all or nothing, unless it is there.

    Raises:
        ValueError: the directory cannot be written.
    """
    path = workdir / name
    if path.exists():
        return
    temporary = path.with_name(f"{name}.new")
    try:
        temporary.write_bytes(file.read_bytes())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"workdir={str(workdir)!r}: {name} cannot be copied there ({error})") from error


def write_config(workdir: Path, config: Config, changes: list[Change], step: int = 0) -> None:
    """Creates the directory and writes config.json, all or nothing; says what changed, and keeps it in changes.jsonl.

    Args:
        workdir: the run's directory.
        config: the resolved config.
        changes: from `check_config`.
        step: that the run goes on from.

    Raises:
        ValueError: the directory cannot be written.
    """
    for change in changes:
        _logger.info("config changed at step %d: %s", step, change)
    fields = [change.field for change in changes]
    if step and any(field in _ROUNDING or field.startswith("mesh.") for field in fields):
        _logger.info("from step %d on sums are rounded in another order: the same training, not bit for bit", step)
    if step and "train.num_steps" in fields:
        _say_new_plan(config, changes[fields.index("train.num_steps")].old, step)
    path = workdir / CONFIG_FILE
    temporary = path.with_suffix(".json.new")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        if changes:
            with (workdir / CHANGES_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | change._asdict()) + "\n" for change in changes)
    except OSError as error:
        raise ValueError(f"workdir={str(workdir)!r}: cannot be written ({error})") from error


def _say_new_plan(config: Config, old_steps: int, step: int) -> None:
    """A decay ends with the run, so another length is another learning rate."""
    steps = config.train.num_steps
    if is_same_plan(config.optimizer, old_steps, steps, step):
        _logger.info("train.num_steps: the learning rate up to step %d is that of a run of %d steps", step, steps)
        return
    _logger.warning(
        "train.num_steps: the learning rate is planned anew from step %d on, as in a run of %d steps; the steps before "
        "did not follow that plan, so this is not the run that was planned so long from its start",
        step, steps,
    )  # fmt: skip
