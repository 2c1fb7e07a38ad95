"""The training benchmark at toy size on a CPU, and what its table says."""

import json

import pytest

from benchmarks import training

TOY = {
    "num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_width": 32,
    "vocab_size": 300, "attention_implementation": "xla",
}  # fmt: skip


def result(case, speed, peak_gib, parameters, depth_gib):
    return {
        "case": case, "tokens_per_second": speed, "seconds_per_step": [0.5, 0.4, 0.6], "mfu": 0.25,
        "peak_bytes": int(peak_gib * 2**30), "parameters": parameters, "depth_bytes": int(depth_gib * 2**30),
        "compile_seconds": 30.0,
    }  # fmt: skip


def test_the_table_compares_with_row1_of_the_same_batch_and_remat():
    row1, row4 = result("row1:8:none", 60000, 40, 2**26, 0), result("row4:8:none", 45000, 52, 2**27, 9.5)
    assert training.extra_bytes(row4, row1) == 11 * 2**30  # 12 GiB less 2**26 parameters of 16 bytes
    lines = training.table([row1, row4, {"case": "row4:16:none", "error": "RESOURCE_EXHAUSTED: no"}]).splitlines()
    assert lines[2].split() == ["row4:8:none", "45000", "500.0", "25.0%", "52.0", "11.0", "9.5", "30.0", "0.750"]
    assert "RESOURCE_EXHAUSTED" in lines[3]


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_a_case_runs_in_its_own_process_and_one_that_fails_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["training", "--cases=row4:1:ffn,row4:1:wrong", "--steps=1", "--rounds=1", "--sequence-length=16",
         f"--model={json.dumps(TOY)}", f"--output={tmp_path}"],
    )  # fmt: skip
    training.main()
    good, bad = json.loads((tmp_path / "training.json").read_text())["results"]
    assert good["tokens_per_second"] > 0 and good["environment"]["date"]
    assert (
        good["depth_bytes"] == 2 * 2 * 16 * 2 * 16 * 2
    )  # K and V, and gradients; 16 tokens, 2 slots, 16 wide, 2 bytes
    assert "model.remat='wrong'" in bad["error"]
    assert "row4:1:ffn" in capsys.readouterr().out
