"""Does MoDA help at 24 layers under post-norm? The paper's Table 6, rows 7 to 9, with two controls and five seeds."""

from experiments.plan import Plan, measured_speeds
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, arm, one_epoch

SPEEDS, RECORD = measured_speeds("table6")

PLAN = Plan(
    name="table6",
    question="Does the depth stream lower the loss of a 24-layer post-norm model, and more than its cost would buy?",
    arms=(
        arm("none", "24_post", "the baseline: OLMo 2's block, no depth stream"),
        arm("depth", "24_post_depth", "MoDA: depth KV, not one parameter more"),
        arm("depth_ffn", "24_post_depth_ffn", "MoDA with the FFN KV projection"),
        arm("none_wide", "24_post", "none, its FFN widened to the parameters of depth_ffn", parameters_of="depth_ffn"),
        arm("none_time", "24_post", "none, given the wall-clock time of depth_ffn", time_of="depth_ffn"),
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
    seeds=(0, 1, 2, 3, 4),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
    speeds=SPEEDS,
    speed_record=RECORD,
)
