"""Trackers: which are opened, what they are given, and what is said of a missing package."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest
from support.tiny_run import tiny_config

from moda_jax.exit_codes import RunStoppedError
from moda_jax.training import trackers
from moda_jax.training.trackers import check_trackers, group_scalars, open_trackers


@pytest.fixture
def config(tmp_path):
    def config_(names, **train):
        return tiny_config(tmp_path / "corpus", tmp_path / "cache", train={"trackers": names} | train)

    return config_


class StandInRun:
    """What the tracker calls of a run of wandb's, noted down."""

    def __init__(self, calls):
        self.calls = calls

    def define_metric(self, name, step_metric):
        self.calls.append(("define", name, step_metric))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name in place of the package; the calls that it got."""
    calls = []
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.Error = type("Error", (Exception,), {})
    module.Settings = dict
    module.init = lambda **arguments: calls.append(("init", arguments)) or StandInRun(calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "moda_jax.training.wandb_tracker", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield calls
    sys.modules.pop("moda_jax.training.wandb_tracker", None)


def test_numbers_are_grouped():
    entry = {"step": 3, "loss": 2.0, "mfu": None, "validation_loss": 2.5, "depth_mass": 0.1}
    assert group_scalars(entry) == {"train/loss": 2.0, "validation/loss": 2.5, "train/depth_mass": 0.1}


def test_tensorboard_is_the_default(config, tmp_path):
    assert config("tensorboard") == tiny_config(tmp_path / "corpus", tmp_path / "cache")
    (tracker,) = open_trackers(config("tensorboard"), tmp_path, 0)
    tracker.write(1, {"train/loss": 1.0})
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_none_opens_nothing_and_needs_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(config("none"))
    assert open_trackers(config("none"), tmp_path, 0) == [] and not list(tmp_path.iterdir())


def test_a_missing_package_is_said_with_what_installs_it(config, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ValueError) as error:
        check_trackers(config("tensorboard,wandb"))
    assert str(error.value) == (
        "train.trackers='tensorboard,wandb': 'wandb' takes the package wandb, which is not installed: "
        'python -m pip install "moda-jax[wandb]"'
    )


def test_wandb_is_given_the_run_and_its_numbers(config, tmp_path, wandb):
    run = config("tensorboard, wandb")
    check_trackers(run)
    both = open_trackers(run, tmp_path, 0)
    for tracker in both:
        tracker.write(5, {"train/loss": 1.5})
        tracker.close()
    (name, arguments), *calls = wandb
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert name == "init" and arguments == {
        "project": "moda-jax", "name": tmp_path.name, "dir": str(tmp_path), "id": identity, "resume": "allow",
        "config": run.to_dict(), "allow_val_change": True, "settings": {"console": "off"},
    }  # fmt: skip
    assert calls == [("define", "*", "step"), ("log", {"step": 5, "train/loss": 1.5}), ("finish",)]
    assert len(both) == 2 and len(identity) == 12


def test_wandb_goes_on_with_the_same_run(config, tmp_path, wandb, monkeypatch):
    for project in ("mine", "mine"):
        monkeypatch.setenv("WANDB_PROJECT", project)
        open_trackers(config("wandb"), tmp_path, 7)
    first, second = (call[1] for call in wandb if call[0] == "init")
    assert first["id"] == second["id"] and first["project"] == "mine"


def test_a_service_that_refuses_ends_the_run_in_one_line(config, tmp_path, wandb, monkeypatch):
    def refuse(**arguments):
        raise sys.modules["wandb"].Error("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(RunStoppedError, match=r"train\.trackers='wandb': wandb cannot begin the run \(api_key not"):
        open_trackers(config("wandb"), tmp_path, 0)


def test_the_known_names_are_those_of_the_config():
    from moda_jax.config import TRACKERS

    assert tuple(trackers._KINDS) == TRACKERS


OFFLINE = """
import sys
from pathlib import Path
from moda_jax.config import Config
from moda_jax.training.trackers import check_trackers, open_trackers
config = Config.from_dict({"train": {"trackers": "wandb"}})
check_trackers(config)
for start in (0, 2):
    (tracker,) = open_trackers(config, Path(sys.argv[1]), start)
    for step in range(start + 1, start + 4):
        tracker.write(step, {"train/loss": 1.0 / step})
    tracker.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb, the extra of that name")
def test_wandb_itself_offline(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, tmp_path], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"WANDB_MODE": "offline", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 2
