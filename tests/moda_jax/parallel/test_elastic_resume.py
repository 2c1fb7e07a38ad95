"""`train.py` as two real processes of 4 devices; one is killed; the run goes on as one process of 4 devices."""

import json
import socket
import subprocess
import sys
import time

import pytest
from support.tiny_run import tiny_values, write_corpus
from support.virtual_devices import ROOT, environment

from moda_jax.config import Config
from moda_jax.training.checkpoint import saved_steps
from moda_jax.training.metrics import read_metrics
from moda_jax.training.trainer import TrainingRun

pytestmark = pytest.mark.slow

STEPS = 40
SECTIONS = {
    # 257 tokens do not divide by tensor=2: checkpoints are written from, and read into, padded storage.
    "model": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32"},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5},
    "train": {"num_steps": STEPS, "batch_size": 8, "log_interval_steps": 1},
    "eval": {"interval_steps": 20, "num_batches": 2},
    "checkpoint": {"interval_steps": 8},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    write_corpus(root / "corpus")
    return root


def values(place):
    return tiny_values(place / "corpus", place / "cache", **SECTIONS)


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The same run on one device, in this process."""
    TrainingRun(Config.from_dict(values(place)), place / "one").train()
    return {entry["step"]: entry for entry in read_metrics(place / "one")}


def command(place, workdir, mesh, *more):
    config = place / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\nfrom configs import base\n\n\ndef get_config() -> ConfigDict:\n"
        f"    config = base.get_config()\n    config.update({values(place)!r})\n    return config\n"
    )
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    return [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *sizes, *more]


def start(place, workdir, mesh, log, *more):
    with log.open("w") as file:
        return subprocess.Popen(
            command(place, workdir, mesh, *more), cwd=ROOT, env=environment(4), stdout=file, stderr=subprocess.STDOUT
        )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def killed(place):
    """Two processes until one is killed, somewhere behind the second checkpoint."""
    workdir, address = place / "elastic", f"127.0.0.1:{free_port()}"
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    logs = [place / f"process{i}.log" for i in range(2)]
    processes = [
        start(place, workdir, mesh, log, f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}")
        for i, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + 300
        while len(saved_steps(workdir / "checkpoints")) < 2 or len(read_metrics(workdir)) < 18:
            assert all(p.poll() is None for p in processes), "\n".join(log.read_text()[-4000:] for log in logs)
            assert time.monotonic() < deadline, "\n".join(log.read_text()[-4000:] for log in logs)
            time.sleep(0.02)
        processes[1].kill()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return workdir, [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def resumed(place, killed):
    """(log of the one process that goes on, lines of the two, lines in the end)."""
    workdir, _ = killed
    before = {entry["step"]: entry for entry in read_metrics(workdir)}
    log = place / "resumed.log"
    process = start(place, workdir, {"data": 1, "fsdp": 2, "tensor": 2}, log)
    assert process.wait(timeout=300) == 0, log.read_text()[-4000:]
    return log.read_text(), before, {entry["step"]: entry for entry in read_metrics(workdir)}


def test_only_the_first_process_speaks(killed):
    first, second = killed[1]
    assert "2 processes, 8 devices" in first and "mesh data 2 x fsdp 2 x tensor 2" in first
    assert "loss" not in second


def test_two_processes_train_as_one_device_does(killed, resumed, uninterrupted):
    _, before, _ = resumed
    assert len(before) >= 18
    for step, entry in before.items():
        assert entry["loss"] == pytest.approx(uninterrupted[step]["loss"], abs=1e-4), step


def test_the_run_goes_on_with_another_number_of_processes(killed, resumed, uninterrupted):
    log, before, after = resumed
    assert "resuming from step" in log and "mesh.data: 2 in the directory, 1 now" in log
    first = int(log.split("resuming from step ")[1].split()[0])
    assert first in (8, 16, 24, 32) and first <= max(before) + 1
    assert sorted(after) == list(range(1, STEPS + 1))
    for step in range(first + 1, STEPS + 1):
        assert after[step]["loss"] == pytest.approx(uninterrupted[step]["loss"], abs=1e-4), step
        assert after[step]["grad_norm"] == pytest.approx(uninterrupted[step]["grad_norm"], rel=1e-3), step
    last = "validation_loss"
    assert after[STEPS][last] == pytest.approx(uninterrupted[STEPS][last], abs=1e-4)


def test_the_checkpoint_is_that_of_any_mesh(place, killed, resumed, uninterrupted):
    """One device goes on from it, too: nothing in it depends on the mesh."""
    workdir, _ = killed
    run = TrainingRun(Config.from_dict(values(place) | {"train": SECTIONS["train"] | {"num_steps": 48}}), workdir)
    assert run.step == STEPS
    assert run._state.params["embedding"]["table"].shape[0] == 257
    record = json.loads((workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    assert record["data_position"] == 8 * STEPS
