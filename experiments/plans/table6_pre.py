"""The same as `table6` under pre-norm. No arm gets equal time: the speeds under pre-norm were not measured."""

from experiments.plan import Plan
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, arm, one_epoch

PRE = {"model.norm": "pre"}

PLAN = Plan(
    name="table6_pre",
    question="Does the depth stream lower the loss of a 24-layer pre-norm model?",
    arms=(
        arm("none", "24_post", "the baseline: pre-norm, no depth stream", changes=PRE),
        arm("depth", "24_post_depth", "MoDA: depth KV, not one parameter more", changes=PRE),
        arm("depth_ffn", "24_post_depth_ffn", "MoDA with the FFN KV projection", changes=PRE),
        arm(
            "none_wide",
            "24_post",
            "none, its FFN widened to the parameters of depth_ffn",
            changes=PRE,
            parameters_of="depth_ffn",
        ),
    ),
    comparisons=(
        ("depth", "none"),
        ("depth_ffn", "none"),
        ("depth_ffn", "depth"),
        ("depth_ffn", "none_wide"),
        ("none_wide", "none"),
    ),
    seeds=(0, 1, 2, 3, 4),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
