import json
import logging
from pathlib import Path

import pytest

from moda_jax.config import Config
from moda_jax.training.console import config_fields
from moda_jax.training.workdir import check_config, config_changes, may_change, read_config, write_config


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
        write_config(tmp_path, new, changes, 2700)
    assert "config changed at step 2700: train.num_steps: 10000 in the directory, 20000 now" in caplog.text
    assert "planned anew from step 2700 on, as in a run of 20000 steps" in caplog.text
    assert "rounded in another order" not in caplog.text
    assert read_config(tmp_path) == new
    kept = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert {"step": 2700, "field": "train.num_steps", "old": 10000, "new": 20000} in kept and len(kept) == 7


@pytest.mark.parametrize(
    ("optimizer", "is_same"),
    [
        ({"final_learning_rate_fraction": 1.0}, True),
        ({"schedule": "constant"}, True),
        ({"schedule": "wsd", "warmup_steps": 100}, True),  # neither run's decay has begun at step 700
        ({"schedule": "wsd", "warmup_steps": 100, "decay_fraction": 0.95}, False),
    ],
)
def test_a_longer_run_with_the_same_beginning_is_not_planned_anew(optimizer, is_same, tmp_path, caplog):
    write_config(tmp_path, config(optimizer=optimizer), [])
    new = config(optimizer=optimizer, train={"num_steps": 20000})
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        write_config(tmp_path, new, check_config(tmp_path, new), 700)
    assert ("the learning rate up to step 700 is that of a run of 20000 steps" in caplog.text) == is_same
    assert ("planned anew" in caplog.text) != is_same


@pytest.mark.parametrize(
    "field", [
        "model.attention_implementation", "model.depth_gradient_group", "model.layer_loop", "model.remat",
        "train.accumulation_steps", "train.deterministic", "mesh.fsdp",
    ],
)  # fmt: skip
def test_what_changes_rounding_alone_is_permitted_and_said(field, tmp_path, caplog):
    section, key = field.split(".")
    other = {
        "attention_implementation": "xla", "layer_loop": "unroll", "remat": "none", "accumulation_steps": 4,
        "deterministic": False, "fsdp": 2, "depth_gradient_group": 1,
    }  # fmt: skip
    write_config(tmp_path, config(), [])
    new = config(**{section: {key: other[key]}})
    (change,) = check_config(tmp_path, new)
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        write_config(tmp_path, new, [change], 9)
    assert f"config changed at step 9: {field}: " in caplog.text
    assert "from step 9 on sums are rounded in another order: the same training, not bit for bit" in caplog.text


def test_what_the_function_and_the_data_depend_on_may_not_change():
    """Every field is on one side, by name: a new one is decided about here."""
    fields = config_fields(Config)[1]
    fixed = {field for field in fields if not may_change(field)}
    assert {field for field in fixed if not field.startswith(("model.", "optimizer.", "data.images."))} == {
        "data.document_separator", "data.feature", "data.train_split", "data.validation_split",
        "data.validation_fraction", "data.sequence_length",
        "data.shuffle", "data.on_damage", "data.on_invalid_utf8", "data.max_document_bytes",
        "train.batch_size", "train.init_from", "train.seed", "train.task", "train.z_loss",
    }  # fmt: skip
    assert {field for field in fields if field.startswith("optimizer.")} <= fixed
    free = {field for field in fields if field.startswith(("model.", "data.images."))} - fixed
    assert free == {
        "model.attention_implementation", "model.depth_gradient_group", "model.layer_loop", "model.remat",
        "data.images.threads", "data.images.workers",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run", "file:///tmp/run"])
def test_a_remote_directory_is_refused(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for workdir in (place, Path(place)):  # a Path has lost a slash
        if place.startswith("file") and isinstance(workdir, Path):
            continue
        with pytest.raises(ValueError, match=r"^workdir='\w+:/.*': is remote, .*; mount it as a folder"):
            check_config(workdir, config())
    assert not list(tmp_path.iterdir())


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
