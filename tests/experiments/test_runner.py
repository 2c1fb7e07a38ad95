"""The runner with a worker that only counts: a kill of the runner, a stop, a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.plan_process import WORKER, small_plan

from experiments.runner import Runner, find_devices

ROOT = Path(__file__).parents[2]
STEPS = 30


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    facts = {"evaluation": {}, "tokens": {"train": {"tokens": 1000}}, "tokenizer": "none", "vocab_size": 512}
    (directory / "corpus.json").write_text(json.dumps(facts))
    return directory


def start(workdir, data, steps=STEPS):
    return subprocess.Popen(
        [sys.executable, "-m", "support.plan_process", workdir, data, workdir / "returned", str(steps)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def counted(workdir, arm, seed):
    path = workdir / "small" / arm / f"seed_{seed}" / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def starts(workdir, arm, seed):
    return (workdir / "small" / arm / f"seed_{seed}" / "starts.txt").read_text().count("start")


@pytest.mark.slow
def test_killed_in_mid_plan_the_same_command_does_nothing_twice_and_loses_nothing(tmp_path, data):
    workdir = tmp_path / "work"
    first = start(workdir, data)
    wait_for(lambda: len(counted(workdir, "a", 0)) > 3)
    first.kill()  # nothing of the runner's own runs after this
    first.communicate()
    wait_for(lambda: (workdir / "small" / "a" / "seed_0" / "saved.txt").is_file())  # its runs noticed

    second = start(workdir, data)
    wait_for(lambda: len(counted(workdir, "a", 1)) > 3)
    done_before = counted(workdir, "a", 0)
    second.send_signal(signal.SIGTERM)
    _, text = second.communicate(timeout=60)
    assert second.returncode == 75
    assert "the same command goes on" in text

    third = start(workdir, data)
    _, text = third.communicate(timeout=120)
    assert third.returncode == 1  # the bad arm's runs
    assert "failed: bad seed 0 (exit code 3" in text and "the reason why" in text
    for arm in ("a", "b"):
        for seed in (0, 1):
            assert counted(workdir, arm, seed) == list(range(1, STEPS + 1)), (arm, seed)
    assert counted(workdir, "a", 0) == done_before
    assert starts(workdir, "a", 0) == 2 and starts(workdir, "a", 1) == 2
    returned = json.loads((workdir / "returned" / "small.json").read_text())
    assert [(run["arm"], run["seed"]) for run in returned["runs"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert returned == json.loads((workdir / "small" / "small.json").read_text())


def test_the_queue_is_by_seed_and_the_longest_first(tmp_path, data):
    plan = small_plan("a", "b")
    runner = Runner(plan, tmp_path / "work", ["cpu"], data, worker=(str(WORKER),))
    assert [(job.arm.name, job.seed) for job in runner.jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    with pytest.raises(ValueError, match=r"is in use by process .*; one run has one writer"):
        Runner(plan, tmp_path / "work", ["cpu"], data)


def test_results_of_another_budget_are_refused(tmp_path, data):
    workdir = tmp_path / "work"
    plan = small_plan("a", steps=1, seeds=(0,))
    assert Runner(plan, workdir, ["cpu"], data, worker=(str(WORKER),)).run() == 0
    other = Runner(small_plan("a", steps=2, seeds=(0,)), workdir, ["cpu"], data, worker=(str(WORKER),))
    with pytest.raises(ValueError, match=r"a seed 0: was run with another budget, budget.steps: 2 and 1; results of"):
        other.run()


@pytest.mark.parametrize(
    ("wanted", "given", "devices"),
    [("cpu", "0", ["cpu"]), ("cpu:2", "0", ["cpu:0", "cpu:1"]), ("all", "2,3", ["2", "3"]), ("1", "2,3", ["2"]),
     ("all", "", ["cpu"])],
)  # fmt: skip
def test_devices(monkeypatch, wanted, given, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert find_devices(wanted) == devices


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("3", "--devices=3: this machine has 2 GPUs"), ("none", "--devices=none: expected all, a number, cpu or cpu:N"),
     ("cpu:x", "--devices=cpu:x: expected cpu or cpu:N")],
)  # fmt: skip
def test_devices_that_are_not_there(monkeypatch, wanted, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=f"^{message}$"):
        find_devices(wanted)
