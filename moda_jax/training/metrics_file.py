"""A run's numbers in its files: metrics.jsonl, and the loss plot."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from moda_jax.pictures import draw_smoothed, labelled, legend_below, look, picture
from moda_jax.tasks.task import Metric
from moda_jax.training.workdir import METRICS_FILE, PLOT_FILE

_logger = logging.getLogger(__name__)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; none without such a file. A last line that was cut off is left out.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    path = workdir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith("\n"):  # a kill in the middle of a write
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
    return entries


class MetricsWriter:
    """Appends to metrics.jsonl.

    Lines that a full disk does not take are held in memory and written before the next ones; the file never ends in
    half a line.

    Args:
        workdir: the run's directory; must exist.
        step: the step that the run goes on from; lines of later steps are dropped, since those steps are done again.

    Raises:
        ValueError: metrics.jsonl is damaged.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / METRICS_FILE
        self._held: list[str] = []
        if self._path.exists():
            _drop_lines_after(self._path, len([e for e in read_metrics(workdir) if e["step"] <= step]))
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, entry: dict[str, Any]) -> None:
        """Writes one line; `entry` holds "step" and numbers (None: unknown). A kill after this loses nothing."""
        self._held.append(_line(entry))
        self._write_held(entry["step"])

    def sync(self) -> None:
        """Puts what was written on disk, so that a checkpoint never knows of steps that metrics.jsonl has lost."""
        with contextlib.suppress(OSError):  # a disk that fails here fails in `write` too, which speaks
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Writes what is held, and closes the file."""
        if self._held:
            self._write_held(None)
        if self._held:
            _logger.error("%s: the last %d lines could not be written and are lost", self._path, len(self._held))
        os.close(self._descriptor)

    def _write_held(self, step: int | None) -> None:
        """All lines or none."""
        data = memoryview("".join(self._held).encode("utf-8"))
        size = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, size)
            if len(self._held) == 1:
                _logger.error("%s: cannot be written (%s); lines from step %s on are held", self._path, error, step)
            return
        if len(self._held) > 1:
            _logger.warning("%s: %d lines that were held are written", self._path, len(self._held))
        self._held.clear()


def _drop_lines_after(path: Path, count: int) -> None:
    """Cuts a file after its first `count` lines, which needs no space on the disk."""
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, sum(len(line) for line in lines[:count]))


class NoMetrics:
    """Stands for `MetricsWriter` in a process that writes nothing."""

    def write(self, entry: dict[str, Any]) -> None:
        """Drops the line."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def plot_curves(workdir: Path, metric: Metric) -> Path:
    """Draws a metric of training and validation, from metrics.jsonl, into loss.png and returns its path."""
    entries = read_metrics(workdir)
    path = workdir / PLOT_FILE
    with picture(path, 8, 4.8) as figure:
        axes = figure.subplots()
        steps, values = points(entries, metric.name)
        if steps:
            label = f"training, smoothed (last step: {values[-1]:.3f})"
            draw_smoothed(axes, steps, values, look(0), label)
        steps, values = points(entries, f"validation_{metric.name}")
        if steps:
            label = f"validation (last: {values[-1]:.3f})"
            axes.plot(steps, values, marker=look(1).marker, label=label, **look(1).curve)
        axes.set(xlabel="step", ylabel=metric.label, title=f"{workdir.name}: {metric.name} while training")
        legend_below(figure, labelled(axes), columns=2)
    return path


def points(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps at which a number was taken, and the numbers."""
    found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
