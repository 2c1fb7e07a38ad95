"""Does MoDA help at 48 layers under post-norm? Table 6, rows 2, 4 and 6, with two controls and three seeds."""

from experiments.plan import Plan, measured_speeds
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, arm, one_epoch

SPEEDS, RECORD = measured_speeds("table6_48")

PLAN = Plan(
    name="table6_48",
    question="Does the depth stream lower the loss of a 48-layer post-norm model, and more than its cost would buy?",
    arms=(
        arm("none", "48_post", "the baseline: OLMo 2's block, no depth stream"),
        arm("depth", "48_post_depth", "MoDA: depth KV, not one parameter more"),
        arm("depth_ffn", "48_post_depth_ffn", "MoDA with the FFN KV projection"),
        arm("none_wide", "48_post", "none, its FFN widened to the parameters of depth_ffn", parameters_of="depth_ffn"),
        arm("none_time", "48_post", "none, given the wall-clock time of depth_ffn", time_of="depth_ffn"),
    ),
    comparisons=(
        ("depth", "none"),
        ("depth_ffn", "none"),
        ("depth_ffn", "depth"),
        ("depth_ffn", "none_wide"),
        ("depth_ffn", "none_time"),
        ("none_wide", "none"),
        ("none_time", "none"),
    ),
    seeds=(0, 1, 2),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
    speeds=SPEEDS,
    speed_record=RECORD,
)
