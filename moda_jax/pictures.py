"""How every picture of the project looks, and the one place that imports matplotlib.

Colours are Okabe and Ito's, which people who see fewer colours tell apart; the order begins with those that differ most
in lightness too. No line and no bar is told by its colour alone: `look` gives a number its line style, marker and hatch
as well. A legend stands beside or below what it explains, never on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "||", "++")
GREY = "#8A8A8A"  # what is not shown to differ, and reference lines
PROBABILITY = "magma"  # the colour map of probabilities, on a logarithmic scale
UNFILLED = {"facecolor": "#D9D9D9", "edgecolor": "#7A7A7A", "hatch": "////", "linewidth": 0.0}  # slots not written yet
FAINT = 0.3  # the opacity of values as they came, beneath their smoothed line
SMOOTHING = 1 / 30  # of a curve's length: the standard deviation of the window

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 110,
}


class Look(NamedTuple):
    """What tells the lines, or the bars, of one number from those of the others."""

    color: str
    line: Any
    marker: str
    hatch: str

    @property
    def curve(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {"color": self.color, "linestyle": self.line}

    @property
    def bar(self) -> dict[str, Any]:
        """Arguments of `Axes.bar`: the hatch is white, so that it is seen on every colour."""
        return {"facecolor": self.color, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0.5}


def look(number: int) -> Look:
    """The look of the curve or bar with this number, from 0.

    Line styles and hatches go round at another pace than the colours: no two looks below 49 share colour and line, or
    colour and hatch.
    """
    turn = number // len(COLORS)
    return Look(
        COLORS[number % len(COLORS)],
        LINES[(number + turn) % len(LINES)],
        MARKERS[number % len(MARKERS)],
        HATCHES[number % len(HATCHES)],
    )


@contextlib.contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, in the project's style; written as a PNG when the block ends without an error.

    Needs no display and leaves a caller's own figures and settings of matplotlib as they are.

    Args:
        path: of the PNG; its directory must exist.
        width, height: inches.
    """
    import matplotlib  # 0.3 s, which most commands do not need
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


def smooth(values: Sequence[float], window: float | None = None) -> np.ndarray:
    """A curve without its noise: at each place the straight line that fits best, near values counting most.

    A line and not a mean: at both ends, where the window hangs over, a mean of a falling curve would be too low or too
    high. Values that are not finite do not count.

    Args:
        values: evenly spaced.
        window: the Gaussian's standard deviation, in values; None: SMOOTHING of the curve, at least 1.5.

    Returns:
        float64, of the same length.
    """
    y = np.asarray(values, np.float64)
    if len(y) < 3:
        return y.copy()
    window = max(1.5, SMOOTHING * len(y)) if window is None else window
    reach = min(len(y) - 1, max(1, int(np.ceil(3 * window))))
    offset = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offset / window) ** 2)
    counts = np.isfinite(y)
    y = np.where(counts, y, 0.0)

    def around(weights: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.convolve(of, weights[::-1])[reach : reach + len(of)]

    s0, s1, s2 = (around(kernel * offset**power, counts.astype(np.float64)) for power in range(3))
    t0, t1 = (around(kernel * offset**power, y) for power in range(2))
    determinant = s0 * s2 - s1**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(determinant > 1e-9 * s0 * s2, (s2 * t0 - s1 * t1) / determinant, t0 / s0)


def draw_smoothed(axes: Axes, x: Sequence[float], y: Sequence[float], appearance: Look, label: str) -> None:
    """A curve with its noise faint beneath it."""
    axes.plot(x, y, color=appearance.color, linewidth=0.8, alpha=FAINT)
    axes.plot(x, smooth(y), label=label, **appearance.curve)


def legend_below(figure: Figure | SubFigure, handles: Sequence[Any], columns: int) -> None:
    """A legend under all of a figure's axes, in so many columns or as many as it is wide enough for; without anything
    to explain there is none."""
    if not handles:
        return
    for count in range(columns, 0, -1):
        legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=count, handlelength=3.5)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def labelled(*axes: Axes) -> list[Any]:
    """What bears a label in these axes, each label once."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values())


def log_probability(lowest: float, highest: float = 1.0) -> Any:
    """The norm of a colour map of probabilities; what lies beyond has the last colour."""
    from matplotlib.colors import LogNorm

    return LogNorm(lowest, highest, clip=True)


def patch(label: str, **options: Any) -> Any:
    """A rectangle for a legend: what an area of a map means."""
    from matplotlib.patches import Patch

    return Patch(label=label, **options)


def shade_unfilled(axes: Axes, left: float, right: float) -> None:
    """Marks the columns of an image whose slots no layer has written yet."""
    if right > left:
        low, high = axes.get_ylim()
        axes.axvspan(left, right, **UNFILLED)
        axes.set_ylim(low, high)


def whole_ticks(axes: Axes) -> None:
    """Ticks at whole numbers only: slots, layers."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
