"""How a process finds the others."""

import os
import subprocess
import sys

import pytest
from support.selection import quick_of
from support.virtual_devices import ROOT, environment

from moda_jax.parallel.launch import Launch, find_launch

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_LOCALID": "0"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


def test_alone_without_a_launcher():
    assert find_launch({}) == Launch()
    assert find_launch({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Launch()  # in a batch script, not under srun
    assert find_launch(SLURM | {"SLURM_NTASKS": "1"}) == Launch()
    assert find_launch({}, "host:1", 1, 0) == Launch()


def test_launchers():
    assert find_launch(SLURM) == Launch("slurm", None, 4, 2)
    assert find_launch(OMPI) == Launch("ompi", None, 2, 1)


def test_flags_come_first():
    assert find_launch(SLURM, "host:1234", 2, 1) == Launch("flags", "host:1234", 2, 1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="--num-processes and --process-id: missing; --coordinator-address"):
        find_launch({}, "host:1")
    with pytest.raises(ValueError, match=r"--num-processes=2 --process-id=2: expected a process-id in 0..1"):
        find_launch({}, "host:1", 2, 2)


HELLO = """
import logging
logging.basicConfig(level=logging.INFO)
from absl import flags
flags.FLAGS(["hello"])
from moda_jax.parallel.launch import start_processes
start_processes()
import jax
print("I am", jax.process_index(), "of", jax.process_count(), "with", jax.local_device_count(), jax.device_count())
"""


def launched(number, launcher):
    """The variables that a launcher sets for process `number` of 2 on this machine."""
    if launcher == "slurm":
        return {
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2",
        }  # fmt: skip
    return {
        "OMPI_MCA_orte_hnp_uri": f"{1531576320 + os.getpid()}.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }  # fmt: skip


@pytest.mark.parametrize("launcher", quick_of(("slurm", "ompi"), ("slurm",)))
def test_two_processes_find_each_other(launcher):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HELLO], cwd=ROOT, env=environment(2) | launched(number, launcher),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == ["I am 0 of 2 with 2 4", "I am 1 of 2 with 2 4"]
    assert "process 0 of 2" in outputs[0][1] and "process 1 of 2" not in outputs[1][1]
