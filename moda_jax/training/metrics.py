"""A run's numbers: metrics.jsonl, TensorBoard events, model FLOPs utilisation, and the loss plot.

    python -m moda_jax.training.metrics compare RUN RUN ... [--output=comparison.png]

compares runs (see `moda_jax.training.compare`).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from moda_jax.training.workdir import METRICS_FILE, PLOT_FILE, TENSORBOARD_DIRECTORY

# Dense bfloat16/float16 matrix throughput in FLOP/s, from the vendors' data sheets, by a part of JAX's device_kind. The
# first match counts, so the special comes before the general.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device can do at most in a compute dtype; None where it is unknown (every CPU, and float32).

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: "float32", "bfloat16" or "float16".
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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
    """Appends to metrics.jsonl and to TensorBoard's events.

    Args:
        workdir: the run's directory; must exist.
        step: the step that the run goes on from; lines of later steps are dropped, since those steps are done again.

    Raises:
        ValueError: metrics.jsonl is damaged.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter  # 0.3 s that a refused run does not need

        path = workdir / METRICS_FILE
        if path.exists():
            kept = [entry for entry in read_metrics(workdir) if entry["step"] <= step]
            temporary = path.with_suffix(".jsonl.new")
            temporary.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir / TENSORBOARD_DIRECTORY), purge_step=step + 1 if step else None)

    def write(self, entry: dict[str, Any]) -> None:
        """Writes one line; `entry` holds "step" and numbers (None: unknown). A kill after this loses nothing."""
        self._file.write(_line(entry))
        self._file.flush()
        for name, value in entry.items():
            if name != "step" and value is not None:
                group = "validation" if name.startswith("validation_") else "train"
                self._events.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, entry["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()


class NoMetrics:
    """Stands for `MetricsWriter` in a process that writes nothing."""

    def write(self, entry: dict[str, Any]) -> None:
        """Drops the line."""

    def close(self) -> None:
        """Does nothing."""


def plot_losses(workdir: Path) -> Path:
    """Draws the training and validation loss of metrics.jsonl into loss.png and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state; slow to import
    from matplotlib.figure import Figure

    entries = read_metrics(workdir)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, marker in (("loss", "training", None), ("validation_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label} (last: {points[-1][1]:.3f})", marker=marker)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=workdir.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = workdir / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


if __name__ == "__main__":
    from moda_jax.training.compare import main

    raise SystemExit(main())
