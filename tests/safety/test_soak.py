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
    with RunProcesses(tmp_path / "compiled") as processes:
        process = processes.start(config.to_dict(), tmp_path / "run", log)
        while (step := last_step(tmp_path / "run" / "metrics.jsonl")) < STEPS and "Traceback" not in log.read_text():
            try:
                samples.append((step, anonymous_bytes(process)))
            except (FileNotFoundError, ValueError):  # it has ended
                break
            time.sleep(0.02)
        assert processes.wait() == 0, log.read_text()[-3000:]
    (
        settled,
        middle,
        late,
    ) = (  # the allocator keeps for a while what compiling took, and Orbax's cache fills and empties
        [size / 2**20 for step, size in samples if first <= step < last]
        for first, last in ((SETTLED, 1000), (1000, 2000), (2000, STEPS))
    )
    growth = max(max(late) / max(settled), min(late) / min(middle)) - 1
    print(
        f"{len(samples)} samples, {time.monotonic() - began:.0f} s; MiB, least to most: "
        f"steps {SETTLED} to 1000: {min(settled):.1f} to {max(settled):.1f}, to 2000: {min(middle):.1f} to "
        f"{max(middle):.1f}, to {STEPS}: {min(late):.1f} to {max(late):.1f}; growth {100 * growth:.2f} %"
    )
    assert growth < 0.02
