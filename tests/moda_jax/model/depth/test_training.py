"""Every mechanism as a user has it: a run of 200 steps with evaluations and a checkpoint, and text from that run."""

import jax
import pytest
from support.tiny_run import WORDS, tiny_config, write_corpus

from moda_jax.depth_config import MECHANISMS
from moda_jax.inference.generation import generate
from moda_jax.inference.load import load_run
from moda_jax.inference.sampling import SamplingConfig
from moda_jax.training.trainer import TrainingRun

pytestmark = pytest.mark.slow
STEPS = 200
CASES = {name: {"depth": name} for name in MECHANISMS} | {
    "moda, window": {"depth": "moda", "moda": {"read": "window", "read_slots": 2, "null_slot": True}},
    "moda, top": {"depth": "moda", "moda": {"read": "top", "read_slots": 2}},
    "moda, separate": {"depth": "moda", "moda": {"softmax": "separate", "key": "writer_norm"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_corpus(root / "corpus")
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_short_run_learns_and_generates(name, place, tmp_path):
    """A byte costs 5.5 nats if all are alike, 2.6 by its frequency, 1.3 by the byte before it, 0.5 by the words."""
    config = tiny_config(
        place / "corpus", place / "cache", model=CASES[name] | {"num_layers": 4, "norm": "pre"},
        train={"num_steps": STEPS, "log_interval_steps": 50},
        eval={"interval_steps": STEPS // 2, "depth_mass": True}, checkpoint={"interval_steps": STEPS},
    )  # fmt: skip
    loss = TrainingRun(config, tmp_path).train().validation_loss
    print(f"{name}: validation loss {loss:.3f} after {STEPS} steps")
    assert loss < 1.6
    run = load_run(tmp_path)
    (completion,) = generate(
        run.model, run.params, run.tokenizer, ["import "], max_tokens=24, sampling=SamplingConfig(temperature=0.0),
        key=jax.random.key(0),
    )  # fmt: skip
    print(f"{name}: {completion.text!r}")
    assert completion.num_tokens == 24
    assert set(completion.text) <= set(" ".join(WORDS))
