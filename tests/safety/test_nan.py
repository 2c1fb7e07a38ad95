"""A NaN in a batch: its update is dropped and counted; too many of them stop the run, which can be replayed."""

import json
import logging

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus

from moda_jax.exit_codes import RunStoppedError
from moda_jax.training.checkpoint import newest_good_step
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.replay import main
from moda_jax.training.trainer import TrainingRun

POISONED = (1, 8, 9, 20)
STEPS = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("nan")
    write_corpus(root / "corpus")
    return root


def new_run(place, name, **train):
    config = tiny_config(
        place / "corpus", place / "cache", model={"num_layers": 1, "depth": "none", "width": 16, "ffn_width": 16},
        train={"num_steps": STEPS, "accumulation_steps": 2} | train, eval={"interval_steps": 0},
        checkpoint={"interval_steps": 9},
    )  # fmt: skip
    return TrainingRun(config, place / name)


class Poisoned:
    """The run's batches; those of some steps carry a NaN in the one array of floats."""

    def __init__(self, batches, first_step, steps):
        self._batches, self._step, self._steps = batches, first_step, steps

    def __next__(self):
        batch = next(self._batches)
        if self._step in self._steps:
            mask = batch.target_mask.copy()
            mask[1, 3] = np.nan
            batch = batch._replace(target_mask=mask)
        self._step += 1
        return batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


def poison(run, monkeypatch, steps):
    batches = run._data.train_batches
    monkeypatch.setattr(run._data, "train_batches", lambda position: Poisoned(batches(position), run.step + 1, steps))


def test_later_losses_are_those_of_a_run_without_that_update(place, monkeypatch, caplog):
    run = new_run(place, "poisoned")
    state, batches = run._program.initialize(), run._data.train_batches(0)
    compiled = run._program.trace_train_step().lower().compile()
    expected = {}
    for step in range(1, STEPS + 1):  # the run that never saw these batches
        batch = next(batches)
        if step in POISONED:
            continue
        state, metrics = compiled(state, batch, run._program.plan)
        expected[step] = (float(metrics.loss), float(metrics.grad_norm), float(metrics.learning_rate))
    batches.close()
    assert int(state.counts.updates) == STEPS - len(POISONED)

    poison(run, monkeypatch, POISONED)
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        run.train(stop_at_step=10)  # stops and goes on between the two kinds of steps, to see that counts are kept
        second = new_run(place, "poisoned")
        poison(second, monkeypatch, POISONED)
        second.train()

    entries = read_metrics(place / "poisoned")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for entry in entries:
        step = entry["step"]
        assert entry["skipped_updates"] == sum(number <= step for number in POISONED)
        if step in POISONED:
            assert (entry["loss"], entry["grad_norm"], entry["perplexity"]) == (None, None, None)
            assert f"step {step}: no update, because it is not finite (loss nan" in caplog.text
        else:
            assert (entry["loss"], entry["grad_norm"], entry["learning_rate"]) == expected[step], step
    assert "(loss nan, gradient norm nan); 2 of at most 10 in a row, 3 in this run" in caplog.text
    assert "NaN" not in (place / "poisoned" / "metrics.jsonl").read_text()
    ours = second._state
    assert int(ours.step) == STEPS and int(ours.counts.skipped) == len(POISONED)
    for part in ("params", "optimizer_state"):
        a, b = jax.tree.leaves_with_path(getattr(ours, part)), jax.tree.leaves(getattr(state, part))
        for (path, x), y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=part + jax.tree_util.keystr(path))


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_can_be_replayed(place, monkeypatch, capsys):
    run = new_run(place, "stopped", max_skipped_in_a_row=2)
    poison(run, monkeypatch, (5, 11, 12, 13))  # the step behind the last one is sound: it must not hide the fault
    with pytest.raises(RunStoppedError) as error:
        run.train()
    dump = place / "stopped" / "faults" / "13"
    message = str(error.value)
    assert "step 13: 3 steps in a row had a loss or gradient that is not finite" in message
    assert "the first such tensor is: batch.target_mask (1 of 128 values)" in message
    assert message.endswith(f"To do this step again: python -m moda_jax.training.replay {dump}")
    assert newest_good_step(place / "stopped" / "checkpoints") == (9, [])
    report = json.loads((dump / "fault.json").read_text())
    assert (report["step"], report["loss"]) == (13, "nan")
    capsys.readouterr()
    assert main([str(dump)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "first not finite: batch.target_mask (1 of 128 values)", "then: loss in micro-batch 1 (1 of 1 values)",
    ]  # fmt: skip
    with np.load(dump / "batch.npz") as arrays:
        healed = {name: np.nan_to_num(array, nan=1.0) for name, array in arrays.items()}
    np.savez(dump / "batch.npz", **healed)
    assert main([str(dump)]) == 1
    assert "the fault did not come again" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([str(place)])
    assert ended.value.code == 2 and "holds no dump of a step" in capsys.readouterr().err
    # The same command goes on from step 9, and meets sound batches now.
    assert new_run(place, "stopped", max_skipped_in_a_row=2).train(stop_at_step=14).step == 14
