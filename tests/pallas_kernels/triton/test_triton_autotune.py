"""The autotuner's plumbing, on any machine: what it would time is recorded instead of run. Its times mean nothing."""

import json

import pytest

from benchmarks import autotune_triton
from pallas_kernels.triton.call import record


@pytest.mark.parametrize("kernel", autotune_triton.KERNELS)
def test_every_kernel_is_timed_with_its_own_tiles_and_with_others(kernel, tmp_path, monkeypatch, capsys):
    sizes = ["--tokens=70", "--group=2", "--kv-heads=1", "--slots=20", "--head-dim=16", "--rounds=1", "--most=3"]
    monkeypatch.setattr("sys.argv", ["autotune", "--kernels", kernel, *sizes, f"--output={tmp_path}"])
    with record((8, 6)) as launched:
        autotune_triton.main()
    result = json.loads((tmp_path / "autotune_triton_sm86_h16.json").read_text())
    assert result["capability"] == [8, 6] and result["environment"]["device"]
    rows = result["rows"]
    assert [row["chosen"] for row in rows] == [True, False, False]
    assert all(row["seconds"] > 0 for row in rows)
    name = f"moda_{kernel.replace(' ', '_')}"
    started = [launch for launch in launched if launch.kernel.__name__ == name]
    assert len(started) == 3
    for launch, row in zip(started, rows, strict=True):
        assert (launch.warps, launch.stages) == (row["tiles"]["warps"], row["tiles"]["stages"])
        side = "SLOTS" if kernel.startswith("depth") else "KEYS"
        assert launch.constants[side] == row["tiles"][side.lower()]
    assert len({json.dumps(row["tiles"]) for row in rows}) == 3
    assert f"{kernel} " in capsys.readouterr().out
