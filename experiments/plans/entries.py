"""MoDA whose depth entries are kept in 8 bits: what it costs in loss, in pairs of runs with the same seed."""

from experiments.plan import Plan
from experiments.plans._family import arm
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, one_epoch

PLAN = Plan(
    name="entries",
    question="What do depth entries in 8 bits (float8_e4m3fn, no scale) cost in loss?",
    arms=(
        arm("moda", "entries in bfloat16"),
        arm("moda_float8", "entries in 8 bits"),
        arm("none", "no depth stream"),
    ),
    comparisons=(("moda_float8", "moda"), ("moda", "none"), ("moda_float8", "none")),
    seeds=(0, 1, 2),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
