import json

import pytest

from moda_jax.tasks.task import Metric
from moda_jax.training.metrics_file import MetricsWriter, plot_curves, read_metrics
from moda_jax.training.peak_flops import peak_flops

LOSS = Metric("loss", "nats per token")


def write(workdir, step, *steps):
    writer = MetricsWriter(workdir, step)
    for n in steps:
        writer.write({"step": n, "loss": 1 / n, "mfu": None} | ({"validation_loss": 2.0} if n % 2 == 0 else {}))
    writer.close()


@pytest.mark.parametrize(
    ("device_kind", "dtype", "expected"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA GH200 480GB", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peak_flops(device_kind, dtype, expected):
    assert peak_flops(device_kind, dtype) == expected


def test_a_line_per_step(tmp_path):
    write(tmp_path, 0, 1, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0, "mfu": None},
        {"step": 2, "loss": 0.5, "mfu": None, "validation_loss": 2.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_drops_the_lines_after_its_step(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 2, 3)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    write(tmp_path, 0, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, 3)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_damaged_line_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        MetricsWriter(tmp_path, 1)


def test_the_plot_is_a_picture(tmp_path):
    assert plot_curves(tmp_path, LOSS).read_bytes().startswith(b"\x89PNG")  # without a line yet
    write(tmp_path, 0, 1, 2, 3)
    assert plot_curves(tmp_path, LOSS).stat().st_size > 5000


def limited(size):
    """Lets this process write files of `size` bytes at most: as a full disk does, but in one place."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if size is None else size, hard))


def test_lines_that_a_full_disk_does_not_take_come_later(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0)
    try:
        writer.write({"step": 1, "loss": 0.5})
        limited((tmp_path / "metrics.jsonl").stat().st_size + 10)  # ten bytes fit: half a line would
        for step in (2, 3):
            writer.write({"step": step, "loss": 0.5})
            assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]
            assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
        limited(None)
        writer.write({"step": 4, "loss": 0.5})
    finally:
        limited(None)
        writer.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("metrics.jsonl: cannot be written") == 1
    assert "metrics.jsonl: 3 lines that were held are written" in caplog.text


def test_lines_that_never_fit_are_counted(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0)
    try:
        limited(10)
        writer.write({"step": 1, "loss": 0.5})
        writer.close()
    finally:
        limited(None)
    assert "the last 1 lines could not be written and are lost" in caplog.text
