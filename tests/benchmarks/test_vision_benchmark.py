"""The benchmark of vision, at the size of a test."""

import json

import numpy as np
import pytest
from PIL import Image
from support.image_folder import write_folder

from benchmarks import processes, vision
from benchmarks.vision import CASES, case_config, main

TOY = {
    "num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "ffn_width": 32,
    "image": {"size": 16, "patch_size": 8, "num_classes": 3},
}  # fmt: skip


def result(case, speed, fed=None):
    return {
        "case": case, "images_per_second": {"step": speed, "fed_step": fed, "pipeline": fed}, "mfu": 0.25,
        "peak_bytes": 2**30, "parameters": 7, "compile_seconds": 30.0, "environment": {"device": "a card"},
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_config(case):
    config = case_config(case, None)
    assert config.train.batch_size == int(case.split(":")[2]) and config.model.remat == case.split(":")[3]


def test_plain_and_moda_at_a_batch_of_512_come_first():
    assert CASES[:2] == ("tiny:none:512:none", "tiny:moda:512:none")


def test_the_table_compares_with_the_plain_model_and_the_peer():
    results = [
        result("peer:tiny:512", 4000), result("tiny:none:512:none", 5000, 2000), result("tiny:moda:512:none", 4000),
        result("tiny:moda:512:ffn", 3000), {"case": "small:moda:256:none", "error": "RESOURCE_EXHAUSTED: no"},
    ]  # fmt: skip
    lines = [line.split() for line in vision.table(results).splitlines()]
    assert lines[1] == ["peer:tiny:512", "4000", "128.0", "25.0%", "1.0", "30.0", "-", "-", "-", "-"]
    assert lines[2][-4:] == ["2000", "2000", "1.000", "1.250"]
    assert lines[3][-2:] == ["0.800", "1.000"] and lines[4][-2:] == ["-", "0.750"]
    assert lines[5] == ["small:moda:256:none", "RESOURCE_EXHAUSTED:", "no"]
    profiled = results[1] | {"seconds_by_category": {"matmuls": 0.05}}
    assert vision.table([profiled]).splitlines()[-1].split() == ["matmuls", "50.0"]


def test_the_peer_runs_once_for_every_size_and_batch_size(tmp_path, monkeypatch, capsys):
    """With a stand-in for the interpreter, that answers what PyTorch would."""
    answer = {"seconds_per_step": [0.5, 0.25, 1.0], "peak_bytes": 2**30, "compile_seconds": 9.0, "device": "a card"}
    python, output = tmp_path / "python", tmp_path / "out.json"
    lines = ["#!/bin/sh", f"case $3 in --check) echo torch 2.0;; *) cat >> {tmp_path}/asked; echo >> {tmp_path}/asked",
             f"echo '{json.dumps(answer)}';; esac"]  # fmt: skip
    python.write_text("\n".join(lines) + "\n")
    python.chmod(0o755)
    ours = {name: result(name, 8) for name in ("tiny:none:2:none", "tiny:moda:2:none", "small:none:2:none")}
    written = []

    def run_case(module, case, argv):
        if output.exists():
            written.append(len(json.loads(output.read_text())["results"]))
        return ours[case]

    monkeypatch.setattr(processes, "run_case", run_case)
    main([f"--cases={','.join(ours)}", f"--peer={python}", f"--output={output}"])
    found = json.loads(output.read_text())
    assert [r["case"] for r in found["results"]] == [
        "peer:tiny:2", "tiny:none:2:none", "tiny:moda:2:none", "peer:small:2", "small:none:2:none",
    ]  # fmt: skip
    assert written == [1, 2, 4] and found["environment"] == {"device": "a card"}
    assert found["results"][0]["images_per_second"]["step"] == 2 / 0.5
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert [request["model"] for request in asked] == ["deit_tiny_patch16_224", "deit_small_patch16_224"]
    assert asked[0]["arguments"] == {"num_classes": 1000, "drop_path_rate": 0.1}
    assert asked[0]["shape"] == [3, 224, 224] and asked[0]["batch_size"] == 2
    assert asked[0]["ema_decay"] == 0.99996 and asked[0]["label_smoothing"] == 0.1
    printed = capsys.readouterr().out
    assert "peer: torch 2.0" in printed and "'device': 'a card'" in printed


def test_a_peer_that_cannot_run_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "run_case", lambda *_: pytest.fail("a case ran"))
    with pytest.raises(SystemExit) as refused:
        main([f"--peer={tmp_path / 'none'}"])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "none: No such file or directory; expected a Python with torch and timm" in said


