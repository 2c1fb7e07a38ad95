"""3,000 steps of the quickstart model with evaluations and checkpoints: the host's memory does not grow.

CI shortens the rows to 32 tokens, two a step. With MODA_JAX_FULL_SOAK=1 in the environment rows and batch are
quickstart's own; that takes minutes.
"""

import os
import time

import pytest
from support.run_process import RunProcesses
from support.tiny_run import write_corpus

from configs import quickstart

STEPS, SETTLED = 3000, 500
# Here steps are the cost, not the compiler: optimised they take a third.
AS_USERS_COMPILE = {"XLA_FLAGS": ""}
# What is freed goes back to the system at once: otherwise the allocator's own ups and downs hide what the run holds.
FREE_AT_ONCE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def anonymous_bytes(process):
    """Memory of a process that is not a mapped file."""
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def last_step(path):
    """The step in the last whole line of metrics.jsonl; 0 before there is one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    return int(lines[-2].partition(b'"step": ')[2].partition(b",")[0]) if len(lines) > 1 else 0


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    config = quickstart.get_config()
    config.data.source = str(write_corpus(tmp_path / "corpus", files=60, words=2000))
    config.data.cache_dir = str(tmp_path / "cache")
    config.train.num_steps = STEPS
    config.train.log_interval_steps = 5
    config.train.sample_prompt = ""
    config.eval.interval_steps = config.checkpoint.interval_steps = 100
    config.eval.num_batches = 2
    if not os.environ.get("MODA_JAX_FULL_SOAK"):
        config.data.sequence_length = 32
        config.train.batch_size = 2
    samples, log = [], tmp_path / "log"
    log.touch()
    began = time.monotonic()
    with RunProcesses(tmp_path / "compiled", **AS_USERS_COMPILE, **FREE_AT_ONCE) as processes:
        process = processes.start(config.to_dict(), tmp_path / "run", log)
        while (step := last_step(tmp_path / "run" / "metrics.jsonl")) < STEPS and "Traceback" not in log.read_text():
            try:
                samples.append((step, anonymous_bytes(process)))
            except (FileNotFoundError, ValueError):  # it has ended
                break
            time.sleep(0.02)
        assert processes.wait() == 0, log.read_text()[-3000:]
    settled, middle, late = (  # what compiling took is given back some time after step 1000
        sorted(size / 2**20 for step, size in samples if first <= step < last)
        for first, last in ((SETTLED, 1000), (1250, 2125), (2125, STEPS))
    )
    growth = max(late[-1] / settled[-1], late[len(late) // 2] / middle[len(middle) // 2]) - 1
    print(
        f"{len(samples)} samples, {time.monotonic() - began:.0f} s; MiB, median and most: steps {SETTLED} to 1000: "
        f"{settled[len(settled) // 2]:.1f}, {settled[-1]:.1f}; 1250 to 2125: {middle[len(middle) // 2]:.1f}, "
        f"{middle[-1]:.1f}; 2125 to {STEPS}: {late[len(late) // 2]:.1f}, {late[-1]:.1f}; growth {100 * growth:.2f} %"
    )
    assert growth < 0.02
