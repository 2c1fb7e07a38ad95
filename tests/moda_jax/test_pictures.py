"""The style of all pictures."""

import ast
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from moda_jax import pictures

ROOT = Path(__file__).parents[2]


def test_one_file_draws_for_all():
    """No other module of the project imports matplotlib: colours, sizes and line styles stand in one place."""
    importing = set()
    paths = [path for name in ("moda_jax", "experiments", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "matplotlib" for name in names):
                importing.add(str(path.relative_to(ROOT)))
    assert importing == {"moda_jax/pictures.py"}


def lightness(color):
    """CIE L* of "#RRGGBB": what is left of it in print without colour."""
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in matplotlib.colors.to_rgb(color)]
    return 116 * np.dot([0.2126, 0.7152, 0.0722], linear) ** (1 / 3) - 16


def test_curves_and_bars_are_told_without_their_colour():
    looks = [pictures.look(number) for number in range(63)]
    assert len({(look.color, str(look.line)) for look in looks[:49]}) == 49
    assert len({(look.color, look.hatch) for look in looks}) == 63
    for count in (len(pictures.COLORS), len(pictures.LINES)):
        assert len({str(look.line) for look in looks[:count]}) == count
    assert len({look.hatch for look in looks[:9]}) == 9 and len({look.marker for look in looks[:8]}) == 8
    assert abs(lightness(pictures.COLORS[0]) - lightness(pictures.COLORS[1])) > 5
    assert all(lightness(color) < 76 for color in pictures.COLORS)  # against white


def test_a_picture_is_in_the_style_and_leaves_the_callers_alone(tmp_path):
    with matplotlib.rc_context({"axes.grid": False, "savefig.dpi": 30, "lines.linewidth": 7}):
        with pictures.picture(tmp_path / "a.png", 2, 1) as figure:
            axes = figure.subplots()
            (line,) = axes.plot([0, 1])
            assert line.get_linewidth() == pictures.STYLE["lines.linewidth"]
            assert not axes.spines["top"].get_visible()
        assert matplotlib.rcParams["savefig.dpi"] == 30 and matplotlib.rcParams["lines.linewidth"] == 7
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (110, 220)


def test_a_drawing_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), pictures.picture(tmp_path / "a.png", 2, 1):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "window"), list(product((3, 40, 400), (None, 1.0, 30.0))))
def test_a_straight_line_stays_itself_to_both_ends(count, window):
    line = 3.0 - 0.25 * np.arange(count)
    np.testing.assert_allclose(pictures.smooth(line, window), line, rtol=1e-9, atol=1e-9)


def test_smoothing_is_the_weighted_least_squares_line_at_each_place():
    y, window = np.random.default_rng(0).normal(size=30), 2.0
    y[[4, 29]] = np.nan, np.inf
    smoothed = pictures.smooth(y, window)
    for place in range(30):
        near = [j for j in range(30) if abs(j - place) <= 6 and np.isfinite(y[j])]
        weights = [np.exp(-0.25 * ((j - place) / window) ** 2) for j in near]  # polyfit squares them
        slope, height = np.polyfit(near, y[near], 1, w=weights)
        assert smoothed[place] == pytest.approx(slope * place + height, abs=1e-9)


def test_smoothing_takes_noise_away_and_short_curves_as_they_are():
    x = np.linspace(0, 1, 200)
    noisy = np.exp(-3 * x) + np.random.default_rng(0).normal(scale=0.1, size=200)
    assert np.abs(pictures.smooth(noisy) - np.exp(-3 * x)).mean() < 0.4 * np.abs(noisy - np.exp(-3 * x)).mean()
    assert pictures.smooth([2.0, 1.0]).tolist() == [2.0, 1.0] and pictures.smooth([]).tolist() == []


def test_a_legend_stands_outside_of_the_axes(tmp_path):
    with pictures.picture(tmp_path / "a.png", 4, 3) as figure:
        axes = figure.subplots(1, 2)
        for each in axes:
            pictures.draw_smoothed(each, range(20), range(20), pictures.look(1), "a curve")
        pictures.legend_below(figure, pictures.labelled(*axes), columns=2)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["a curve"]
        box = legend.get_window_extent()
        assert all(not box.overlaps(each.get_tightbbox()) for each in axes)


def test_a_legend_takes_as_many_columns_as_the_figure_is_wide_enough_for(tmp_path):
    with pictures.picture(tmp_path / "a.png", 4, 3) as figure:
        axes = figure.subplots()
        for number in range(3):
            axes.plot([0, number], label=f"a curve with a long name, number {number}")
        pictures.legend_below(figure, pictures.labelled(axes), columns=3)
        (legend,) = figure.legends
        assert legend._ncols == 1 and legend.get_window_extent().width <= figure.bbox.width
