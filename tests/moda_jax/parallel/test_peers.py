"""Real processes that JAX has brought together; one is lost, the others end in order. Nothing is compiled."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from support.virtual_devices import ROOT, environment

from moda_jax.parallel.peers import Counters

GROUP = """
import sys, time
from pathlib import Path
from absl import flags
from moda_jax.parallel import peers
from moda_jax.parallel.launch import start_processes
from moda_jax.training.console import print_result, run_command, user_errors
from moda_jax.exit_codes import RunStoppedError

MODE = flags.DEFINE_string("mode", "", "")
PLACE = flags.DEFINE_string("place", "", "")

def main():
    with user_errors():
        start_processes(10.0)
    group = peers.current()
    group.write_to(Path(PLACE.value))
    group.at_step(120)
    print_result("up")
    index = flags.FLAGS.process_id
    if MODE.value == "fails" and index == 1:
        time.sleep(1.5)
        raise RunStoppedError("runs/x: no further")
    if MODE.value == "waits" or MODE.value == "fails" and index == 2:  # process 0 is done already
        time.sleep(60)

run_command(main)
"""


def start(place, mode, count=3):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", f"--num_processes={count}", f"--mode={mode}", f"--place={place}"]
    return [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, *flags, f"--process_id={index}"], cwd=ROOT, env=environment(1),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def ended(processes, lost=None):
    """Exit codes and last words of those that were not killed, and the seconds that it took."""
    try:
        for process in processes:
            assert process.stdout.readline() == "up\n", process.stderr.read()
        time.sleep(1.5)
        began = time.monotonic()
        if lost is not None:
            processes[lost].kill()
        words = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], words, time.monotonic() - began


def test_the_others_end_at_once_when_process_0_is_gone(tmp_path):
    codes, words, seconds = ended(start(tmp_path, "waits"), lost=0)
    assert codes == [-signal.SIGKILL, 69, 69], words
    assert seconds < 8
    for index in (1, 2):
        (line,) = words[index].splitlines()  # and no page of stack
        assert line.startswith(f"error: process {index} of 3 ends at step 120, because process 0 at 127.0.0.1:")
        assert line.endswith(
            f"was lost: it cannot be reached. The same command resumes from the newest checkpoint. Stacks: "
            f"{tmp_path}/{index}.log"
        )
        stacks = (tmp_path / f"{index}.log").read_text()
        assert 'File "<string>"' in stacks and "in main" in stacks  # where this process was
        assert "JAX distributed service detected fatal errors" in stacks  # and what JAX had to say


@pytest.mark.slow
def test_a_process_that_ends_by_an_error_says_why_to_all(tmp_path):
    codes, words, seconds = ended(start(tmp_path, "fails"))
    assert codes == [69, 1, 69], words
    assert seconds < 10
    assert words[1] == "error: runs/x: no further\n"
    for index in (0, 2):
        (line,) = [line for line in words[index].splitlines() if "error" in line]
        assert line.startswith(f"error: process {index} of 3 ends at step 120, because process 1 (")
        assert "was lost: it ended with exit code 1: runs/x: no further. The same command" in line


@pytest.mark.slow  # ten seconds of silence
def test_the_others_end_in_time_when_another_process_is_gone(tmp_path):
    codes, words, seconds = ended(start(tmp_path, "waits"), lost=1)
    assert codes == [69, -signal.SIGKILL, 69], words
    assert seconds < 10 + 3  # train.peer_timeout_seconds, and a busy machine
    for index in (0, 2):
        (line,) = [line for line in words[index].splitlines() if "error" in line]
        assert f"process {index} of 3 ends at step 120, because process 1 (" in line
        assert "was lost: no sign of life for" in line


@pytest.mark.slow
def test_processes_that_are_done_are_not_missed(tmp_path):
    codes, words, _ = ended(start(tmp_path, "ends", count=2))
    assert codes == [0, 0], words
    assert "lost" not in "".join(words)


def test_a_counter_that_stands_still_is_a_lost_process():
    counters = Counters(7.0)
    assert counters.lost({"1": "1", "2": "1"}, 0.0) is None
    assert counters.lost({"1": "2", "2": "1"}, 6.9) is None
    assert counters.lost({"1": "2", "2": "2"}, 8.0) is None
    assert counters.lost({"1": "2", "2": "3"}, 14.0) == ("1", "no sign of life for 7 s")
    assert counters.lost({"1": "done", "2": "4"}, 99.0) is None  # it need not count any more
    assert counters.lost({"1": "done", "2": "4"}, 105.9) is None
    assert counters.lost({"1": "done", "2": "ended: it fell"}, 100.0) == ("2", "it fell")
    assert Counters(7.0).lost({"1": ""}, 0.0) is None  # not yet heard of
