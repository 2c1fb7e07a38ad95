"""Remote storage is refused in one line, wherever a place can be named; nothing is made in its name."""

from pathlib import Path

import pytest

from moda_jax.config import Config, DataConfig
from moda_jax.data.cache import cache_directory
from moda_jax.data.tokenizer.__main__ import main as train_tokenizer
from moda_jax.inference.load import load_run
from moda_jax.interop.exchange import export_model
from moda_jax.training import checkpoint, compare, replay

REFUSED = r"{}='{}': is remote, and only local paths are read and written; mount it as a folder"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["gs://bucket/x", "s3://bucket/x", "hdfs://host:9000/x", "https://host/x", "s3:/x"])
@pytest.mark.parametrize("field", ["source", "tokenizer", "cache_dir"])
def test_in_the_data_section(field, place):
    with pytest.raises(ValueError, match=REFUSED.format(f"data.{field}", place)):
        Config.from_dict({"data": {field: place}})


@pytest.mark.parametrize("kind", ["tfds", "tokens"])
def test_behind_the_kind_of_a_source(kind):
    with pytest.raises(ValueError, match=REFUSED.format("data.source", f"{kind}:gs://bucket/x")):
        DataConfig(source=f"{kind}:gs://bucket/x")


@pytest.mark.parametrize("source", ["tfds:c4/en:3.0.1", "tfds:/data/x", "/a:/b", "a:b/c", "C:/x", "python_stdlib"])
def test_local_names_with_colons_pass(source):
    assert DataConfig(source=source).source == source


def test_in_functions_and_in_the_environment(monkeypatch):
    for name, function in (
        ("--workdir", load_run), ("workdir", checkpoint.verify), ("directory", replay.replay),
        ("directory", lambda place: export_model(Config().model, {}, place)),
    ):  # fmt: skip
        for place, shown in (("gs://bucket/x", "gs://bucket/x"), (Path("gs://bucket/x"), "gs:/bucket/x")):
            with pytest.raises(ValueError, match=REFUSED.format(name, shown)):
                function(place)
    monkeypatch.setenv("XDG_CACHE_HOME", "s3://bucket/cache")
    with pytest.raises(ValueError, match=REFUSED.format("XDG_CACHE_HOME", "s3://bucket/cache")):
        cache_directory(DataConfig())


def test_in_commands(capsys):
    assert compare.main(["compare", "gs://bucket/a"]) == 2
    assert "error: RUN='gs:/bucket/a': is remote" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train_tokenizer(["train", "--vocab-size=300", "--output=s3://bucket/tokenizer.json"])
    assert ended.value.code == 2
    assert "--output='s3://bucket/tokenizer.json': is remote" in capsys.readouterr().err
