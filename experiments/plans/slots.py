"""MoDA that reads a bounded number of slots: which eight of 46 does it need?"""

from experiments.plan import Plan
from experiments.plans._family import arm
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, one_epoch

PLAN = Plan(
    name="slots",
    question="How much of what the depth stream gains is left when a layer reads at most eight of its slots?",
    arms=(
        arm("none", "no depth stream"),
        arm("moda", "all slots"),
        arm("moda_window", "the last eight"),
        arm("moda_hybrid", "the first two and the last six"),
        arm("moda_stride", "those of every fourth layer"),
        arm("moda_top", "the eight with the highest learned scores"),
        arm("moda_null_slot", "all slots and a null slot"),
    ),
    comparisons=(
        ("moda", "none"),
        *((f"moda_{policy}", "moda") for policy in ("window", "hybrid", "stride", "top", "null_slot")),
        *((f"moda_{policy}", "none") for policy in ("window", "hybrid", "stride", "top")),
    ),
    seeds=(0, 1, 2),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
