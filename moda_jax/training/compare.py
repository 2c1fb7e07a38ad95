"""Several runs side by side: their loss curves on one plot, and a table of what they came to.

Runs that differ in their seed alone are seeds of one arm: they share a look, and the arm gets a mean of its own, on the
plot and in the table.

Runs as a command too:

    python -m moda_jax.training.metrics compare RUN RUN ... [--output=comparison.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moda_jax.config import Config, check_local
from moda_jax.pictures import FAINT, GREY, draw_smoothed, labelled, legend_below, look, picture, smooth
from moda_jax.tasks.registry import make_task
from moda_jax.tasks.task import Metric, Task
from moda_jax.training.metrics_file import points, read_metrics
from moda_jax.training.workdir import METRICS_FILE, read_config


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run as the comparison needs it: the lines of its metrics.jsonl, and its config.json or None."""

    name: str
    entries: list[dict[str, Any]]
    config: Config | None

    def arm(self) -> Any:
        """Equal for runs that differ in their seed alone; a run without config.json is an arm by itself."""
        if self.config is None:
            return self.name
        return dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, seed=0))


def compare_runs(workdirs: Sequence[Path], output: Path) -> str:
    """Draws the loss curves of several runs on one plot and returns a table.

    The table has the last value of each number, the best validation loss and its step, the peak learning rate and the
    seed; behind the seeds of an arm a line with their means.

    Args:
        workdirs: the runs' directories.
        output: the PNG to write; its directory must exist.

    Raises:
        ValueError: a directory that holds no metrics yet, or is given twice; losses in different units.
    """
    runs = []
    for name, workdir in zip(_short_names(workdirs), workdirs, strict=True):
        entries = read_metrics(workdir)
        if not entries:
            kind = f"holds no {METRICS_FILE} with a line" if workdir.is_dir() else "no such directory"
            raise ValueError(f"{workdir}: {kind}; expected the directory of a run, as train.py's --workdir")
        runs.append(_Run(name, entries, read_config(workdir)))
    task = _common_task(runs)
    first, *_ = task.metrics
    arms: dict[Any, list[_Run]] = {}
    for run in runs:
        arms.setdefault(run.arm(), []).append(run)
    _plot_comparison(list(arms.values()), first, output)
    return _table(list(arms.values()), task, first)


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


def _common_task(runs: Sequence[_Run]) -> Task:
    """What the runs learn, by their config.json; without any the default.

    Raises:
        ValueError: their losses are in different units, as nats per byte and nats per token.
    """
    tasks = {run.name: make_task(run.config) for run in runs if run.config is not None}
    units = {name: task.metrics[0].label for name, task in tasks.items()}
    if len(set(units.values())) > 1:
        given = ", ".join(f"{name}: {unit}" for name, unit in units.items())
        raise ValueError(f"compare: {given}; expected runs whose losses have one unit")
    return next(iter(tasks.values()), make_task(Config()))


def _table(arms: Sequence[Sequence[_Run]], task: Task, metric: Metric) -> str:
    """A line per run, and one for the mean over an arm's seeds."""
    validation = f"validation_{metric.name}"
    last = ("step", task.items, metric.name, *(f"validation_{each.name}" for each in task.metrics))
    last += (f"{task.items}_per_second",)
    rows = [("run", *last, "best", "at_step", "learning_rate", "seed")]
    for runs in arms:
        values = []
        for run in runs:
            steps, losses = points(run.entries, validation)
            best = min(zip(losses, steps, strict=True), default=(None, None))
            values.append([*(_last(run.entries, key) for key in last), *best])
            rows.append((run.name, *map(_number, values[-1]), *_plan(run)))
        if len(runs) > 1:
            cells = [_number(_mean(column)) for column in zip(*values, strict=True)]
            rate, _ = _plan(runs[0])
            rows.append((f"mean of {len(runs)} seeds", *cells[:-1], "-", rate, "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    )


def _plan(run: _Run) -> tuple[str, str]:
    """The peak learning rate and the seed."""
    if run.config is None:
        return "-", "-"
    return f"{run.config.optimizer.learning_rate:g}", str(run.config.train.seed)


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what every run has; equal whole numbers, as the steps of runs that got equally far, stay whole."""
    if None in values:
        return None
    return values[0] if len(set(values)) == 1 else statistics.fmean(values)


def _plot_comparison(arms: Sequence[Sequence[_Run]], metric: Metric, path: Path) -> None:
    """Training and validation, and with several arms the training losses' differences to the first arm's."""
    with picture(path, 8 if len(arms) == 1 else 13, 5.2) as figure:
        panels = figure.subplots(1, 1 if len(arms) == 1 else 2, squeeze=False)[0]
        means = [_mean_curve(runs, metric.name) for runs in arms]
        for number, (runs, mean) in enumerate(zip(arms, means, strict=True)):
            appearance, name = look(number), runs[0].name
            if len(runs) > 1:
                name = f"mean of {len(runs)} seeds: {', '.join(run.name for run in runs)}"
                for run in runs:
                    panels[0].plot(
                        *points(run.entries, metric.name), color=appearance.color, linewidth=0.8, alpha=FAINT
                    )
                panels[0].plot(list(mean), smooth(list(mean.values())), label=name, **appearance.curve)
            elif mean:
                draw_smoothed(panels[0], list(mean), list(mean.values()), appearance, name)
            validation = _mean_curve(runs, f"validation_{metric.name}")
            panels[0].plot(
                list(validation), list(validation.values()), linestyle="none", marker=appearance.marker,
                color=appearance.color, markeredgecolor="white", markersize=7, label=None if mean else name,
            )  # fmt: skip
            shared = [step for step in mean if step in means[0]]
            if number and shared:
                gaps = [mean[step] - means[0][step] for step in shared]
                draw_smoothed(panels[1], shared, gaps, appearance, name)
        panels[0].set(
            xlabel="step", ylabel=metric.label,
            title=f"Training (lines, smoothed) and validation {metric.name} (marks)",
        )  # fmt: skip
        if len(arms) > 1:
            first = arms[0][0].name if len(arms[0]) == 1 else "the first arm"
            panels[1].axhline(0, color=GREY, linewidth=1)
            panels[1].set(
                xlabel="step", ylabel=metric.label, title=f"Training {metric.name} minus that of {first}, same steps"
            )
        legend_below(figure, labelled(*panels), columns=1 if any(len(runs) > 1 for runs in arms) else 3)


def _mean_curve(runs: Sequence[_Run], key: str) -> dict[int, float]:
    """step -> mean over an arm's runs, at the steps that all of them have."""
    curves = [dict(zip(*points(run.entries, key), strict=True)) for run in runs]
    return {step: statistics.fmean(c[step] for c in curves) for step in curves[0] if all(step in c for c in curves)}


def _last(entries: list[dict[str, Any]], key: str) -> float | None:
    """The newest value that is there."""
    return next((entry[key] for entry in reversed(entries) if entry.get(key) is not None), None)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1000 else f"{value:.0f}"
