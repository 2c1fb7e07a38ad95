"""The benchmark's plumbing on a CPU, cut to two layers and one batch; the numbers mean nothing there."""

import dataclasses
import json

import pytest
from support.quick_inference import quick_inference

from benchmarks import decode as benchmark
from moda_jax.model.accounting import param_count


@pytest.mark.slow
def test_a_result_holds_every_form_and_the_floor(tmp_path, monkeypatch, capsys):
    toy = benchmark.sizes()["toy"]
    models = {name: dataclasses.replace(config, num_layers=2) for name, config in toy.models.items()}
    toy = dataclasses.replace(toy, models=models, batches=(9,))
    monkeypatch.setattr(benchmark, "sizes", lambda: {"toy": toy})
    monkeypatch.setattr(benchmark, "LAYOUTS", ("unroll", "packed"))
    options = ["--size=toy", "--rounds=1", "--batches=2", "--implementations=xla", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["decode", *options])
    with quick_inference():
        benchmark.main()
    result = json.loads((tmp_path / "decode_toy.json").read_text())
    assert set(result["environment"]) == {"device", "platform", "jax", "python", "date"}
    assert [(row["model"], row["batch"], row["form"]) for row in result["rows"]] == [
        (model, 2, f"{layout} xla") for layout in ("unroll", "packed") for model in ("moda", "none")
    ]  # fmt: skip
    for row in result["rows"]:
        config = models[row["model"]]
        assert row["weight_bytes"] == 4 * param_count(config)
        # 32 prompt tokens and on average half of 7 more, in each of two layers.
        assert row["cache_bytes"] == 2 * 35.5 * 2 * 2 * config.num_kv_heads * config.head_dim * 4
        floor = (row["weight_bytes"] + row["cache_bytes"]) / result["copy_bytes_per_second"]
        assert row["floor_milliseconds"] == pytest.approx(floor * 1e3)
        assert row["of_floor"] == pytest.approx(row["floor_milliseconds"] / row["milliseconds_per_step"])
    assert "unroll xla" in (tmp_path / "decode_toy.txt").read_text()
    assert "copy bandwidth" in capsys.readouterr().out


def test_layouts_are_known_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["decode", "--size=toy", "--layouts=packed,fuse", f"--output={tmp_path}"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--layouts: got ['fuse'], expected some of ('scan', 'unroll', 'packed', 'fused')" in capsys.readouterr().err


def test_the_models_are_table_3s():
    size = benchmark.sizes()["700m"]
    assert [round(param_count(config) / 1e6, 1) for config in size.models.values()] == [705.7, 669.0]
    assert (size.prompt, size.steps, size.batches) == (2048, 128, (1, 64))
