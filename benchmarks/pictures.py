"""Draws the pictures in benchmarks/results again, each from the JSON beside it; nothing is measured.

    python -m benchmarks.pictures [--output=DIRECTORY]

The measuring scripts draw with the same functions. `loss_700m.json` holds the curves of two runs of train.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import attention, scaling, training
from moda_jax.pictures import draw_smoothed, labelled, legend_below, look, picture

RESULTS = Path(__file__).parent / "results"


def draw_losses(result: dict[str, Any], path: Path) -> None:
    """Training losses of several runs, and their differences to the first one's at the same steps."""
    with picture(path, 12, 4.8) as figure:
        curves, gaps = figure.subplots(1, 2)
        (first, base), *_ = result["runs"].items()
        for number, (name, run) in enumerate(result["runs"].items()):
            draw_smoothed(curves, run["steps"], run["loss"], look(number), name)
            if number:
                differences = [a - b for a, b in zip(run["loss"], base["loss"], strict=True)]
                draw_smoothed(gaps, run["steps"], differences, look(number), name)
        unit = "nats per token"
        curves.set(xlabel="step", ylabel=f"training loss ({unit})", title="Training loss of the 700M models, smoothed")
        gaps.axhline(0, color=look(0).color, linewidth=1)
        gaps.set(xlabel="step", ylabel=f"difference ({unit})", title=f"The same minus {first}'s")
        legend_below(figure, labelled(curves), columns=len(result["runs"]))


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draws what there are results of; returns the pictures."""
    drawn = []
    for path in sorted(results.glob("*.json")):
        result, target = json.loads(path.read_text()), output / path.with_suffix(".png").name
        if path.stem.startswith("attention_"):
            if any("ratio forward+backward" in row for row in result["rows"]):
                attention.plot(result, target)
        elif path.stem.startswith("training"):
            if any("seconds_by_category" in r for r in result["results"]):
                training.plot(result["results"], target)
        elif path.stem.startswith("scaling_"):
            scaling.plot(result["rows"], scaling.title_of(result["arguments"]["config"]), target)
        elif path.stem.startswith("loss_"):
            draw_losses(result, target)
        if target.is_file():
            drawn.append(target)
    return drawn


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    for path in draw_all(RESULTS, parser.parse_args().output):
        print(path)


if __name__ == "__main__":
    main()
