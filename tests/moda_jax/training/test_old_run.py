"""A run that the tree of commit e971aff left behind goes on, whatever was renamed since (see make_old_run.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moda_jax import param_count
from moda_jax.config import Config
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun
from moda_jax.training.workdir import read_config

OLD = Path(__file__).parents[2] / "data" / "run_e971aff"
NAMED = json.loads((OLD / "configs.json").read_text())

# With the compiler options that made them the losses come back bit for bit. Unoptimised code, which this suite runs,
# sums in another order: it is off by 8e-8 at most, with AVX2 and with SSE4.2.
TOLERANCE = 1e-6


@pytest.mark.parametrize("name", NAMED)
def test_an_old_config_is_read_and_means_the_same_model(name):
    config = Config.from_dict(NAMED[name]["config"])
    assert param_count(config.model) == NAMED[name]["parameters"]


def test_an_old_run_resumes_to_the_losses_of_its_twin(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # the run's paths are relative
    run = TrainingRun(read_config(Path("stopped")), "stopped")
    assert run.step == 12, "resumed, not begun anew"
    run.train()
    resumed, straight = read_metrics(Path("stopped")), read_metrics(Path("straight"))
    assert [entry["step"] for entry in resumed] == list(range(1, 25))
    for name in ("loss", "grad_norm", "learning_rate"):
        ours, theirs = (np.array([entry[name] for entry in entries]) for entries in (resumed, straight))
        print(f"{name}: largest relative difference {np.max(np.abs(ours / theirs - 1)):.1e}")
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, err_msg=name)
