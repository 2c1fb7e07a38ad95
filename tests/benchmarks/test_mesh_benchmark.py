"""The mesh benchmark on two virtual devices, in a process of its own: its rows, and what it writes."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import benchmarks.mesh as mesh
mesh.EXCHANGES = ((2, 64),)
sys.argv = ["mesh", "--config=configs/quickstart.py", "--sequences-per-device=1", "--rounds=1", "--steps=1",
            "--axes=context", '--model={"num_layers": 2}', f"--output={sys.argv[1]}"]
mesh.main()
"""


@pytest.mark.slow
def test_rows_and_files(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "mesh.json").read_text())
    assert set(result["steps"]) == {"one device", "context 2"}
    assert result["steps"]["context 2"]["devices"] == 2
    (exchange,) = result["exchanges"]
    assert exchange["context"] == 2 and exchange["attention"] > exchange["gather"] > 0
    text = (tmp_path / "mesh.txt").read_text()
    assert "100.0%" in text and "exchange share" in text and text.strip() in done.stdout
