"""A file system that fills up while a checkpoint is saved, and one that turns read-only: training goes on.

The real thing where this process may mount (as root in a container with that right); the fault-injecting writer in
tests/moda_jax/training/test_checkpoint.py runs everywhere.
"""

import logging
import subprocess

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus

from moda_jax.exit_codes import RunStoppedError
from moda_jax.training.checkpoint import newest_good_step
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun

# A write that reports to a loop that is gone fails the test.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

STEPS = 20


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")


@pytest.fixture
def unmounted():
    """Directories that are unmounted in the end."""
    directories = []
    yield directories
    for directory in reversed(directories):
        subprocess.run(["umount", "--lazy", directory], check=True)


def new_run(tmp_path, workdir, **checkpoint):
    if not (tmp_path / "corpus").exists():
        write_corpus(tmp_path / "corpus")
    config = tiny_config(
        tmp_path / "corpus", tmp_path / "cache", model={"num_layers": 1, "depth": "none"},
        train={"num_steps": STEPS}, eval={"interval_steps": 0},
        checkpoint={"interval_steps": 3, "retry_pause_seconds": 0.0} | checkpoint,
    )  # fmt: skip
    return TrainingRun(config, workdir)


def before_saves(run, monkeypatch, actions):
    """Calls an action right before the save of a step, and notes which step was good right after it was reported."""
    save, good = run._save, {}

    def save_(*arguments):
        if run.step in actions:
            actions[run.step]()
        save(*arguments)
        run._checkpoints.wait()
        good[run.step] = newest_good_step(run._checkpoint_directory)[0]

    monkeypatch.setattr(run, "_save", save_)
    return good


def fill(path, leave):
    """A file that takes all but `leave` bytes of its file system."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))


def test_training_survives_a_full_disk(tmp_path, monkeypatch, caplog, unmounted):
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", place)
    unmounted.append(place)
    undisturbed = new_run(tmp_path, tmp_path / "undisturbed")
    undisturbed.train()
    run = new_run(tmp_path, place / "run")
    filler = place / "filler"
    good = before_saves(
        run, monkeypatch,
        {6: lambda: fill(filler, leave=60000), 9: lambda: (filler.unlink(), fill(filler, leave=0)), 12: filler.unlink},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        result = run.train()
    assert result.step == STEPS
    assert good == {3: 3, 6: 3, 9: 3, 12: 12, 15: 15, 18: 18, 20: 20}
    for step, number in ((6, 1), (9, 2)):
        assert f"CHECKPOINT NOT SAVED at step {step} (failure {number} of at most 3 in a row; the newest" in caplog.text
    assert "No space left on device" in caplog.text or "ENOSPC" in caplog.text
    assert [entry["step"] for entry in read_metrics(place / "run")] == list(range(1, STEPS + 1))
    ours, theirs = (jax.tree.leaves(r._state.params) for r in (run, undisturbed))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    names = {path.name for path in (place / "run" / "checkpoints").iterdir()}
    assert names == {"18", "20"}


def test_a_directory_that_turns_read_only(tmp_path, monkeypatch, caplog, unmounted):
    run = new_run(tmp_path, tmp_path / "run", max_failed_saves=2)
    checkpoints = tmp_path / "run" / "checkpoints"

    def make_read_only():
        mount("--bind", checkpoints, checkpoints)
        unmounted.append(checkpoints)
        mount("-o", "remount,ro,bind", checkpoints)

    good = before_saves(run, monkeypatch, {6: make_read_only})
    with pytest.raises(
        RunStoppedError, match=r"the last 2 saves have failed .*the newest checkpoint is that of step 3"
    ):
        run.train()
    assert good == {3: 3, 6: 3}
    assert "CHECKPOINT NOT SAVED at step 6 (failure 1 of at most 2 in a row" in caplog.text
    assert "Read-only file system" in caplog.text
    assert newest_good_step(checkpoints) == (3, [])
    subprocess.run(["umount", "--lazy", unmounted.pop()], check=True)
    # Writable again: the same command goes on. The last save of a run is tried until it succeeds.
    run = new_run(tmp_path, tmp_path / "run", max_failed_saves=2)
    assert run.step == 3
    assert run.train(stop_at_step=4).step == 4
    assert newest_good_step(checkpoints) == (4, [])
