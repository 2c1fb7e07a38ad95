"""What the plans over the paper's small models share: the corpus and the budget of one epoch."""

import functools
from typing import Any

from configs import small
from experiments.plan import Arm, Budget, Corpus

TECHNICAL_ENGLISH = Corpus(
    name="technical English: reference pages of three public documentation repositories (win32, cpp-docs, "
    "windows-driver-docs)",
    licence="CC BY 4.0 (training and validation); held out: python/peps (public domain, CC0) and rust-lang/rfcs "
    "(Apache-2.0, MIT)",
    note="254 MB of text, about 49M tokens under a BPE of 50,304. Templated in places, so its loss is low.",
    vocab_size=50304,
)

# Tuned on `none` at 24 layers, post-norm, seed 0: see learning_rate.json.
LEARNING_RATE_NOTE = (
    "tuned on the 24-layer post-norm baseline, seed 0, 1500 steps (validation loss 2.0317 at 1e-3, 1.9612 at 2e-3, "
    "1.9808 at 4e-3, 2.0357 at 8e-3); every arm gets it"
)


def one_epoch(steps: int = 1500, learning_rate: float = 2e-3) -> Budget:
    """1500 steps of 32,768 tokens: 49M, about one epoch."""
    return Budget(
        steps=steps, batch_size=64, sequence_length=512, learning_rate=learning_rate, warmup_steps=steps // 10
    )


# Everything kept for the backward and every layer compiled by itself: the fastest way on a GPU of 80 GB.
FAST = {"model.remat": "none", "model.layer_loop": "unroll", "model.dtype": "bfloat16"}


def arm(name: str, row: str, text: str, *, changes: dict[str, Any] | None = None, **rules: str) -> Arm:
    """An arm that starts from a row of configs/small.py."""
    return Arm(name, functools.partial(small.get_config, row), changes=FAST | (changes or {}), text=text, **rules)
