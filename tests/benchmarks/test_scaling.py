"""The scaling benchmark on a small config: it runs, and what it reports adds up."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import parse_mesh

ROOT = Path(__file__).parents[2]


def test_meshes_are_parsed():
    assert parse_mesh("fsdp=8,context=2") == {"data": 1, "fsdp": 8, "tensor": 1, "context": 2}
    for text in ("fsdp", "fsdp=0", "time=2"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected AXIS=SIZE"):
            parse_mesh(text)


@pytest.mark.slow
def test_quickstart_on_32_virtual_devices(tmp_path):
    subprocess.run(
        [
            sys.executable, "-m", "benchmarks.scaling", "--config=configs/quickstart.py", "--mesh=fsdp=8",
            "--mesh=data=8,fsdp=2,tensor=2", f"--output={tmp_path}", "--devices_per_machine=8",
        ],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    record = json.loads((tmp_path / "scaling_quickstart.json").read_text())
    assert (tmp_path / "scaling_quickstart.png").stat().st_size > 5000
    small, large = record["rows"]
    assert (small["devices"], large["devices"]) == (8, 32)
    assert small["tokens_per_step"] * 4 == large["tokens_per_step"]
    assert set(small["collectives"]) >= {"all-gather over fsdp", "reduce-scatter over fsdp"}
    assert "all-reduce over tensor" in large["collectives"] and "all-reduce over data" in large["collectives"]
    # 3 stacked layers, twice, and the last one and the table once: 2 bytes x 7/8 of every matrix; 257 rows are
    # stored as 384.
    matrices = 128 * (2 * 4 * 32 + 2 * 2 * 32 + 3 * 384)
    projection = 128 * 2 * 2 * 32
    sent = 2 * 7 / 8 * (3 * 2 * (matrices + projection) + matrices + 384 * 128)
    assert small["collectives"]["all-gather over fsdp"]["bytes"] == pytest.approx(sent)
    assert small["step_seconds"]["best"] <= small["step_seconds"]["sum"]
    assert small["compute_seconds"] == pytest.approx(large["compute_seconds"])
