"""The training benchmark at toy size on a CPU, and what its table says."""

import json
import sys

import pytest

from benchmarks import processes, training

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


def test_the_table_compares_with_the_peer_of_the_same_batch():
    ours, peer = result("row1:8:none", 60000, 40, 2**26, 0), result("peer:8", 40000, 50, 2**26, 0)
    lines = training.table([peer, ours, result("row1:16:ffn", 50000, 40, 2**26, 0)]).splitlines()
    assert [line.split()[-1] for line in lines] == ["peer", "1.000", "1.500", "nan"]
    assert lines[1].split()[0] == "peer:8"


def test_a_peer_that_cannot_run_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "run_case", lambda *_: pytest.fail("a case ran"))
    hidden = tmp_path / "python"  # this interpreter without what is installed
    hidden.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    hidden.chmod(0o755)
    for python, message in ((hidden, "torch is not installed in"), (tmp_path / "none", "No such file or directory")):
        monkeypatch.setattr("sys.argv", ["training", f"--peer={python}", f"--output={tmp_path}"])
        with pytest.raises(SystemExit) as refused:
            training.main()
        assert refused.value.code == 2
        said = capsys.readouterr().err
        assert f"--peer={python}: " in said and message in said
        assert "expected a Python with torch and transformers" in said


def test_the_peer_runs_once_for_every_batch_size(tmp_path, monkeypatch, capsys):
    """With a stand-in for the interpreter, that answers what PyTorch would."""
    answer = {"seconds_per_step": [0.5, 0.25, 1.0], "peak_bytes": 2**30, "compile_seconds": 9.0, "parameters": 7}
    python = tmp_path / "python"
    lines = ["#!/bin/sh", f"case $3 in --check) echo torch 2.0;; *) cat >> {tmp_path}/asked; echo >> {tmp_path}/asked",
             f"echo '{json.dumps(answer)}';; esac"]  # fmt: skip
    python.write_text("\n".join(lines) + "\n")
    python.chmod(0o755)
    ours = {name: result(name, 100, 1, 7, 0) for name in ("row1:2:none", "row4:2:none", "row1:4:none")}
    monkeypatch.setattr(processes, "run_case", lambda module, case, argv: ours[case])
    monkeypatch.setattr(
        "sys.argv",
        ["training", f"--cases={','.join(ours)}", f"--peer={python}", "--sequence-length=16",
         f"--model={json.dumps(TOY)}", f"--output={tmp_path}"],
    )  # fmt: skip
    training.main()
    found = json.loads((tmp_path / "training.json").read_text())["results"]
    assert [r["case"] for r in found] == ["peer:2", "row1:2:none", "row4:2:none", "peer:4", "row1:4:none"]
    assert found[0]["tokens_per_second"] == 2 * 16 / 0.5
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert [request["batch_size"] for request in asked] == [2, 4]
    assert asked[0]["model"]["hidden_size"] == TOY["width"] and asked[0]["model"]["num_hidden_layers"] == 2
    assert "peer: torch 2.0" in capsys.readouterr().out


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
