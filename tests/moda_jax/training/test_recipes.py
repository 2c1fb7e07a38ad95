"""What a config can choose beside the defaults, together in the trainer: a run that is stopped goes on bit for bit."""

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus

from moda_jax.training.checkpoint import CheckpointError
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun

OPTIMIZER = {"name": "muon", "schedule": "wsd", "decay_fraction": 0.5, "warmup_steps": 2, "muon": {"weight_decay": 0.2}}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    place = tmp_path_factory.mktemp("recipes")
    for name, seed in (("a", 0), ("b", 1)):
        write_corpus(place / name, seed=seed)

    def make_(name, weights=(3, 1), num_steps=8):
        source = f"{weights[0]}*{place / 'a'} + {weights[1]}*{place / 'b'}"
        config = tiny_config(
            place / "a", place / "cache", data={"source": source}, optimizer=OPTIMIZER,
            train={"num_steps": num_steps, "accumulation_steps": 2}, eval={"interval_steps": 4},
        )  # fmt: skip
        return TrainingRun(config, place / name)

    return make_


@pytest.mark.slow
def test_muon_on_a_mixture_by_another_schedule_resumes_bit_for_bit(make):
    straight, first = make("straight"), make("halves")
    straight.train()
    first.train(stop_at_step=5)
    second = make("halves", weights=(0.75, 0.25))  # the same shares, written otherwise
    assert second.step == 5
    second.train()
    expected, found = (
        [(e["step"], e["loss"], e["grad_norm"], e.get("validation_loss")) for e in read_metrics(run.workdir)]
        for run in (straight, second)
    )
    assert [step for step, *_ in expected] == list(range(1, 9)) and found == expected
    jax.tree.map(np.testing.assert_array_equal, second._state.params, straight._state.params)
    jax.tree.map(np.testing.assert_array_equal, second._state.optimizer_state, straight._state.optimizer_state)
    with pytest.raises(CheckpointError, match="was trained on other data: its dataset_fingerprint is"):
        make("halves", weights=(1, 1), num_steps=9)
