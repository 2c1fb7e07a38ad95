"""A plan's results as one small JSON file: what every run came to. Files of several machines merge.

A run is known by (plan, arm, seed); results of different budgets are never mixed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.plan import Plan


def results_of(plan: Plan, runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The file's content: what the plan is, and its runs in the order of arm and seed.

    Raises:
        ValueError: a run of another plan or of another budget.
    """
    budget = json.loads(json.dumps(plan.budget_facts()))
    order = {arm.name: place for place, arm in enumerate(plan.arms)}
    kept = []
    for run in runs:
        if run["plan"] != plan.name:
            raise ValueError(f"plan {plan.name}: a result is of plan {run['plan']!r}")
        difference = _difference(budget, run["budget"])
        if difference:
            raise ValueError(
                f"plan {plan.name}, {run['arm']} seed {run['seed']}: was run with another budget, {difference}; "
                "results of different budgets do not mix: use another --workdir"
            )
        kept.append({key: value for key, value in run.items() if key not in ("budget", "plan", "corpus")})
        corpus = run["corpus"]
    kept.sort(key=lambda run: (order[run["arm"]], run["seed"]))
    values = {"plan": plan.name, **budget}
    if kept:
        values["corpus"] = corpus
    return values | {"runs": kept}


def merge(files: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several files' content as one; a run that stands in two is taken once.

    Raises:
        ValueError: no file; they are of different plans, budgets or corpora; or one run came to different results.
    """
    files = list(files)
    if not files:
        raise ValueError("merge: got no results")
    first = next((file for file in files if file["runs"]), files[0])
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for file in files:
        for field in ("plan", "budget", "arms", "tiny", "corpus"):
            if field in first and field in file and file[field] != first[field]:
                difference = _difference(first[field], file[field], field)
                raise ValueError(f"results of plan {first['plan']!r} do not mix: {difference}")
        for run in file["runs"]:
            known = runs.setdefault((run["arm"], run["seed"]), run)
            if known["evaluation"] != run["evaluation"]:
                raise ValueError(
                    f"plan {first['plan']!r}, {run['arm']} seed {run['seed']}: has two results, "
                    f"{known['evaluation']['validation']} and {run['evaluation']['validation']}; remove one file"
                )
    order = {arm: place for place, arm in enumerate(first["arms"])}
    merged = sorted(runs.values(), key=lambda run: (order[run["arm"]], run["seed"]))
    return {key: value for key, value in first.items() if key != "runs"} | {"runs": merged}


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: holds no results of a plan ({error})") from error
    if not isinstance(values, dict) or not {"plan", "arms", "runs"} <= set(values):
        raise ValueError(f"{path}: holds no results of a plan; expected an object with plan, arms and runs")
    return values


def save(path: Path, values: dict[str, Any]) -> None:
    """Writes a results file, all or nothing: a line per run, so that a person sees what a commit changed."""
    head = {key: value for key, value in values.items() if key != "runs"}
    runs = ",\n".join(json.dumps(run) for run in values["runs"])
    text = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + runs + "\n ]\n}\n"
    _replace(path, text)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes any JSON file, all or nothing."""
    _replace(path, json.dumps(values, indent=1) + "\n")


def copy(source: Path, target: Path) -> None:
    """Copies a file, all or nothing."""
    temporary = target.with_name(target.name + ".new")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _difference(expected: Any, came: Any, where: str = "") -> str:
    """The first field that differs, or ""."""
    if isinstance(expected, dict) and isinstance(came, dict):
        for key in [*expected, *(key for key in came if key not in expected)]:
            found = _difference(expected.get(key), came.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    return "" if expected == came else f"{where}: {expected!r} and {came!r}"
