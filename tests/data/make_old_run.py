"""Writes tests/data/run_e971aff/: a run stopped in the middle, as the tree of commit e971aff left it, and its twin.

The tests resume the run with today's code. It is kept as it is, whatever is renamed later; so this script needs that
commit's tree and is not run again:

    git worktree add ../e971aff e971aff && cd ../e971aff
    python PATH_OF_THIS_TREE/tests/data/make_old_run.py PATH_OF_THIS_TREE/tests/data/run_e971aff

The stored run was made with JAX 0.11.2, Flax 0.12.12, Optax 0.2.8 and Orbax 0.12.8 on an AMD EPYC CPU, November 2026.

    corpus/          30 text files, committed, so that the data and their fingerprints are the same on any machine
    stopped/         config.json, metrics.jsonl and checkpoints/ of a run that was stopped at step 12 of 24
    straight/        metrics.jsonl of the same run, not stopped
    configs.json     resolved configs of that commit by name, each with its model's number of parameters

All paths in the config are relative to the folder that holds corpus/ and stopped/.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.getcwd())

from moda_jax import param_count
from moda_jax.config import Config
from moda_jax.training.trainer import TrainingRun

WORDS = ("def", "return", "import", "class", "self", "value", "for", "in", "if", "else", "None", "True", "print", "len")
NUM_STEPS, STOPPED_AT = 24, 12
# Both projections, so that the name of every parameter is in the checkpoint.
VALUES = {
    "model": {
        "vocab_size": 257, "num_layers": 3, "width": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
        "ffn_width": 32, "max_sequence_length": 32, "depth": "moda", "depth_ffn_kv": True, "depth_attn_kv": True,
        "dtype": "float32", "attention_implementation": "xla",
    },
    "data": {"source": "corpus", "cache_dir": "cache", "sequence_length": 32, "validation_fraction": 0.2},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 4},
    "train": {
        "num_steps": NUM_STEPS, "batch_size": 4, "accumulation_steps": 2, "log_interval_steps": 1, "sample_prompt": "",
    },
    "eval": {"interval_steps": 0},
    "checkpoint": {"interval_steps": STOPPED_AT},
}  # fmt: skip
NAMED = (
    ("quickstart", ()), ("olmo2_700m", ()), ("moda_700m", ("row4",)), ("moda_700m", ("row5",)), ("moda_1p5b", ()),
    ("depth_comparison", ("moda_own_kv",)),
)  # fmt: skip


def write_corpus(directory: Path) -> None:
    """The committed text."""
    directory.mkdir()
    source = random.Random(0)
    for number in range(30):
        text = " ".join(source.choice(WORDS) for _ in range(60))
        (directory / f"file_{number:02d}.txt").write_text(text + "\n", encoding="utf-8")


def named_configs() -> dict[str, dict]:
    """Resolved configs and the size of their models."""
    import importlib

    found = {}
    for name, argument in NAMED:
        config = Config.from_dict(importlib.import_module(f"configs.{name}").get_config(*argument).to_dict())
        found[":".join((name, *argument))] = {"config": config.to_dict(), "parameters": param_count(config.model)}
    return found


def main() -> None:
    """Trains twice in a temporary directory and copies what is kept."""
    output = Path(sys.argv[1]).absolute()
    configs = named_configs()
    output.mkdir()
    os.chdir(tempfile.mkdtemp())
    write_corpus(Path("corpus"))
    TrainingRun(Config.from_dict(VALUES), "straight").train()
    TrainingRun(Config.from_dict(VALUES), "stopped").train(stop_at_step=STOPPED_AT)
    shutil.copytree("corpus", output / "corpus")
    shutil.copytree("stopped", output / "stopped", ignore=shutil.ignore_patterns("tensorboard", "lock", "loss.png"))
    (output / "straight").mkdir()
    shutil.copy("straight/metrics.jsonl", output / "straight")
    (output / "configs.json").write_text(json.dumps(configs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
