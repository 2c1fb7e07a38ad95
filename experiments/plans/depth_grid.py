"""Is depth worth more with a depth stream? 12, 24 and 48 layers of about 73.5M parameters each, with and without it."""

from experiments.plan import Arm, Plan
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, arm, one_epoch

_SHAPES = {
    12: {"num_layers": 12, "width": 512, "num_heads": 8, "ffn_width": 2048},
    24: {},
    48: {"num_layers": 48, "width": 256, "num_heads": 4, "ffn_width": 1024},
}


def _arms(layers: int) -> tuple[Arm, Arm]:
    changes = {f"model.{field}": value for field, value in _SHAPES[layers].items()}
    widened = f"{layers} layers, no depth stream, FFN widened to the parameters of depth_ffn_{layers}"
    moda = f"{layers} layers, MoDA with the FFN KV projection"
    matched = {} if layers == 24 else {"parameters_of": "depth_ffn_24"}
    return (
        arm(f"none_{layers}", "24_post", widened, changes=changes, parameters_of=f"depth_ffn_{layers}"),
        arm(f"depth_ffn_{layers}", "24_post_depth_ffn", moda, changes=changes, **matched),
    )


PLAN = Plan(
    name="depth_grid",
    question="At equal parameters, does the depth stream gain more the deeper the model is?",
    arms=tuple(one for layers in _SHAPES for one in _arms(layers)),
    comparisons=(
        *((f"depth_ffn_{layers}", f"none_{layers}") for layers in _SHAPES),
        ("none_48", "none_24"),
        ("depth_ffn_48", "depth_ffn_24"),
    ),
    seeds=(0, 1, 2),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
