"""Every depth mechanism beside the plain transformer, pre-norm, at equal steps."""

from experiments.plan import Plan
from experiments.plans._family import arm
from experiments.plans._small import LEARNING_RATE_NOTE, TECHNICAL_ENGLISH, one_epoch

_ARMS = {
    "denseformer": "DenseFormer: static sums of layers' outputs",
    "moda": "MoDA with the FFN KV projection",
    "depth_attention": "depth attention, without a residual stream",
    "attnres": "Attention Residuals, every sub-layer a source",
    "attnres_block": "Attention Residuals, blocks of four sub-layers",
    "attnres_delta": "Attention Residuals beside the residual stream",
    "value_mixing": "values mixed over layers by attention",
    "value_residual": "the first layer's value in every layer's",
    "mudd": "MUDD: four dynamic sums a layer",
    "hc": "hyper-connections, four streams",
    "mhc": "hyper-connections, four streams, doubly stochastic",
}

PLAN = Plan(
    name="family",
    question="Which depth mechanism lowers the loss of a 24-layer model, at equal steps?",
    arms=(
        arm("none", "the baseline: pre-norm, no depth mechanism"),
        *(arm(name, text) for name, text in _ARMS.items()),
        arm("none_wide", "none, its FFN widened to MoDA's parameters", config="none", parameters_of="moda"),
    ),
    comparisons=(
        *((name, "none") for name in (*_ARMS, "none_wide")),
        *((name, "moda") for name in _ARMS if name != "moda"),
    ),
    seeds=(0, 1, 2),
    budget=one_epoch(),
    corpus=TECHNICAL_ENGLISH,
    learning_rate_note=LEARNING_RATE_NOTE,
)
