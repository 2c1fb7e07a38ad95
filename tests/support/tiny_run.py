"""A run small enough for tests: a corpus of generated text, and a config around it."""

from __future__ import annotations

import random
from pathlib import Path

from moda_jax.config import Config

WORDS = ("def", "return", "import", "class", "self", "value", "for", "in", "if", "else", "None", "True", "print", "len")


def write_corpus(directory: Path, *, files: int = 40, words: int = 300, seed: int = 0) -> Path:
    """Text files that a byte model can learn something from; the same for the same seed."""
    directory.mkdir(parents=True)
    source = random.Random(seed)
    for number in range(files):
        text = " ".join(source.choice(WORDS) for _ in range(words))
        (directory / f"file_{number:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return directory


def tiny_values(corpus: Path, cache: Path, **sections) -> dict:
    """Nested config values: a 3-layer MoDA model of width 32 on 32-byte rows. `sections` override, field by field."""
    values = {
        "model": {
            "vocab_size": 257, "num_layers": 3, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
            "ffn_width": 64, "max_sequence_length": 64,
        },
        "data": {
            "source": str(corpus), "cache_dir": str(cache), "sequence_length": 32, "validation_fraction": 0.2,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "train": {"num_steps": 60, "batch_size": 4, "log_interval_steps": 1},
        "eval": {"interval_steps": 25, "num_batches": 2, "depth_mass": False},
        "checkpoint": {"interval_steps": 20},
    }  # fmt: skip
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return values


def tiny_config(corpus: Path, cache: Path, **sections) -> Config:
    """`tiny_values` as a Config."""
    return Config.from_dict(tiny_values(corpus, cache, **sections))
