"""Parameter and FLOP counts against built models, against the arithmetic of a traced model, and against the paper."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core as jax_core
from support import plain_model

from moda_jax import Transformer, TransformerConfig
from moda_jax.model.accounting import forward_flops, param_count, train_flops_per_token

TINY = TransformerConfig(
    vocab_size=61, num_layers=4, width=24, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=40, max_sequence_length=64
)
CHANGES = (
    {},
    {"depth": "none"},
    {"depth_ffn_kv": False},
    {"depth_attn_kv": True},
    {"depth_ffn_kv": False, "depth_attn_kv": True},
    {"qk_norm": False, "norm": "pre"},
    {"qk_norm_per_head": True},
    {"tie_embeddings": False},
    {"num_layers": 1},
    {"num_layers": 2, "num_kv_heads": 4},
    {"num_kv_heads": 1, "head_dim": 6, "layer_loop": "unroll"},
    {"depth": "none", "depth_attn_kv": True, "tie_embeddings": False, "num_layers": 1},
)

# Table 3: (fields, parameters in millions, forward TFLOPs of one sequence of 4096)
ROW = TransformerConfig(
    vocab_size=100278, num_layers=36, width=1024, num_heads=16, num_kv_heads=8, head_dim=64, ffn_width=4096
)
TABLE_3 = (
    ({"depth": "none"}, 669.0, 8.01),
    ({"depth": "none", "num_layers": 38}, 700.5, 8.41),
    ({"depth_ffn_kv": False}, 669.0, 8.02),
    ({"depth_ffn_kv": True}, 705.7, 8.33),
    ({"depth_ffn_kv": True, "depth_attn_kv": True}, 742.4, 8.63),
)
# Table 6: (layers, norm, depth, FFN KV, parameters in millions)
TABLE_6 = (
    (48, "pre", "none", False, 123.38),
    (48, "post", "none", False, 123.38),
    (48, "pre", "moda", False, 123.38),
    (48, "post", "moda", False, 123.38),
    (48, "pre", "moda", True, 128.11),
    (48, "post", "moda", True, 128.11),
    (24, "post", "none", False, 71.35),
    (24, "post", "moda", False, 71.35),
    (24, "post", "moda", True, 73.72),
)


def abstract_params(config):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def dot_flops(jaxpr):
    """Two per multiply-add of every matrix product in a traced function, nested calls included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        assert equation.primitive.name not in ("scan", "while"), "the oracle is unrolled"
        total += sum(dot_flops(inner) for inner in jax_core.jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_param_count_is_what_a_built_model_holds(changes):
    config = dataclasses.replace(TINY, **changes)
    held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
    assert param_count(config) == held


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("seq_len", [1, 13])
def test_forward_flops_are_the_matrix_products_of_the_plain_model(changes, seq_len):
    config = dataclasses.replace(TINY, **changes)
    tokens = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    traced = jax.make_jaxpr(lambda params, tokens: plain_model.logits(params, config, tokens))
    assert forward_flops(config, seq_len) == dot_flops(traced(abstract_params(config), tokens).jaxpr)


@pytest.mark.parametrize(("changes", "millions", "teraflops"), TABLE_3)
def test_table_3(changes, millions, teraflops):
    config = dataclasses.replace(ROW, **changes)
    assert f"{param_count(config) / 1e6:.1f}" == f"{millions:.1f}"
    assert forward_flops(config, 4096) / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_table_3_differences_between_rows():
    flops = [forward_flops(dataclasses.replace(ROW, **changes), 4096) / 1e12 for changes, _, _ in TABLE_3]
    for ours, (_, _, theirs) in zip(flops, TABLE_3, strict=True):
        assert ours - flops[0] == pytest.approx(theirs - TABLE_3[0][2], abs=0.01)  # two printed digits each


@pytest.mark.parametrize(("num_layers", "norm", "depth", "ffn_kv", "millions"), TABLE_6)
def test_table_6(num_layers, norm, depth, ffn_kv, millions):
    config = TransformerConfig(
        vocab_size=50304, num_layers=num_layers, width=384, num_heads=6, num_kv_heads=2, head_dim=64, ffn_width=1536,
        norm=norm, depth=depth, depth_ffn_kv=ffn_kv, max_sequence_length=512,
    )  # fmt: skip
    assert param_count(config) / 1e6 == pytest.approx(millions, rel=0.003)


def test_train_flops_of_the_baseline_are_the_usual_formula():
    config = dataclasses.replace(ROW, depth="none")
    assert train_flops_per_token(config, 4096) == 6 * param_count(config) + 6 * 36 * 1024 * 4096


def test_train_flops_count_each_product_three_times_and_causal_attention_once():
    T = 4096
    for changes, _, _ in TABLE_3:
        config = dataclasses.replace(ROW, **changes)
        # From the forward count: three times as much, half of attention's T x T, and the norm scales that 6 P includes.
        unseen_half = 2 * config.num_layers * 16 * 64 * T
        norm_scales = config.num_layers * (2 * 1024 + 24 * 64) + 1024
        expected = 3 * (forward_flops(config, T) / T - unseen_half) + 6 * norm_scales
        assert train_flops_per_token(config, T) == pytest.approx(expected, rel=1e-12)


def test_train_flops_leave_out_an_untied_look_up_table():
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    assert train_flops_per_token(untied, 64) == train_flops_per_token(TINY, 64)


@pytest.mark.parametrize("count", [forward_flops, train_flops_per_token])
def test_an_empty_sequence_is_refused(count):
    with pytest.raises(ValueError, match="seq_len=0: expected at least 1"):
        count(TINY, 0)
