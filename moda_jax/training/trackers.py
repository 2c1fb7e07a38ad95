"""Trackers: where a run's numbers are shown, beside metrics.jsonl, which every run has.

`train.trackers` names them: "tensorboard", "wandb", both with a comma between, or "none". A tracker is anything with
the two methods of `Tracker`; a run opens those it names and needs no package of the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moda_jax.config import Config
from moda_jax.training.workdir import TENSORBOARD_DIRECTORY


class Tracker(Protocol):
    """A place that shows numbers by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a step's numbers, by names as "train/loss". Steps come in order; a failure to show them ends no run."""
        ...

    def close(self) -> None:
        """Hands on what is still held."""
        ...


class _Kind(NamedTuple):
    """How a tracker is opened: (config, directory of the run, step that it goes on from), and what it takes."""

    open: Callable[[Config, Path, int], Tracker]
    package: str
    extra: str | None


def _open_tensorboard(config: Config, workdir: Path, step: int) -> Tracker:
    from moda_jax.training.tensorboard import EventFile  # 0.3 s that a refused run does not need

    del config
    return EventFile(workdir / TENSORBOARD_DIRECTORY, purge_step=step + 1 if step else None)


def _open_wandb(config: Config, workdir: Path, step: int) -> Tracker:
    from moda_jax.training.wandb_tracker import WandbRun

    del step
    return WandbRun(config, workdir)


_KINDS = {
    "tensorboard": _Kind(_open_tensorboard, "tensorboardX", None),
    "wandb": _Kind(_open_wandb, "wandb", "wandb"),
}


def check_trackers(config: Config) -> None:
    """Checks that the packages of the run's trackers are installed; imports none of them.

    Raises:
        ValueError: one is not; the message says how to get it.
    """
    for name in config.train.tracker_names:
        kind = _KINDS[name]
        if importlib.util.find_spec(kind.package) is None:
            extra = f"[{kind.extra}]" if kind.extra else ""
            raise ValueError(
                f"train.trackers={config.train.trackers!r}: {name!r} takes the package {kind.package}, which is not "
                f'installed: python -m pip install "moda-jax{extra}"'
            )


def open_trackers(config: Config, workdir: Path, step: int) -> list[Tracker]:
    """The trackers of a run, in the order in which they are named.

    Args:
        config: of the run.
        workdir: its directory; must exist.
        step: that the run goes on from: later ones that were shown already are done again.
    """
    return [_KINDS[name].open(config, workdir, step) for name in config.train.tracker_names]


def group_scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the names that trackers show: "train/loss", "validation/loss"."""
    scalars = {}
    for name, value in entry.items():
        if name != "step" and value is not None:
            group = "validation" if name.startswith("validation_") else "train"
            scalars[f"{group}/{name.removeprefix('validation_')}"] = value
    return scalars
