"""The benchmark of vision, at the size of a test."""

import json

import pytest
from support.image_folder import write_folder

from benchmarks.vision import CASES, case_config, main


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_config(case):
    config = case_config(case, None)
    assert config.train.batch_size == int(case.split(":")[2]) and config.model.remat == case.split(":")[3]


@pytest.mark.slow
def test_a_case_is_measured_with_and_without_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val"):
        write_folder(tmp_path / "folder" / split, each=4)
    model = {
        "num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "ffn_width": 32,
        "image": {"size": 16, "patch_size": 8, "num_classes": 3},
    }  # fmt: skip
    arguments = ["--cases=tiny:moda:4:none", f"--data={tmp_path / 'folder'}", "--workers=0", "--rounds=1", "--steps=2"]
    main([*arguments, f"--model={json.dumps(model)}", f"--output={tmp_path / 'out.json'}"])
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert all(speed > 0 for speed in result["images_per_second"].values())
    assert set(result["images_per_second"]) == {"step", "fed_step", "pipeline"}
