"""A toy plan with real training runs, one of which is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.quick_compile import QUICK_XLA_FLAGS

from experiments.worker import decode_bytes
from moda_jax.config import TransformerConfig

ROOT = Path(__file__).parents[2]


def start(workdir):
    options = ["table6", "--tiny", "--devices=cpu", "--arms=depth_ffn", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA_FLAGS}
    command = [sys.executable, "-m", "experiments", *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_that_is_killed_is_named_and_done_by_the_same_command(tmp_path):
    runs = [tmp_path / "table6_tiny" / "depth_ffn" / f"seed_{seed}" for seed in (0, 1)]
    first = start(tmp_path)
    metrics, end = runs[0] / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    os.kill(json.loads((runs[0] / "lock").read_text())["pid"], signal.SIGKILL)
    _, text = first.communicate(timeout=500)
    assert first.returncode == 1
    assert "failed: depth_ffn seed 0 (exit code -9" in text and "done depth_ffn seed 1" in text
    done = (runs[1] / "result.json").stat().st_mtime_ns

    second = start(tmp_path)
    _, text = second.communicate(timeout=500)
    assert second.returncode == 0, text
    assert "2 runs, 1 done before" in text
    assert (runs[1] / "result.json").stat().st_mtime_ns == done
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 41))
        assert lines[-1]["depth_mass"] > 0
    results = json.loads((tmp_path / "table6_tiny" / "table6.json").read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in results] == [("depth_ffn", 0), ("depth_ffn", 1)]
    for run in results:
        sets = run["evaluation"]
        parts = [value for name, value in sets.items() if name.startswith("validation/")]
        mean = sum(part["loss"] * part["targets"] for part in parts) / sum(part["targets"] for part in parts)
        assert sets["validation"]["loss"] == pytest.approx(mean, abs=2e-6) and "held_out" in sets
        # The toy's probes are over the rows of its last validation batches, or a part of them.
        assert run["probes"]["losses"]["none"] == pytest.approx(run["validation_curve"][-1][1], abs=2e-5)
        assert str(tmp_path) not in json.dumps(run)
    assert results[0]["evaluation"]["validation"] != results[1]["evaluation"]["validation"]


@pytest.mark.slow
def test_the_runs_of_a_sweep_share_what_the_first_of_them_compiled(tmp_path):
    """The plan that the page on experiments prints, two of its arms."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    (plan,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if 'name="sweep"' in block)
    (tmp_path / "sweep.py").write_text(plan)
    options = ["--tiny", "--devices=cpu", "--seeds=0", "--arms=lr_0.001,lr_0.004", f"--workdir={tmp_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA_FLAGS}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # the plan's own
    subprocess.run(
        [sys.executable, "-m", "experiments", tmp_path / "sweep.py", *options], cwd=ROOT, env=environment, check=True
    )
    results = json.loads((tmp_path / "sweep_tiny" / "sweep.json").read_text())["runs"]
    assert [run["config"]["optimizer"]["learning_rate"] for run in results] == [1e-3, 4e-3]
    losses = [run["evaluation"]["validation"]["loss"] for run in results]
    assert losses[0] != losses[1]
    compiled = [path.name for path in (tmp_path / "cache" / "compiled").glob("jit_train_step-*-cache")]
    assert len(compiled) == 1, compiled


def test_bytes_that_decoding_keeps():
    config = TransformerConfig(num_layers=24, num_kv_heads=2, head_dim=64, depth_ffn_kv=True, dtype="bfloat16")
    kept = decode_bytes(config)
    assert kept == {"cache_bytes_per_token": 24 * 2 * 2 * 64 * 2, "depth_bytes": 46 * 2 * 2 * 64 * 2}
