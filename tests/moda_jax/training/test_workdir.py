import json
import logging

import pytest

from moda_jax.config import Config
from moda_jax.training.workdir import check_config, config_changes, read_config, write_config


def config(**sections):
    return Config.from_dict(sections)


def test_a_new_directory_gets_the_resolved_config(tmp_path):
    workdir = tmp_path / "a" / "b"
    assert check_config(workdir, config()) == []
    assert not workdir.exists()
    write_config(workdir, config(), [])
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["beta2"] == 0.95
    assert read_config(workdir) == config()
    assert check_config(workdir, config()) == []


def test_another_config_is_refused_with_every_difference(tmp_path):
    write_config(tmp_path, config(), [])
    other = config(model={"num_layers": 3, "dtype": "bfloat16"}, optimizer={"beta2": 0.99}, train={"num_steps": 7000})
    with pytest.raises(ValueError, match="holds a run with a different config") as error:
        check_config(tmp_path, other)
    assert str(error.value).splitlines()[1:] == [
        "  model.num_layers: 12 in the directory, 3 now",
        "  model.dtype: None in the directory, 'bfloat16' now",
        "  optimizer.beta2: 0.95 in the directory, 0.99 now",
    ]
    assert read_config(tmp_path) == config()


def test_what_may_change_is_logged_and_stored(tmp_path, caplog):
    write_config(tmp_path, config(), [])
    new = config(
        train={"log_interval_steps": 3, "num_steps": 20000}, eval={"interval_steps": 0}, data={"cache_dir": "/x"},
        checkpoint={"interval_steps": 9, "keep_last": 5, "keep_every_steps": 18},
    )  # fmt: skip
    changes = check_config(tmp_path, new)
    assert {change.field for change in changes} == {
        "train.log_interval_steps", "train.num_steps", "eval.interval_steps", "data.cache_dir",
        "checkpoint.interval_steps", "checkpoint.keep_last", "checkpoint.keep_every_steps",
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        write_config(tmp_path, new, changes)
    assert "train.num_steps: 10000 in the directory, 20000 now" in caplog.text
    assert "schedule spans train.num_steps" in caplog.text
    assert read_config(tmp_path) == new


def test_mesh_may_change():
    from moda_jax.training.workdir import may_change

    assert all(may_change(f"mesh.{axis}") for axis in ("data", "fsdp", "tensor", "context"))
    assert not may_change("train.batch_size")
    assert not may_change("eval.num_batches")


def test_a_config_file_that_is_none_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"num_layer": 3}}')
    with pytest.raises(ValueError, match=r"config\.json: not a config .*model\.num_layer: unknown config key"):
        check_config(tmp_path, config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a config"):
        check_config(tmp_path, config())


def test_a_run_without_config_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl but no config\.json"):
        check_config(tmp_path, config())


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a directory"):
        check_config(tmp_path / "file", config())
    with pytest.raises(ValueError, match="cannot be written"):
        write_config(tmp_path / "file" / "run", config(), [])


def test_a_field_that_an_older_version_did_not_know_counts_as_its_default(tmp_path):
    values = config().to_dict()
    del values["train"]["sample_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert check_config(tmp_path, config()) == []
    assert [change.field for change in config_changes(config(), config(train={"sample_tokens": 1}))] == [
        "train.sample_tokens"
    ]