def test_images_are_made_of_a_natural_size_and_the_same_at_every_call(tmp_path, capsys):
    for name in ("one", "two"):
        main([f"--make-images={tmp_path / name}:12"])
    assert "22 JPEGs of 300 x 300 pixels" in capsys.readouterr().out
    one, two = (sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.jpg"))
                for name in ("one", "two"))  # fmt: skip
    assert one == two and len(one) == 22
    assert {path.parts[0] for path in one} == {"train", "val"} and len({path.parts[1] for path in one}) == 10
    contents = [(tmp_path / "one" / path).read_bytes() for path in one]
    assert contents == [(tmp_path / "two" / path).read_bytes() for path in two]
    assert len(set(contents)) == 22 and all(20_000 < len(content) < 80_000 for content in contents)
    with Image.open(tmp_path / "one" / one[0]) as image:
        pixels = np.asarray(image, np.float32)
    assert pixels.shape == (300, 300, 3)
    assert np.abs(np.diff(pixels, axis=0)).mean() < 0.5 * pixels.std()  # smooth


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("images:9", "expected FOLDER:COUNT"),
        ("images", "expected FOLDER:COUNT"),
        ("images:many", "expected FOLDER:COUNT"),
        ("{full}:20", "is not empty"),
    ],
)
def test_images_are_not_made_where_it_is_not_clear_where_and_how_many(request_text, message, tmp_path, capsys):
    (tmp_path / "a_file").touch()
    with pytest.raises(SystemExit) as refused:
        main([f"--make-images={request_text.format(full=tmp_path)}"])
    assert refused.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("workers", "ahead"), [(24, 144), (0, 6)])
def test_what_was_made_ahead_is_not_timed(workers, ahead, monkeypatch):
    """Of a source that has its buffers full, and then gives a batch of each worker in every two seconds."""
    config = case_config("tiny:none:512:none", None, workers)
    assert config.data.prefetch_batches == 4 and vision.read_ahead_batches(config) == ahead
    turn, now, taken = max(workers, 1), 0.0, 0
    monkeypatch.setattr(vision.time, "perf_counter", lambda: now)

    def one():
        nonlocal now, taken
        if taken >= ahead and taken % turn == 0:
            now += 2.0
        taken += 1
        return now

    assert vision.steady_calls_per_second(one, ahead, turn) == turn / 2.0
    assert now == vision.FED_SECONDS and taken == ahead + 5 * turn


def test_kernels_are_of_a_profile(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--kernels=somewhere"])
    assert refused.value.code == 2 and "--kernels: expected --profile" in capsys.readouterr().err


@pytest.mark.slow
def test_a_case_is_measured_with_and_without_images_and_one_that_fails_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vision, "FED_SECONDS", 0.5)
    for split in ("train", "val"):
        write_folder(tmp_path / "folder" / split, each=4)
    arguments = ["--cases=tiny:moda:4:none", f"--data={tmp_path / 'folder'}", "--workers=0", "--rounds=1", "--steps=2"]
    main([*arguments, f"--model={json.dumps(TOY)}", f"--output={tmp_path / 'out.json'}"])
    found = json.loads((tmp_path / "out.json").read_text())
    (measured,) = found["results"]
    assert all(speed > 0 for speed in measured["images_per_second"].values())
    assert set(measured["images_per_second"]) == {"step", "fed_step", "pipeline"}
    assert found["environment"]["device"] == measured["environment"]["device"] == "cpu"
    main([*arguments, f"--model={json.dumps(TOY)}", f"--data={tmp_path / 'missing'}"])
    assert "tiny:moda:4:none         ValueError: data.source=" in capsys.readouterr().out
