"""Signals to processes of their own: what the first does, what the second does, and what many processes do."""

import json
import os
import signal
import socket
import time

import pytest
from support.documents import start_python
from support.run_process import RunProcesses
from support.tiny_run import tiny_values, write_corpus

from moda_jax.training.checkpoint import newest_good_step
from moda_jax.training.metrics_file import read_metrics

BUSY = """
import hashlib, sys, time
from moda_jax.training.signals import StopRequest
with StopRequest() as stop:
    print("listening", flush=True)
    deadline = time.monotonic() + 60
    if sys.argv[1] == "in a long call":
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # minutes in C, without the GIL, as in XLA
    step = 0
    while not stop.reached_at(step) and time.monotonic() < deadline:
        step += 1
        time.sleep(0.01)
    print(stop.reason, flush=True)
    while sys.argv[1] == "stays" and time.monotonic() < deadline:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    process = start_python(BUSY, "goes")
    assert process.stdout.readline() == "listening\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{number.name}\n")
    assert f"{number.name}: stopping after this step and a checkpoint" in errors


@pytest.mark.parametrize("where", ["stays", "in a long call"])
def test_a_second_signal_ends_the_process_at_once(where):
    process = start_python(BUSY, where)
    assert process.stdout.readline() == "listening\n"
    process.send_signal(signal.SIGTERM)
    if where == "stays":
        assert process.stdout.readline() == "SIGTERM\n"
    else:
        time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT a second time: ending at once" in errors


def test_afterwards_signals_do_what_they_did_before():
    process = start_python(BUSY + "\nprint('after', flush=True)\ntime.sleep(60)", "goes")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ["SIGTERM\n", "after\n"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def wait_for(log, text, start=0, seconds=120):
    deadline = time.monotonic() + seconds
    while text not in (log.read_text() if log.exists() else "")[start:]:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_a_run_saves_its_step_and_says_to_run_it_again(tmp_path):
    """SIGTERM, SIGINT on the resumed run, a preemption notice on the next; a second process is refused meanwhile."""
    values = tiny_values(
        write_corpus(tmp_path / "corpus"), tmp_path / "cache", train={"num_steps": 10**6},
        model={"num_layers": 1, "width": 16, "depth": "none"}, eval={"interval_steps": 0},
        checkpoint={"interval_steps": 0},
    )  # fmt: skip
    workdir, log, last = tmp_path / "run", tmp_path / "log", 0
    with RunProcesses(tmp_path / "compiled") as processes, RunProcesses(tmp_path / "compiled") as others:
        for number, name in ((15, "SIGTERM"), (2, "SIGINT"), (15, "preemption notice")):
            start = log.stat().st_size if log.exists() else 0
            order = {"coordinator": free_address()} if name == "preemption notice" else {}
            child = processes.start(values, workdir, log, **order)
            wait_for(log, "first step done", start)
            if name == "SIGTERM":
                others.start(values, workdir, tmp_path / "other.log")
                assert others.wait() == 1
                assert f"is in use by process {child} on" in (tmp_path / "other.log").read_text()
            os.kill(child, number)
            assert processes.wait() == 75, log.read_text()
            step, skipped = newest_good_step(workdir / "checkpoints")
            assert step > last and not skipped
            assert f"stopped by {name} at step {step} of 1000000; the same command goes on there" in log.read_text()
            assert [entry["step"] for entry in read_metrics(workdir)] == list(range(1, step + 1))
            last = step


SET_UP = """
import sys, time
from moda_jax.training.signals import StopRequest, stops_before_training
with stops_before_training():
    print("preparing", flush=True)
    time.sleep(float(sys.argv[1]))
with StopRequest() as stop:
    print("training", flush=True)
    while not stop.reached_at(1):
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("seconds", "words", "code"), [(60, ["preparing"], 75), (0, ["preparing", "training"], 0)])
def test_a_signal_before_training_stops_the_run_too(seconds, words, code):
    process = start_python(SET_UP, seconds)
    assert [process.stdout.readline() for _ in words] == [f"{word}\n" for word in words]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("SIGTERM before the first step: stopped; the same command begins again" in errors) == (code == 75)


GROUP = """
import json, sys, time
import jax
from moda_jax.training.signals import StopRequest
address, index, count = sys.argv[1:]
jax.distributed.initialize(address, num_processes=int(count), process_id=int(index))
with StopRequest() as stop:
    print("listening", flush=True)
    step, deadline = 0, time.monotonic() + 120
    while not stop.reached_at(step) and time.monotonic() < deadline:
        step += 1
        time.sleep(0.01 * (1 + int(index)))  # they do not keep step
    print(json.dumps([step, stop.reason]), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_notice_to_one_process_stops_all_at_the_same_step(number):
    address = free_address()
    group = [start_python(GROUP, address, index, 2) for index in range(2)]
    try:
        for process in group:
            assert process.stdout.readline() == "listening\n"
        time.sleep(0.2)
        group[1].send_signal(number)
        answers = [json.loads(process.communicate(timeout=120)[0]) for process in group]
    finally:
        for process in group:
            process.kill()
    (first, reason), (second, other) = answers
    assert first == second > 0
    assert reason == "preemption notice"
    assert other == ("SIGINT" if number == signal.SIGINT else "preemption notice")
