"""How a depth key is treated, which public code does in three ways that were never compared."""

from experiments.plan import Plan
from experiments.plans._family import arm
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, one_epoch

PLAN = Plan(
    name="keys",
    question="Does it matter whose norm a depth key has, whether it is rotated, and what else stands in the softmax?",
    arms=(
        arm("moda", "keys as the writer's attention uses them: its norm, rotated"),
        arm("moda_writer_norm", "the writer's norm, not rotated; the query is"),
        arm("moda_reader_norm", "raw keys, the reader's norm, not rotated; the query is"),
        arm("moda_reader_norm_unrotated", "raw keys, the reader's norm; neither key nor query rotated"),
        arm("moda_entry_bias", "a learned bias for each kind of entry"),
        arm("moda_separate", "a softmax for the slots by themselves, and a gate"),
    ),
    comparisons=tuple(
        (f"moda_{other}", "moda")
        for other in ("writer_norm", "reader_norm", "reader_norm_unrotated", "entry_bias", "separate")
    ),
    seeds=(0, 1, 2),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
