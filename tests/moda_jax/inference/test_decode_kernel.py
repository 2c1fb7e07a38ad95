"""Decoding's attention by the sequence kernel, beside matrix products: interpreted on a CPU, and on the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import TransformerConfig
from moda_jax.inference import decode
from moda_jax.model.depth.stream import DepthStream
from pallas_kernels import dispatch

ON_GPU = jax.default_backend() == "gpu"


def operands(batch, kv_heads, group, capacity, slots, head_dim, seed=0):
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.bfloat16)

    query = draw(batch, 1, kv_heads * group, head_dim)
    own, depth = (
        tuple(draw(batch, 1, *shape) for _ in "kv") for shape in ((kv_heads, head_dim), (slots, kv_heads, head_dim))
    )
    cached = tuple(draw(batch, kv_heads, capacity, head_dim) for _ in "kv")
    beside = DepthStream(*depth, jnp.int32(slots - 1)).append(*own)
    return query, cached, beside


def check(batch, kv_heads, group, capacity, slots, head_dim, length, padded):
    """`length` places are filled; `padded`: the prompt begins at place 0 in row 0, at place 37 in the others."""
    query, cached, beside = operands(batch, kv_heads, group, capacity, slots, head_dim)
    start = jnp.where(jnp.arange(batch) == 0, 0, 37) if padded else None

    def attend(products, dtype=jnp.bfloat16):
        query_, cached_, (key, value) = jax.tree.map(
            lambda x: x.astype(dtype), (query, cached, (beside.key, beside.value))
        )
        beside_ = DepthStream(key, value, beside.length)
        return np.asarray(decode._attend(query_, *cached_, start, length, beside_, products)[0], np.float64)

    exact = attend("dot", jnp.float32)
    error = {name: np.linalg.norm(attend(name) - exact) / np.linalg.norm(exact) for name in ("dot", "kernel")}
    assert error["kernel"] < 2 * error["dot"], error
    assert 0 < error["dot"] < 2e-2


def test_the_kernel_form_computes_what_products_do(monkeypatch):
    monkeypatch.setattr(decode, "KERNEL_CTAS", 8)
    monkeypatch.setattr(decode, "KERNEL_PLACES", 64)
    assert decode._num_parts(4, 192) == 2
    if ON_GPU:
        pytest.skip("on the chip the next test does it")
    check(2, 2, 2, 192, 3, 64, length=150, padded=True)
    check(2, 2, 2, 192, 1, 64, length=64, padded=False)  # of the second part nothing is visible


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(3, 8, 2, 2176, 70, 64), (1, 2, 1, 640, 1, 128), (2, 4, 8, 1001, 5, 64)],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_the_kernel_form_on_the_chip(shape, padded):
    check(*shape, length=shape[3] - 129, padded=padded)
    check(*shape, length=38, padded=padded)  # of the last parts nothing is visible


def test_parts_fill_the_gpu_and_are_no_smaller_than_a_block():
    assert decode._num_parts(512, 2176) == 1
    assert decode._num_parts(64, 2176) == 8
    assert decode._num_parts(8, 2176) == 17  # 128 places each
    assert decode._num_parts(8, 2179) == 1  # a prime


@pytest.mark.parametrize(("layers", "dtype", "last"), [(5, "bfloat16", "kernel"), (258, "bfloat16", "reduce")])
def test_the_default_on_hopper(monkeypatch, layers, dtype, last):
    """The kernels, if they take the model: 257 layers that write two slots each are more slots than they do."""
    monkeypatch.setattr(decode, "_platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    config = TransformerConfig(
        num_layers=layers, width=128, num_heads=2, num_kv_heads=1, head_dim=64, dtype=dtype, depth="moda"
    )
    assert decode.available_products(config)[-1] == last


def test_float32_has_no_kernel_form():
    config = TransformerConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    assert "kernel" not in decode.available_products(config)
    query, cached, beside = (
        jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
        for tree in operands(1, 1, 1, 16, 2, 8)
    )
    with pytest.raises(NotImplementedError, match="dtype=float32"):
        decode._attend(query, *cached, None, 16, beside, "kernel")
