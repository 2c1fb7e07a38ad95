"""The report of a plan, from its results file alone: tables in Markdown, a picture, and the merged JSON.

    python -m experiments report PLAN [--from=FILE ...] [--output=DIR]

reads experiments/results/PLAN.json, if it is there, and the files that are named, merges them, and writes PLAN.json,
PLAN.md, PLAN.png, and PLAN_ARM_probes.png for each arm with depth slots.
"""

from __future__ import annotations

import argparse
import statistics as st
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results as results_lib
from experiments.plan import Plan, load_plan
from experiments.statistics import CONFIDENCE, POWER, PairedDifference, paired_difference
from moda_jax.inference import depth_probes
from moda_jax.pictures import COLORS, GREY, labelled, legend_below, look, picture

RESULTS = Path(__file__).parent / "results"  # in a clone; a wheel holds none
VALIDATION = "validation"
_NO_VALUE = "-"


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status.

    Raises:
        ValueError: there are no results, or they do not mix.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments report", description=__doc__.split("\n")[0])
    parser.add_argument("plan", metavar="PLAN")
    parser.add_argument("--from", dest="files", type=Path, action="append", default=[], help="a results file to merge")
    parser.add_argument(
        "--output", type=Path, default=RESULTS if RESULTS.is_dir() else Path(),
        help="default: experiments/results in a clone of the repository, else the current directory",
    )  # fmt: skip
    flags = parser.parse_args(arguments)
    plan = load_plan(flags.plan)
    committed = flags.output / f"{plan.name}.json"
    paths = [path for path in (committed,) if path.is_file()] + flags.files
    if not paths:
        raise ValueError(f"report {plan.name}: no {committed} yet; name results with --from=FILE")
    text, _ = write(plan, [results_lib.load(path) for path in paths], flags.output)
    print(text)
    return 0


def write(plan: Plan, files: Sequence[dict[str, Any]], output: Path) -> tuple[str, dict[str, Any]]:
    """Merges results and writes PLAN.json, PLAN.md and PLAN.png; returns the Markdown and the merged results.

    Raises:
        ValueError: they do not mix, or are of another plan.
    """
    values = results_lib.merge(files)
    if values["plan"] != plan.name:
        raise ValueError(f"report {plan.name}: the results are of plan {values['plan']!r}")
    if values["tiny"]:
        plan = plan.tiny()
    if not values["runs"]:
        raise ValueError(f"report {plan.name}: no run is finished")
    output.mkdir(parents=True, exist_ok=True)
    results_lib.save(output / f"{plan.name}.json", values)
    text = markdown(plan, values)
    (output / f"{plan.name}.md").write_text(text, encoding="utf-8")
    draw(plan, values, output / f"{plan.name}.png")
    for arm, probes in mean_probes(plan, values).items():
        title = f"{plan.name}, {arm}: {probes['tokens']} targets of the validation split, mean over the runs"
        depth_probes.draw(probes, output / probes_picture(plan, arm), title=title)
    return text, values


