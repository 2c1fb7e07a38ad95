"""The kernels under vmap, scan, shard_map and a whole train step, lowered for CUDA: no GPU is needed for that.

Shapes are not used by other tests: traces are cached by shape, and these are not those of the interpreter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moda_jax.config import OptimizerConfig, TrainConfig, TransformerConfig
from moda_jax.data.packing import Batch
from moda_jax.model.function import model_function, parameter_kinds
from moda_jax.tasks.language import LanguageObjective, language_params
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.schedule import learning_rate_schedule
from moda_jax.training.state import initial_state
from moda_jax.training.train_step import make_train_step
from pallas_kernels import dispatch, moda_attention, norm
from pallas_kernels.mosaic_gpu import implementation, warpgroup
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream

FORWARD = ("moda_depth_forward", "moda_sequence_forward")
BACKWARD = ("moda_sequence_dq", "moda_sequence_dkv", "moda_depth_backward")
NORMS = ("moda_rms_norm_backward_R144_D256", "moda_rms_norm_backward_R144_D1024_H32")
TOKENS, SLOTS, HEADS, KV_HEADS, HEAD_DIM = 152, 11, 6, 2, 64


@pytest.fixture(autouse=True)
def for_the_chip(monkeypatch):
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))
    norm._best.cache_clear()
    yield
    norm._best.cache_clear()


def lower(function, *specs):
    return jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_specs(*leading):
    """query, key, value, depth_key, depth_value, segment_ids."""
    key = array(*leading, TOKENS, KV_HEADS, HEAD_DIM)
    depth = array(*leading, TOKENS, SLOTS, KV_HEADS, HEAD_DIM)
    segment_ids = array(*leading, TOKENS, dtype=jnp.int32)
    return array(*leading, TOKENS, HEADS, HEAD_DIM), key, key, depth, depth, segment_ids


def gradients(query, key, value, depth_key, depth_value, segment_ids):
    """Of the public op."""

    def loss(*arrays):
        out = moda_attention(*arrays, segment_ids=segment_ids, implementation="mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(query, key, value, depth_key, depth_value)


def test_gradients_under_vmap():
    text = lower(jax.vmap(gradients), *attention_specs(2, 1))
    assert all(name in text for name in FORWARD + BACKWARD)


def test_accumulating_backward_under_scan():
    """A reverse scan over layers whose carry is the gradient of the whole depth buffer."""
    query, key, _, depth, _, _ = attention_specs(1)
    statistics = array(1, TOKENS, HEADS, dtype=jnp.float32)

    def layers(query, key, depth_key, depth_value, lse, buffers):
        def layer(buffers, length):
            call = Call(query, key, key, Mask(True), DepthKV(depth_key, depth_value, length=length), 0.125)
            *gradients, dk, dv = implementation.backward(call, Upstream(query, lse, lse), buffers)
            return (dk, dv), gradients

        return jax.lax.scan(layer, buffers, jnp.arange(SLOTS, 0, -1))

    for dtype, name in ((jnp.bfloat16, "moda_depth_backward_accumulate"), (jnp.float32, "_accumulate_float32")):
        buffer = array(*depth.shape, dtype=dtype)
        text = lower(layers, query, key, depth, depth, statistics, (buffer, buffer))
        assert name in text


def test_gradients_under_shard_map():
    """Batch over `data`, KV heads with their query heads over `tensor`: depth needs no collective."""
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, depth = P("data", None, "tensor"), P("data", None, None, "tensor")
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(heads, heads, heads, depth, depth, P("data")),
        out_specs=(heads, heads, heads, depth, depth), check_vma=False,
    )  # fmt: skip
    text = lower(sharded, *attention_specs(4))
    assert all(name in text for name in FORWARD + BACKWARD)
    assert not any(f"stablehlo.{op}" in text for op in ("all_reduce", "all_gather", "all_to_all", "collective_permute"))


MODEL = TransformerConfig(
    vocab_size=128, num_layers=4, width=256, num_heads=32, num_kv_heads=16, head_dim=32, ffn_width=128,
    dtype="bfloat16", depth="moda", depth_ffn_kv=True, attention_implementation="mosaic_gpu",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "present", "absent"),
    [
        (MODEL, (*FORWARD, *BACKWARD, *NORMS, "moda_depth_backward_accumulate"), ()),
        pytest.param(
            dataclasses.replace(MODEL, depth="none", depth_ffn_kv=False),
            (FORWARD[1], *BACKWARD[:2], *NORMS),
            (FORWARD[0], BACKWARD[2]),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["moda", "none"],
)
def test_train_step(model, present, absent):
    train = TrainConfig(num_steps=10, batch_size=2)
    schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=2), train.num_steps)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2), train.num_steps, parameter_kinds(model))
    state = jax.eval_shape(functools.partial(initial_state, functools.partial(language_params, model), optimizer, 0))
    rows = array(train.batch_size, 72, dtype=jnp.int32)
    batch = Batch(rows, rows, rows, rows, array(train.batch_size, 72, dtype=jnp.float32))
    text = lower(make_train_step(LanguageObjective(model_function(model)), optimizer, schedule, train), state, batch)
    assert all(name in text for name in present)
    assert not any(name in text for name in absent)
