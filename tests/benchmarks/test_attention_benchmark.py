"""The benchmark's smoke grid runs on a CPU; its numbers mean nothing there, its plumbing does."""

import json

import pytest

from benchmarks import attention, timing


def test_smoke_grid_writes_a_result_that_names_its_machine(tmp_path, monkeypatch, capsys):
    arguments = ["attention", "--grid=smoke", "--implementation=xla", "--rounds=1", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", arguments)
    attention.main()
    result = json.loads((tmp_path / "attention_smoke_xla.json").read_text())
    assert set(result["environment"]) == {"device", "platform", "jax", "python", "date"}
    assert [row["causal"] for row in result["rows"]] == [True, True, False]
    for row in result["rows"]:
        assert row["seconds"]["ours forward"] > 0 and row["seconds"]["ours forward+backward"] > 0
    printed = capsys.readouterr().out
    assert "B1 T64 G2 S3/3 " in printed and "B2 T61 G1 S2/2 K2 not causal" in printed
    monkeypatch.setenv("MODA_TRITON_CAPABILITY", "8.0")
    attention.main()
    result = json.loads((tmp_path / "attention_smoke_xla_for_8.0.json").read_text())
    assert result["environment"]["MODA_TRITON_CAPABILITY"] == "8.0"


def test_the_grid_of_vision_has_the_layers_of_deit():
    from configs import deit_small, deit_tiny
    from moda_jax.config import Config

    found = {(c.tokens, c.kv_heads, c.head_dim, c.group, c.slots) for c in attention.GRIDS["vision"] if c.slots}
    models = [Config.from_dict(module.get_config("moda").to_dict()).model for module in (deit_tiny, deit_small)]
    assert found == {(m.image.tokens, m.num_kv_heads, m.head_dim, 1, m.depth_slots) for m in models}
    assert not any(case.causal for case in attention.GRIDS["vision"])


def test_depth_bytes():
    forward, both = attention.Case(16384, 8, 64).depth_bytes
    assert forward == 2 * 16384 * 64 * 8 * 64 * 2
    assert both / 4.3e12 == pytest.approx(1.50e-3, rel=0.01)  # seconds at 4.3 TB/s


def test_a_contestant_that_cannot_run_is_reported_and_the_others_are_timed():
    def refuses(x):
        raise NotImplementedError("no such device")

    times = timing.median_seconds({"refuses": refuses, "adds": lambda x: x + 1}, [(1.0,), (2.0,)], rounds=1)
    assert times["refuses"] == "NotImplementedError: no such device"
    assert times["adds"] > 0
