import importlib
import sys
from pathlib import Path

import pytest

from moda_jax import config_files


@pytest.mark.parametrize(
    ("value", "path", "argument"),
    [
        ("quickstart", "quickstart.py", ""),
        ("moda_700m:row4", "moda_700m.py", ":row4"),
        ("configs/small.py:24_post", "small.py", ":24_post"),
    ],
)
def test_ours_are_found_by_name_from_anywhere(value, path, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find(value) == f"{config_files.directory() / path}{argument}"


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text("")
    assert config_files.find("configs/small.py:x") == "configs/small.py:x"


@pytest.mark.parametrize(
    "value", ["no_such", "/nowhere/x.py:row1", "configs/no_such.py", "elsewhere/quickstart.py", ""]
)
def test_what_is_not_there_is_said_with_what_is(value):
    with pytest.raises(ValueError, match=r"no such file; ours by name: base, .*depth_comparison, .*quickstart"):
        config_files.find(value)


@pytest.mark.parametrize("form", [["--config=quickstart"], ["--config", "quickstart"], ["-config=quickstart"]])
def test_the_flag_is_rewritten_in_each_of_its_forms(form):
    path = str(config_files.directory() / "quickstart.py")
    found = config_files.with_found_config(["train.py", *form, "--config.train.num_steps=3", "--workdir=x"])
    assert [argument.rpartition("=")[2] for argument in found] == [
        "train.py",
        *["--config"] * (len(form) - 1),
        path,
        "3",
        "x",
    ]


def test_the_flag_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"^--config=/nowhere/x\.py: no such file"):
        config_files.with_found_config(["train.py", "--config=/nowhere/x.py:row1"])


def test_in_a_clone_configs_is_its_own_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    config_files.make_importable()
    assert "configs" not in sys.modules


def test_ours_are_importable_beside_a_folder_of_that_name(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("LAYERS = 7\n")
    loaded = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    for name in (*loaded, "configs", "configs.mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    repository = config_files.directory().parent
    paths = [path for path in sys.path if Path(path).resolve() != repository.resolve()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *paths])
    config_files.make_importable()
    assert importlib.import_module("configs.mine").LAYERS == 7
    assert importlib.import_module("configs.quickstart").get_config().model.num_layers == 4


def test_an_installed_package_has_its_own(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "other.py").write_text("")  # another project's, beside moda_jax in site-packages
    (tmp_path / "moda_jax" / "configs").mkdir(parents=True)
    (tmp_path / "moda_jax" / "configs" / "ours.py").write_text("")
    monkeypatch.setattr(config_files, "_PACKAGE", tmp_path / "moda_jax")
    assert config_files.names() == ["ours"]