def markdown(plan: Plan, values: dict[str, Any]) -> str:
    """The report as Markdown."""
    sets = evaluation_sets(values)
    parts = [
        f"# {plan.name}: {plan.question}",
        plan.note,
        arms_table(plan, values),
        "Loss in nats per token on the whole validation split and on the documents held out, mean over the seeds and "
        "(standard deviation). Cache: bytes that decoding keeps for every token of the text; depth: bytes that it "
        "holds for the token being decoded alone.",
        "## Paired differences",
        f"First arm's loss minus the second one's, seed by seed (same batches, same initial values). Interval: "
        f"{CONFIDENCE:.0%}, Student's t. *Shown* is a difference whose interval does not cover 0: one larger than "
        f"its half-width. Detectable: the true difference that such a plan shows with probability {POWER:.0%}. Shown "
        "among N: still so when all N comparisons together may err once in twenty plans (Bonferroni).",
        comparisons_table(plan, values, VALIDATION),
        _sets_section(plan, values, [name for name in sets if name != VALIDATION]),
        _probes_section(plan, values),
        "## What this is of",
        _conditions(plan, values),
        f"![{plan.name}]({plan.name}.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def evaluation_sets(values: dict[str, Any]) -> list[str]:
    """The names of what every run was evaluated on, "validation" first."""
    names = list(values["runs"][0]["evaluation"])
    return sorted(names, key=lambda name: (name != VALIDATION, name))


def losses(values: dict[str, Any], arm: str, evaluation: str) -> dict[int, float]:
    """seed -> loss of an arm's runs on one evaluation set."""
    return {run["seed"]: run["evaluation"][evaluation]["loss"] for run in values["runs"] if run["arm"] == arm}


def compare(plan: Plan, values: dict[str, Any], evaluation: str) -> dict[tuple[str, str], PairedDifference]:
    """The plan's comparisons on one evaluation set, as far as there are runs for them."""
    pairs = {
        (a, b): paired_difference(losses(values, a, evaluation), losses(values, b, evaluation))
        for a, b in plan.comparisons
    }
    return {pair: difference for pair, difference in pairs.items() if difference is not None}


def mean_probes(plan: Plan, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """arm -> the mean of its runs' probes, in the form of one."""
    means = {}
    for arm in plan.arms:
        probes = [run["probes"] for run in values["runs"] if run["arm"] == arm.name and run["probes"]]
        if probes:
            first = probes[0]
            losses = {name: st.fmean(p["losses"][name] for p in probes) for name in first["losses"]}
            mass = np.mean([p["slot_mass"] for p in probes], axis=0).tolist()
            means[arm.name] = first | {
                "runs": len(probes), "losses": losses, "slot_mass": mass,
                "depth_mass": st.fmean(p["depth_mass"] for p in probes),
            }  # fmt: skip
    return means


def probes_picture(plan: Plan, arm: str) -> str:
    """The name of the picture of an arm's probes."""
    return f"{plan.name}_{arm}_probes.png"


def arms_table(plan: Plan, values: dict[str, Any]) -> str:
    """A row per arm: what it is, what it cost, what it came to."""
    has_held_out = "held_out" in evaluation_sets(values)
    header = ["arm", "", "seeds", "parameters", "steps", "validation loss", *(["held out"] if has_held_out else [])]
    header += ["tokens/s", "MFU", "minutes", "peak GiB", "cache B/token", "depth B"]
    rows = []
    for arm in plan.arms:
        runs = [run for run in values["runs"] if run["arm"] == arm.name]
        if not runs:
            continue
        row = [f"`{arm.name}`", arm.text, str(len(runs)), f"{runs[0]['parameters'] / 1e6:.2f}M", str(runs[0]["steps"])]
        row.append(_mean_and_deviation(list(losses(values, arm.name, VALIDATION).values())))
        if has_held_out:
            row.append(_mean_and_deviation(list(losses(values, arm.name, "held_out").values())))
        row += [
            _mean(runs, lambda run: run["tokens_per_second"], lambda x: f"{x / 1e3:.0f}k"),
            _mean(runs, lambda run: run["mfu"], lambda x: f"{100 * x:.1f} %"),
            _mean(runs, _minutes, lambda x: f"{x:.2f}"),
            _mean(runs, lambda run: run["peak_bytes"], lambda x: f"{x / 2**30:.1f}"),
            str(runs[0]["decode"]["cache_bytes_per_token"]),
            str(runs[0]["decode"]["depth_bytes"]),
        ]
        rows.append(row)
    return _table(header, rows, left=2)


def comparisons_table(plan: Plan, values: dict[str, Any], evaluation: str) -> str:
    """A row per comparison."""
    header = ["comparison", "seeds", "difference", "sd", "95 % interval", "detectable", "the first arm's loss is"]
    rows, compared = [], compare(plan, values, evaluation)
    header.append(f"shown among {len(compared)}")
    for (a, b), d in compared.items():
        row = [f"`{a}` - `{b}`", str(len(d.seeds)), f"{d.mean:+.4f}"]
        if d.interval is None:
            row += [_NO_VALUE] * 3
        else:
            row += [f"{d.deviation:.4f}", f"{d.interval[0]:+.4f} .. {d.interval[1]:+.4f}", f"{d.detectable:.4f}"]
        rows.append([*row, d.verdict, "yes" if d.is_shown_among(len(compared)) else "no"])
    return _table(header, rows, left=1)


def _sets_section(plan: Plan, values: dict[str, Any], names: Sequence[str]) -> str:
    """The comparisons on the validation split's sources and on what was held out, a column each."""
    if not names:
        return ""
    targets = {name: values["runs"][0]["evaluation"][name]["targets"] for name in names}
    compared = {name: compare(plan, values, name) for name in names}
    rows = []
    for pair in compare(plan, values, VALIDATION):
        row = [f"`{pair[0]}` - `{pair[1]}`"]
        for name in names:
            d = compared[name][pair]
            text = f"{d.mean:+.4f}" if d.interval is None else f"{d.mean:+.4f} +- {d.half_width:.4f}"
            row.append(f"**{text}**" if d.verdict in ("lower", "higher") else text)
        rows.append(row)
    header = [
        "comparison",
        *(f"{name.removeprefix('validation/')} ({count / 1e6:.2f}M)" for name, count in targets.items()),
    ]
    return (
        "### By source, and on documents held out\n\nMean difference and the interval's half-width; bold where it is "
        f"shown. In brackets: predicted tokens.\n\n{_table(header, rows, left=1)}"
    )


def _probes_section(plan: Plan, values: dict[str, Any]) -> str:
    """Mean cost of each hiding by arm, and the mass on the depth part."""
    probed = mean_probes(plan, values)
    if not probed:
        return ""
    names = list(dict.fromkeys(name for probes in probed.values() for name in probes["losses"] if name != "none"))
    header = ["hidden or kept", *(f"`{arm}`" for arm in probed)]
    rows = [["(mass on the depth part)", *(f"{probes['depth_mass']:.3f}" for probes in probed.values())]]
    for name in names:
        costs = [p["losses"][name] - p["losses"]["none"] if name in p["losses"] else None for p in probed.values()]
        rows.append([name, *(_NO_VALUE if cost is None else f"{cost:+.4f}" for cost in costs)])
    counts = ", ".join(f"{probes['runs']} of `{arm}`" for arm, probes in probed.items())
    tokens = next(iter(probed.values()))["tokens"]
    pictures = "\n".join(f"![probes of {arm}]({probes_picture(plan, arm)})" for arm in probed)
    return (
        "## Depth probes\n\nWhat a trained run loses, in nats per token, when slots are hidden from every layer that "
        f"would read them; mean over the runs ({counts}), {tokens} targets of the validation split. `layer:N` hides "
        "what layer N wrote; `only last:N` leaves a layer its N newest slots. A run that was trained without those "
        f"slots would do better than this.\n\n{_table(header, rows, left=1)}\n\n{pictures}"
    )


def _conditions(plan: Plan, values: dict[str, Any]) -> str:
    """Corpus, budget, machine: everything that a number stands on."""
    budget, corpus = values["budget"], values["corpus"]
    tokens, train = budget["steps"] * budget["batch_size"] * budget["sequence_length"], corpus["tokens"]["train"]
    environments = [run["environment"] for run in values["runs"]]

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(environment[key]) for environment in environments))

    lines = [
        f"Corpus: {plan.corpus.name}. {plan.corpus.note} Licence of the text: {plan.corpus.licence}.",
        f"Tokens: {tokens / 1e6:.2f}M in {budget['steps']} steps of {budget['batch_size']} rows of "
        f"{budget['sequence_length']}: {tokens / train['tokens']:.2f} epochs of {train['tokens'] / 1e6:.2f}M training "
        "tokens" + "".join(_other_steps(plan, values)) + ".",
        f"Learning rate {budget['learning_rate']:g}, warm-up {budget['warmup_steps']} steps, cosine to a tenth: "
        f"{plan.learning_rate_note}.",
        f"Evaluation: {', '.join(_set_text(corpus, name) for name in corpus['evaluation'])}.",
    ]
    if any(arm.time_of for arm in plan.arms) and plan.speed_record is not None:
        speeds = ", ".join(f"{arm} {speed:g}" for arm, speed in plan.speed_record["tokens_per_second"].items())
        device = plan.speed_record.get("device", plan.speed_record.get("note", ""))
        lines.append(f"Equal time is planned from tokens/s measured before ({device}): {speeds}.")
    lines.append(
        f"Runs: {each('device')}; jax {each('jax')}, flax {each('flax')}, Python {each('python')}; commit "
        f"{each('commit')}; {each('date')}."
    )
    return "\n".join(f"- {line}" for line in lines)


