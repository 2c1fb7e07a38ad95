"""Where the norm stands, with and without the depth stream: post (x + norm(f(x))) and pre (x + f(norm(x)))."""

from experiments.plan import Plan
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, arm, one_epoch

PRE = {"model.norm": "pre"}

PLAN = Plan(
    name="norms",
    question="Is what the depth stream gains another under pre-norm than under post-norm?",
    arms=(
        arm("post", "24_post", "post-norm, no depth stream"),
        arm("post_depth_ffn", "24_post_depth_ffn", "post-norm, MoDA with the FFN KV projection"),
        arm("pre", "24_post", "pre-norm, no depth stream", changes=PRE),
        arm("pre_depth_ffn", "24_post_depth_ffn", "pre-norm, MoDA with the FFN KV projection", changes=PRE),
    ),
    comparisons=(
        ("post_depth_ffn", "post"),
        ("pre_depth_ffn", "pre"),
        ("post", "pre"),
        ("post_depth_ffn", "pre_depth_ffn"),
    ),
    seeds=(0, 1, 2, 3),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
