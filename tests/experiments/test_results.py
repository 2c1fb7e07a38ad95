import copy
import json

import pytest
from support.plan_process import small_plan

from experiments import results

PLAN = small_plan("a", "b", steps=3)


def run(arm="a", seed=0, loss=2.0):
    budget = json.loads(json.dumps(PLAN.budget_facts()))
    return {
        "plan": "small", "arm": arm, "seed": seed, "budget": budget, "corpus": {"tokens": 1},
        "evaluation": {"validation": {"loss": loss, "targets": 5}},
    }  # fmt: skip


def test_files_of_two_machines_merge_and_a_run_in_both_counts_once(tmp_path):
    one = results.results_of(PLAN, [run("b", 1), run("a", 0)])
    two = results.results_of(PLAN, [run("a", 0), run("b", 0)])
    results.save(tmp_path / "one.json", one)
    assert results.load(tmp_path / "one.json") == one
    lines = (tmp_path / "one.json").read_text().splitlines()
    assert [line[:12] for line in lines if '"seed"' in line] == ['{"arm": "a",', '{"arm": "b",']  # a run is a line
    merged = results.merge([one, two, results.results_of(PLAN, [])])
    assert [(r["arm"], r["seed"]) for r in merged["runs"]] == [("a", 0), ("b", 0), ("b", 1)]
    assert merged["budget"]["steps"] == 3 and merged["corpus"] == {"tokens": 1}
    assert results.merge([merged, one]) == merged


def test_what_does_not_mix():
    one = results.results_of(PLAN, [run()])
    other = copy.deepcopy(one)
    other["budget"]["learning_rate"] = 1.0
    with pytest.raises(ValueError, match=r"'small' do not mix: budget.learning_rate: 0.001 and 1.0"):
        results.merge([one, other])
    with pytest.raises(ValueError, match=r"a seed 0: has two results, .* remove one file"):
        results.merge([one, results.results_of(PLAN, [run(loss=3.0)])])
    with pytest.raises(ValueError, match="got no results"):
        results.merge([])
    with pytest.raises(ValueError, match="plan small: a result is of plan 'large'"):
        results.results_of(PLAN, [run() | {"plan": "large"}])


def test_a_file_that_holds_something_else(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other.json: holds no results of a plan; expected an object with plan, arms"):
        results.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"none.json: holds no results of a plan \(.*No such file"):
        results.load(tmp_path / "none.json")