def _other_steps(plan: Plan, values: dict[str, Any]) -> list[str]:
    """Of arms that do another number of steps than the budget's."""
    arms = values["arms"]
    return [
        f"; `{arm.name}`: {arms[arm.name]['steps']} steps"
        for arm in plan.arms
        if arms[arm.name]["steps"] != values["budget"]["steps"]
    ]


def _set_text(corpus: dict[str, Any], name: str) -> str:
    entry = corpus["evaluation"][name]
    return f"{name} ({entry['documents']} documents, {entry['tokens'] / 1e6:.2f}M tokens)"


def draw(plan: Plan, values: dict[str, Any], path: Path) -> None:
    """The validation loss while training, its difference to the baseline's, and the paired intervals."""
    unit = "nats per token"
    with picture(path, 15, 5.8) as figure:
        curves, gaps, intervals = figure.subplots(1, 3)
        step_tokens = values["budget"]["batch_size"] * values["budget"]["sequence_length"] / 1e6
        for number, arm in enumerate(plan.arms):
            curve, appearance = _mean_curve(values, arm.name), look(number)
            if not curve:
                continue
            options = {"marker": appearance.marker, "label": arm.name} | appearance.curve
            places = [step * step_tokens for step in curve]
            curves.plot(places, list(curve.values()), **options)
            gap = _mean_gap(values, arm.name, plan.arms[0].name)
            if number and list(gap) == list(curve):
                gaps.plot(places, list(gap.values()), **options)
        curves.set(
            xlabel="million tokens", ylabel=f"validation loss ({unit})",
            title="Validation loss while training, mean over the seeds",
        )  # fmt: skip
        gaps.set(
            xlabel="million tokens", ylabel=f"difference ({unit})",
            title=f"The same minus {plan.arms[0].name}'s, at equal steps",
        )  # fmt: skip
        gaps.axhline(0, color=GREY, linewidth=1)
        _draw_intervals(intervals, compare(plan, values, VALIDATION))
        intervals.set_xlabel(f"difference of the final validation loss ({unit})")
        legend_below(figure, labelled(curves), columns=len(plan.arms))
        devices = ", ".join(dict.fromkeys(run["environment"]["device"] for run in values["runs"]))
        figure.suptitle(f"{plan.name}: {plan.question} ({devices})")


