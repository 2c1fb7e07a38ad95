"""The benchmark of what goes over rows, on a CPU: the script runs, the numbers mean nothing."""

import pytest

from benchmarks import rows


@pytest.mark.slow
def test_it_times_the_kernel_beside_xla(capsys):
    rows.main(["--cases=layer_norm:16:64,gelu_backward:8:64", "--rounds=1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("layer_norm", "gelu"))]
    assert [line.split()[0] for line in lines] == ["layer_norm:16:64", "gelu_backward:8:64"]
    for line in lines:
        assert "xla" in line and "mosaic_gpu" in line and "Error" not in line
        float(line.split()[-1])
