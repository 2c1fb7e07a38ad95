"""`train.py` as two real processes of 4 devices, one of which is killed; then as one process of 4 devices, also killed;
then as two again, on another mesh, to the end. The losses are those of one device all the way."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from support.tiny_run import tiny_values, write_corpus
from support.virtual_devices import ROOT, environment

from moda_jax.config import Config
from moda_jax.training.checkpoint import saved_steps
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun

pytestmark = pytest.mark.slow

STEPS = 48
SECTIONS = {
    # 257 tokens do not divide by tensor=2: checkpoints are written from, and read into, padded storage.
    "model": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32"},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5},
    "train": {
        "num_steps": STEPS, "batch_size": 8, "log_interval_steps": 1, "sample_prompt": "def ", "sample_tokens": 12,
        "peer_timeout_seconds": 10,
    },
    "eval": {"interval_steps": 24, "num_batches": 2},
    "checkpoint": {"interval_steps": 8},
}  # fmt: skip
ORIGINAL = {"data": 2, "fsdp": 2, "tensor": 2}
SMALLER = {"data": 1, "fsdp": 2, "tensor": 2}
OTHER = {"data": 2, "fsdp": 2, "context": 2}


class Phase(NamedTuple):
    """A stretch of the run: what each process printed, and the metrics when it was over."""

    logs: list[str]
    entries: dict[int, dict]

    @property
    def resumed_from(self):
        return int(self.logs[0].split("resuming from step ")[1].split()[0])


class Place(NamedTuple):
    """Where the run lives."""

    root: Path

    @property
    def workdir(self):
        return self.root / "run"

    def values(self):
        return tiny_values(self.root / "corpus", self.root / "cache", **SECTIONS)

    def phase(self, name, mesh, *, processes, kill_after=None):
        """Runs to the end, or kills the last process once `kill_after` steps are logged: the others then end."""
        config = self.root / "config.py"
        config.write_text(
            "from configs import base\n\n\ndef get_config():\n"
            f"    config = base.get_config()\n    config.update({self.values()!r})\n    return config\n"
        )
        command = [sys.executable, "train.py", f"--config={config}", f"--workdir={self.workdir}"]
        command += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        logs = [self.root / f"{name}{i}.log" for i in range(processes)]
        address = f"127.0.0.1:{free_port()}"
        running = []
        try:
            for i, log in enumerate(logs):
                flags = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"]
                with log.open("w") as file:
                    running.append(
                        subprocess.Popen(
                            command + flags, cwd=ROOT, env=environment(4), stdout=file, stderr=subprocess.STDOUT
                        )
                    )
            self.wait(running, logs, kill_after)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return Phase([log.read_text() for log in logs], {e["step"]: e for e in read_metrics(self.workdir)})

    def wait(self, running, logs, kill_after):
        deadline = time.monotonic() + 300
        while True:
            codes = [process.poll() for process in running]
            text = "\n".join(log.read_text()[-4000:] for log in logs)
            if kill_after is None and codes == [0] * len(codes):
                return
            assert not any(code is not None and (code or kill_after) for code in codes), text
            assert time.monotonic() < deadline, text
            if kill_after and len(read_metrics(self.workdir)) >= kill_after:
                running[-1].kill()
                assert [process.wait(60) for process in running[:-1]] == [69] * (len(running) - 1), text
                return
            time.sleep(0.02)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    write_corpus(root / "corpus")
    return Place(root)


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The same run on one device, in this process."""
    TrainingRun(Config.from_dict(place.values()), place.root / "one").train()
    return {entry["step"]: entry for entry in read_metrics(place.root / "one")}


@pytest.fixture(scope="module")
def phases(place):
    return [
        place.phase("two", ORIGINAL, processes=2, kill_after=18),
        place.phase("one", SMALLER, processes=1, kill_after=34),
        place.phase("other", OTHER, processes=2),
    ]


def assert_same(ours, uninterrupted, steps):
    for step in steps:
        assert ours[step]["loss"] == pytest.approx(uninterrupted[step]["loss"], abs=1e-4), step
        assert ours[step]["grad_norm"] == pytest.approx(uninterrupted[step]["grad_norm"], rel=1e-3), step


def test_only_the_first_process_speaks(phases):
    first, second = phases[0].logs
    assert "process 0 of 2" in first and "8 x cpu" in first and "mesh data 2 x fsdp 2 x tensor 2" in first
    assert not [text for text in ("process 1 of 2", "mesh", "step ", "loss") if f" {text}" in second]


def test_the_other_process_ends_with_one_line(phases, place):
    """The collective that it waited in fails at once; who is lost is known a little later."""
    (line,) = [line for line in phases[0].logs[0].splitlines() if line.startswith("error: ")]
    step = max(phases[0].entries)
    assert any(
        f"process 0 of 2 ends at step {number}, because process 1 (" in line for number in (step, step + 1, step + 2)
    )
    assert "was lost: no sign of life for" in line and f"Stacks: {place.workdir}/processes/0.log" in line
    assert "Traceback" not in phases[0].logs[0]


def test_two_processes_train_as_one_device_does(phases, uninterrupted):
    entries = phases[0].entries
    assert len(entries) >= 18
    assert_same(entries, uninterrupted, entries)


def test_the_run_goes_on_as_one_process_of_fewer_devices(phases, uninterrupted):
    before, after = phases[0].entries, phases[1].entries
    assert "mesh.data: 2 in the directory, 1 now" in phases[1].logs[0]
    assert phases[1].resumed_from in (8, 16, 24, 32) and phases[1].resumed_from <= max(before) + 1
    assert len(after) >= 34
    assert_same(after, uninterrupted, range(phases[1].resumed_from + 1, max(after) + 1))


def test_and_again_as_two_on_another_mesh(phases, uninterrupted, place):
    after = phases[2].entries
    assert phases[2].resumed_from in (24, 32, 40)
    assert sorted(after) == list(range(1, STEPS + 1))
    assert_same(after, uninterrupted, range(phases[2].resumed_from + 1, STEPS + 1))
    assert after[STEPS]["validation_loss"] == pytest.approx(uninterrupted[STEPS]["validation_loss"], abs=1e-4)
    assert (place.workdir / "sample.txt").read_text().startswith("def ")
    assert (place.workdir / "loss.png").exists()


def test_the_checkpoint_is_that_of_any_mesh(place, phases):
    """One device goes on from it, too: nothing in it depends on the mesh."""
    values = place.values() | {"train": SECTIONS["train"] | {"num_steps": STEPS + 8}}
    run = TrainingRun(Config.from_dict(values), place.workdir)
    assert run.step == STEPS == saved_steps(place.workdir / "checkpoints")[0]
    assert run._state.params["embedding"]["table"].shape[0] == 384
    record = json.loads((place.workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    assert record["data_position"] == 8 * STEPS