def _draw_intervals(axes: Any, compared: dict[tuple[str, str], PairedDifference]) -> None:
    """A line per comparison: mean, interval, and a tick per seed above it."""
    for place, d in enumerate(reversed(compared.values())):
        shown = d.verdict in ("lower", "higher")
        color = COLORS[0] if shown else GREY
        axes.errorbar(
            d.mean,
            place,
            xerr=d.half_width,
            fmt="o",
            color=color,
            capsize=4,
            markerfacecolor=color if shown else "white",
        )
        axes.plot(d.differences, [place + 0.22] * len(d.differences), "|", color=color)
    axes.set_yticks(range(len(compared)), [f"{a} - {b}" for a, b in reversed(compared)])
    axes.axvline(0, color=GREY, linewidth=1)
    sizes = sorted(abs(d.mean) for d in compared.values())
    if sizes and sizes[-1] > 5 * sizes[len(sizes) // 2]:  # one large difference would hide the others
        axes.set_xscale("symlog", linthresh=2 * sizes[len(sizes) // 2])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    axes.set_title(f"{CONFIDENCE:.0%} intervals, a tick per seed\n(filled: shown; open, grey: not shown)")


def _mean_curve(values: dict[str, Any], arm: str) -> dict[int, float]:
    """step -> mean validation loss over an arm's runs."""
    points: dict[int, list[float]] = {}
    for run in values["runs"]:
        if run["arm"] == arm:
            for step, loss in run["validation_curve"]:
                points.setdefault(step, []).append(loss)
    return {step: st.fmean(found) for step, found in sorted(points.items())}


def _mean_gap(values: dict[str, Any], arm: str, baseline: str) -> dict[int, float]:
    """step -> mean difference of the validation losses over the seeds that both arms have."""
    curves = {(run["arm"], run["seed"]): dict(run["validation_curve"]) for run in values["runs"]}
    gaps: dict[int, list[float]] = {}
    for (name, seed), curve in curves.items():
        if name == arm:
            other = curves.get((baseline, seed), {})
            for step in curve.keys() & other.keys():
                gaps.setdefault(step, []).append(curve[step] - other[step])
    return {step: st.fmean(found) for step, found in sorted(gaps.items())}


def _minutes(run: dict[str, Any]) -> float | None:
    """Of training alone: without compilation, evaluation and saving."""
    return run["tokens"] / run["tokens_per_second"] / 60 if run["tokens_per_second"] else None


def _mean(runs: list[dict[str, Any]], of: Callable[[dict], float | None], form: Callable[[float], str]) -> str:
    found = [value for value in map(of, runs) if value is not None]
    return form(st.fmean(found)) if found else _NO_VALUE


def _mean_and_deviation(found: list[float]) -> str:
    text = f"{st.fmean(found):.4f}"
    return f"{text} ({st.stdev(found):.4f})" if len(found) > 1 else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Markdown; the first `left` columns to the left, the others to the right."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
