"""The kernels through jax-triton, lowered for CUDA. No GPU is needed for that, but JAX's GPU plugin is, which holds
what jax-triton builds on (`pip install --no-deps jax-cuda13-plugin`, a step of .ci/run)."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moda_jax import Transformer, TransformerConfig
from pallas_kernels import moda_attention
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.triton import call as calls
from pallas_kernels.triton import implementation

pytestmark = [
    pytest.mark.skipif(
        jax.default_backend() != "gpu" and importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs JAX's GPU plugin; a GPU is not needed",
    ),
    pytest.mark.skipif(calls.interpreting(), reason="TRITON_INTERPRET=1: nothing is lowered"),
]
TOKENS, SLOTS, HEADS, KV_HEADS, HEAD_DIM = 152, 11, 6, 2, 64


@pytest.fixture(autouse=True)
def on_a_hopper_card(monkeypatch):
    monkeypatch.setattr(calls, "_on_gpu", lambda: True)
    monkeypatch.setattr(calls, "_of_device", lambda: (9, 0))
    monkeypatch.delenv(calls.CAPABILITY_VARIABLE, raising=False)


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _specs(*leading):
    """query, key, value, depth_key, depth_value, segment_ids."""
    key = _array(*leading, TOKENS, KV_HEADS, HEAD_DIM)
    depth = _array(*leading, TOKENS, SLOTS, KV_HEADS, HEAD_DIM)
    query, segment_ids = _array(*leading, TOKENS, HEADS, HEAD_DIM), _array(*leading, TOKENS, dtype=jnp.int32)
    return query, key, key, depth, depth, segment_ids


def _gradients(query, key, value, depth_key, depth_value, segment_ids):
    def loss(*arrays):
        out = moda_attention(*arrays, segment_ids=segment_ids, implementation="triton")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(query, key, value, depth_key, depth_value)


def _lower(function, *specs) -> str:
    return jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


def _kernel_calls(text: str) -> list[str]:
    """The lines that start a kernel, without what is compiled into them."""
    lines = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    return [re.sub(r'backend_config = "[^"]*"', "", line) for line in lines]


def test_forward_and_gradients():
    started = _kernel_calls(_lower(_gradients, *_specs(1)))
    assert len(started) == 5
    # The depth backward adds its dquery to the sequence part's, in place.
    aliases = [re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d+)", line) for line in started]
    assert aliases == [[], [], [], [], [("0", "7")]]


def test_a_mapped_axis_is_folded_into_the_batch():
    started = _kernel_calls(_lower(jax.vmap(_gradients), *_specs(3, 2)))
    assert len(started) == 5
    assert all(f"tensor<6x{TOKENS}x{HEADS}x{HEAD_DIM}xbf16>" in line for line in started)


def test_depth_gradients_are_added_in_place_under_scan():
    query, key, _, depth, _, _ = _specs(1)
    statistics = _array(1, TOKENS, HEADS, dtype=jnp.float32)

    def layers(query, key, depth_key, depth_value, lse, buffers):
        def layer(buffers, length):
            call = Call(query, key, key, Mask(True), DepthKV(depth_key, depth_value, length=length), 0.125)
            *gradients, dk, dv = implementation.backward(call, Upstream(query, lse, lse), buffers)
            return (dk, dv), gradients

        return jax.lax.scan(layer, buffers, jnp.arange(SLOTS, 0, -1))

    for dtype in (jnp.bfloat16, jnp.float32):
        buffer = _array(*depth.shape, dtype=dtype)
        started = _kernel_calls(_lower(layers, query, key, depth, depth, statistics, (buffer, buffer)))
        found = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d+)", started[-1])
        assert found == [("0", "7"), ("1", "8"), ("2", "9")]


@pytest.mark.slow
def test_gradients_under_shard_map():
    """Batch over `data`, KV heads with their query heads over `tensor`: depth needs no collective."""
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, depth = P("data", None, "tensor"), P("data", None, None, "tensor")
    sharded = jax.shard_map(
        _gradients, mesh=mesh, in_specs=(heads, heads, heads, depth, depth, P("data")),
        out_specs=(heads, heads, heads, depth, depth), check_vma=False,
    )  # fmt: skip
    text = _lower(sharded, *_specs(4))
    started = _kernel_calls(text)
    assert len(started) == 5
    assert all(f"tensor<2x{TOKENS}x{HEADS // 2}x{HEAD_DIM}xbf16>" in line for line in started)
    assert not any(f"stablehlo.{op}" in text for op in ("all_reduce", "all_gather", "all_to_all", "collective_permute"))


@pytest.mark.slow
def test_a_models_gradients():
    """The layer loop's reverse scan carries the gradient buffers, to which the kernel adds in place."""
    config = TransformerConfig(
        vocab_size=128, num_layers=3, width=128, num_heads=4, num_kv_heads=2, head_dim=32, ffn_width=128,
        dtype="bfloat16", depth="moda", depth_ffn_kv=True, attention_implementation="triton",
    )  # fmt: skip
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    gradient = jax.grad(lambda state, tokens: jnp.mean(nnx.merge(graphdef, state)(tokens)))
    started = _kernel_calls(_lower(gradient, state, _array(2, 72, dtype=jnp.int32)))
    in_place = [line for line in started if len(re.findall("operand_index", line)) == 3]
    assert len(in_place) == 1  # of the stacked layers; the last one's backward makes the arrays


def test_an_older_cards_instructions_for_a_newer_card(monkeypatch):
    """MODA_TRITON_CAPABILITY: PTX of that capability, assembled for the card that is there."""
    from jax_triton import triton_lib

    made = []

    class Spy(triton_lib.triton_kernel_call_lib.TritonKernel):
        def __init__(self, name, warps, ctas, shared, ptx, ttir, capability):
            made.append((re.search(r"\.target (\w+)", ptx)[1], capability, "wgmma" in ptx))
            super().__init__(name, warps, ctas, shared, ptx, ttir, capability)

    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "TritonKernel", Spy)

    def forward(query, key):
        return moda_attention(query, key, key, causal=False, implementation="triton")

    query, key = _array(1, 256, 2, 64), _array(1, 256, 2, 64)
    for wanted, target, has_wgmma in ((None, "sm_90a", True), ("8.0", "sm_80", False)):
        if wanted:
            monkeypatch.setenv(calls.CAPABILITY_VARIABLE, wanted)
        monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
        _lower(lambda *x, wanted=wanted: forward(*x), query, key)
        assert made.pop() == (target, 90, has_wgmma)
    monkeypatch.setenv(calls.CAPABILITY_VARIABLE, "10.0")
    with pytest.raises(ValueError, match=r"MODA_TRITON_CAPABILITY=10\.0: this card has 9\.0 only"):
        _lower(lambda *x: forward(*x), query, key)
    monkeypatch.setenv(calls.CAPABILITY_VARIABLE, "ampere")
    with pytest.raises(ValueError, match="MODA_TRITON_CAPABILITY='ampere': expected a compute capability"):
        _lower(lambda *x: forward(*x), query, key)
