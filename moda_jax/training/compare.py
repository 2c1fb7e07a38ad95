"""Several runs side by side: their loss curves on one plot, and a table of their final values.

Runs as a command too:

    python -m moda_jax.training.metrics compare RUN RUN ... [--output=comparison.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moda_jax.config import Config, check_local
from moda_jax.tasks.registry import make_task
from moda_jax.tasks.task import Metric, Task
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.workdir import METRICS_FILE, read_config


def compare_runs(workdirs: Sequence[Path], output: Path) -> str:
    """Draws the loss curves of several runs on one plot and returns a table of their final values.

    Args:
        workdirs: the runs' directories.
        output: the PNG to write; its directory must exist.

    Raises:
        ValueError: a directory that holds no metrics yet, or is given twice.
    """
    names = _short_names(workdirs)
    runs = {}
    for name, workdir in zip(names, workdirs, strict=True):
        entries = read_metrics(workdir)
        if not entries:
            kind = f"holds no {METRICS_FILE} with a line" if workdir.is_dir() else "no such directory"
            raise ValueError(f"{workdir}: {kind}; expected the directory of a run, as train.py's --workdir")
        runs[name] = entries
    task = _task_of(workdirs)
    first, *_ = task.metrics
    _plot_comparison(runs, first, output)
    validation = (f"validation_{metric.name}" for metric in task.metrics)
    columns = ("step", task.items, first.name, *validation, f"{task.items}_per_second")
    rows = [("run", *columns)]
    for name, entries in runs.items():
        last = {key: _last(entries, key) for key in columns}
        rows.append((name, *("-" if last[key] is None else _number(last[key]) for key in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, `python -m moda_jax.training.metrics compare RUN RUN ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moda_jax.training.metrics", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="loss curves of several runs on one plot, and a table")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    compare.add_argument("--output", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    flags = parser.parse_args(arguments)
    try:
        for place in (*flags.runs, flags.output):
            check_local("RUN" if place != flags.output else "--output", str(place))
        if not flags.output.parent.is_dir():
            raise ValueError(f"--output={flags.output}: there is no directory {flags.output.parent}")
        table = compare_runs(flags.runs, flags.output)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"{table}\ncurves in {flags.output}")
    return 0


def _short_names(workdirs: Sequence[Path]) -> list[str]:
    """The directories' own names, or as many parts of their paths as tell them apart."""
    paths = [workdir.absolute() for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise ValueError("compare: a run is given twice")
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _task_of(workdirs: Sequence[Path]) -> Task:
    """What the runs learn, by the first one's config.json; without any the default."""
    configs = (read_config(workdir) for workdir in workdirs)
    return make_task(next((config for config in configs if config is not None), Config()))


def _plot_comparison(runs: dict[str, list[dict[str, Any]]], metric: Metric, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, entries) in enumerate(runs.items()):
        color = f"C{i % 10}"
        for prefix, style in (("", {"alpha": 0.35, "linewidth": 1}), ("validation_", {"marker": "o"})):
            key = f"{prefix}{metric.name}"
            points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
            if points:
                label = f"{name}: {'validation' if prefix else 'training'} {points[-1][1]:.3f}"
                axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
    axes.set(xlabel="step", ylabel=metric.label, title=f"training (thin) and validation {metric.name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _last(entries: list[dict[str, Any]], key: str) -> float | None:
    """The newest value that is there."""
    return next((entry[key] for entry in reversed(entries) if entry.get(key) is not None), None)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1000 else f"{value:.0f}"
