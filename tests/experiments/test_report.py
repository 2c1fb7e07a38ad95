import json
import shutil
import statistics
from pathlib import Path

import pytest

from experiments import report, results
from experiments.__main__ import main
from experiments.plan import load_plan, plan_names

PLAN = load_plan("table6").tiny()
LOSSES = {  # by arm, then seed; seeds scatter much more than depth_ffn - none = -0.02 does
    "none": (2.0, 2.3, 1.9),
    "depth": (2.001, 2.29, 1.92),
    "depth_ffn": (1.981, 2.279, 1.88),
}


def run(arm, seed, loss):
    return {
        "plan": "table6", "arm": arm, "seed": seed, "budget": json.loads(json.dumps(PLAN.budget_facts())),
        "corpus": {
            "tokens": {"train": {"tokens": 10_000}, "validation": {"tokens": 1000}},
            "evaluation": {
                "validation/x": {"documents": 3, "tokens": 1000}, "held_out": {"documents": 4, "tokens": 2000}
            },
        },
        "steps": 40, "tokens": 10_240, "parameters": 66_016, "tokens_per_second": 5000.0, "mfu": None,
        "peak_bytes": None, "train_seconds": 3.0, "decode": {"cache_bytes_per_token": 256, "depth_bytes": 192},
        "evaluation": {
            "validation": {"loss": loss, "targets": 900}, "validation/x": {"loss": loss, "targets": 900},
            "held_out": {"loss": loss + 1, "targets": 1900},
        },
        "validation_curve": [[20, loss + 1], [40, loss]], "curve": [[20, loss + 1]], "depth_mass": [],
        "probes": None if arm == "none" else {
            "tokens": 512, "depth_mass": 0.25, "losses": {"none": loss, "all": loss + 0.5, "layer:0": loss + 0.125},
            "slot_mass": [[0.0, 0.0], [0.25, 0.0], [0.125, 0.125]], "kinds": ["attention"], "entries_per_layer": 1,
        },
        "environment": {
            "device": "cpu", "jax": "1", "flax": "2", "python": "3.12", "commit": "abc", "date": "2026-01-01"
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def values():
    return results.results_of(PLAN, [run(arm, seed, x) for arm, xs in LOSSES.items() for seed, x in enumerate(xs)])


def test_the_tables_say_what_was_shown(values):
    text = report.markdown(PLAN, values)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    lines = {row.split("|")[1].strip(): row for row in reversed(rows)}  # of two the first
    shown = lines["`depth_ffn` - `none`"]
    assert "-0.0200" in shown and "| lower |" in shown
    assert lines["`depth` - `none`"].endswith("| not shown | no |")
    assert "2.0667 (0.2082)" in lines["`none`"] and "3.0667" in lines["`none`"]
    assert "+0.5000 | +0.5000" in lines["all"]
    assert "`none_time` - " not in text  # no run, no row
    for expected in (
        "95%",
        "PSF-2.0",
        "1.02 epochs",
        "commit abc",
        "not tuned",
        "`none_time`: 50 steps",
        "### By source, and on documents held out",
        "| **-0.0200 +- 0.0025** | **-0.0200 +- 0.0025** |",
    ):
        assert expected in text, expected


def test_a_single_seed_has_no_interval(values):
    one = values | {"runs": [r for r in values["runs"] if r["seed"] == 0]}
    assert "| -0.0190 | - | - | - | one seed | no |" in report.comparisons_table(PLAN, one, "validation")


def test_report_merges_returns_and_writes_all_three(values, tmp_path, capsys):
    for name, seeds in (("first", (0,)), ("second", (0, 1, 2))):
        part = values | {"runs": [r for r in values["runs"] if r["seed"] in seeds]}
        results.save(tmp_path / f"{name}.json", part)
    files = [f"--from={tmp_path / name}.json" for name in ("first", "second")]
    assert main(["report", "table6", *files, f"--output={tmp_path / 'out'}"]) == 0
    assert results.load(tmp_path / "out" / "table6.json") == values
    text = (tmp_path / "out" / "table6.md").read_text()
    assert text == report.markdown(PLAN, values) == capsys.readouterr().out[:-1]
    for name in ("table6", "table6_depth_probes", "table6_depth_ffn_probes"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_results_yet(tmp_path, capsys):
    assert main(["report", "norms", f"--output={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"error: report norms: no {tmp_path / 'norms.json'} yet; name results with --from=FILE\n"
    )


@pytest.mark.parametrize("name", [name for name in plan_names() if (report.RESULTS / f"{name}.json").is_file()])
def test_the_committed_table_is_that_of_the_committed_results(name, tmp_path):
    shutil.copy(report.RESULTS / f"{name}.json", tmp_path)
    main(["report", name, f"--output={tmp_path}"])
    committed = {suffix: (report.RESULTS / f"{name}{suffix}").read_text() for suffix in (".md", ".json")}
    assert {suffix: (Path(tmp_path) / f"{name}{suffix}").read_text() for suffix in (".md", ".json")} == committed


def test_readme_quotes_the_committed_results():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    plan, committed = load_plan("table6"), results.load(report.RESULTS / "table6.json")
    for arm in plan.arms:
        loss = statistics.fmean(report.losses(committed, arm.name, "validation").values())
        assert f"| {loss:.4f} |" in readme, arm.name
    for (a, b), d in report.compare(plan, committed, "validation").items():
        if b == "none" or a == "depth_ffn":
            assert f"{d.mean:+.4f} ± {d.half_width:.4f}" in readme or (a, b) == ("depth_ffn", "depth"), (a, b)
