"""Kills at random moments of one run, fifty in the slow test: it ends as an undisturbed run does, bit for bit."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest
from support.run_process import RunProcesses
from support.tiny_run import tiny_values, write_corpus

from moda_jax.config import CheckpointConfig, Config
from moda_jax.tasks.registry import make_task
from moda_jax.training.checkpoint import Checkpoints, newest_good_step, saved_steps
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.program import state_maker

FIRST_STEP = "first step done"


def final_state(workdir, values):
    """The state after the last step, whose checkpoint is the newest, and good."""
    config = Config.from_dict(values)
    abstract = jax.eval_shape(state_maker(config, make_task(config)), config.train.seed)
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
    try:
        step, skipped = newest_good_step(workdir / "checkpoints")
        assert (step, skipped) == (config.train.num_steps, [])
        return checkpoints.restore(step, abstract)[0]
    finally:
        checkpoints.close()


def lines(workdir):
    """All that a step computes; not the speed."""
    return [
        {name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in read_metrics(workdir)
    ]


def newest(workdir):
    return max(saved_steps(workdir / "checkpoints"), default=0)


def wait_for_first_step(log, start, seconds=120):
    """Until the log has the line, from byte `start` on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and FIRST_STEP in log.read_text(errors="replace")[start:]:
            return
        time.sleep(0.005)
    raise TimeoutError(log.read_text())


@pytest.mark.parametrize(
    ("most_kills", "steps", "least_during_save", "least_during_start"),
    [pytest.param(3, 24, 0, 0, id="3"), pytest.param(50, 160, 5, 2, id="50", marks=pytest.mark.slow)],
)
def test_kills(most_kills, steps, least_during_save, least_during_start, tmp_path):
    values = tiny_values(
        write_corpus(tmp_path / "corpus"), tmp_path / "cache",
        model={"num_layers": 1, "depth": "none", "width": 16, "num_heads": 1, "head_dim": 16, "ffn_width": 16},
        train={"num_steps": steps, "batch_size": 2}, eval={"interval_steps": 24, "num_batches": 1},
        checkpoint={"interval_steps": 2},
    )  # fmt: skip
    random_ = random.Random(0)
    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    kills = during_save = during_start = 0
    began = time.monotonic()
    with RunProcesses(tmp_path / "compiled") as processes:
        processes.start(values, straight, tmp_path / "straight.log")
        assert processes.wait() == 0, (tmp_path / "straight.log").read_text()
        while kills < most_kills:
            ahead = newest(killed) > steps * (kills + 1) / (most_kills + 10)
            size = log.stat().st_size if log.exists() else 0
            child = processes.start(values, killed, log)
            if random_.random() < 0.2:
                time.sleep(random_.uniform(0, 1))
            else:
                wait_for_first_step(log, size)
                time.sleep(random_.uniform(0, 0.02 if ahead else 0.2))
            during_start += FIRST_STEP not in log.read_text(errors="replace")[size:]
            os.kill(child, signal.SIGKILL)
            assert processes.wait() == -signal.SIGKILL, log.read_text()[-3000:]
            kills += 1
            if (killed / "checkpoints").exists():
                during_save += any(".saving" in path.name for path in (killed / "checkpoints").iterdir())
        assert newest(killed) < steps
        processes.start(values, killed, log)
        assert processes.wait() == 0, log.read_text()[-3000:]
    seconds = time.monotonic() - began
    print(f"{kills} kills, {during_save} during a save, {during_start} before the first step; {seconds:.0f} s")
    assert during_save >= least_during_save and during_start >= least_during_start
    assert lines(killed) == lines(straight)
    assert len(lines(straight)) == steps
    expected, state = (jax.tree.leaves_with_path(final_state(w, values)) for w in (straight, killed))
    assert len(expected) > 20
    for (path, a), (_, b) in zip(expected, state, strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
    assert not list(killed.glob("checkpoints/*.damaged*"))  # every commit was whole
