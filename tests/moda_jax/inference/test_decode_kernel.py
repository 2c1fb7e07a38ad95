"""A decode step's attention over the cache by the kernels, beside XLA's: interpreted on a CPU, and on the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import TransformerConfig
from moda_jax.inference import decode
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.stream import DepthStream
from moda_jax.model.function import model_function, split_model
from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import warpgroup
from pallas_kernels.mosaic_gpu.sequence import split

ON_GPU = jax.default_backend() == "gpu"


def operands(batch, kv_heads, group, capacity, slots, head_dim):
    """A request, a cache, and a stream with room for the request's KV; without any for one slot."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.bfloat16)

    request = tuple(draw(batch, 1, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads))
    cached = tuple(draw(batch, kv_heads, capacity, head_dim) for _ in "kv")
    return request, cached, DepthStream(*(draw(batch, 1, slots, kv_heads, head_dim) for _ in "kv"), np.int32(slots - 1))


def attend(implementation, start, length, request, cached, stream):
    """[B, 1, N, H] of a token that reads `stream`, if that has room for an entry beside its own."""
    token = decode._Token(start, length, implementation)
    operation = SoftmaxAttention(reads_slots=stream.slots > 1)
    return token.attend(operation, request, stream, (), 0, (tuple((array,) for array in cached), None))[0]


def check(*shape, length, padded):
    """`length` places are filled; `padded`: the prompt begins at place 0 in row 0, at place 37 in the others."""
    arrays = operands(*shape)
    start = jnp.where(jnp.arange(shape[0]) == 0, 0, 37) if padded else None
    length = jnp.int32(length)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
    exact = np.asarray(attend("reference", start, length, *wide), np.float64)
    error = {}
    for name in ("xla", "mosaic_gpu"):
        came = np.asarray(attend(name, start, length, *arrays), np.float64)
        error[name] = np.linalg.norm(came - exact) / np.linalg.norm(exact)
    assert error["mosaic_gpu"] < 2 * error["xla"], error
    assert 0 < error["xla"] < 2e-2


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
def test_the_kernels_compute_what_products_do(monkeypatch):
    monkeypatch.setattr(split, "CTAS", 8)
    monkeypatch.setattr(split, "FEWEST_KEYS", 64)
    assert split.num_parts(4, 192) == 2
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
def test_the_kernels_on_the_chip(shape, padded):
    check(*shape, length=shape[3] - 129, padded=padded)
    check(*shape, length=38, padded=padded)  # of the last parts nothing is visible


def test_parts_fill_the_gpu_and_are_no_smaller_than_a_block():
    assert split.num_parts(512, 2176) == 1
    assert split.num_parts(64, 2176) == 8
    assert split.num_parts(8, 2176) == 17  # 128 places each
    assert split.num_parts(8, 2179) == 1  # a prime


def test_float32_is_refused_by_the_kernels():
    arrays = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands(1, 1, 1, 16, 2, 8)
    )
    with pytest.raises(NotImplementedError, match="dtype=float32"):
        attend("mosaic_gpu", None, jnp.int32(16), *arrays)


def test_a_step_on_hopper_runs_the_kernels(monkeypatch):
    """The small forward tile over the cache, and one more slot than the model writes: the token's own."""
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    config = TransformerConfig(
        num_layers=3, width=128, num_heads=2, num_kv_heads=1, head_dim=64, vocab_size=64, dtype="bfloat16", depth="moda"
    )
    params = jax.eval_shape(lambda: split_model(config, jax.random.key(0))[1])
    cache = jax.eval_shape(lambda: decode.KVCache.empty(config, 5, 192, None))
    tokens = jax.ShapeDtypeStruct((5,), jnp.int32)
    model = model_function(config)
    step = jax.jit(lambda params, *rest: decode._step(decode._module(model, params), params, *rest, None))
    text = step.trace(params, cache, tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert "moda_sequence_forward_T2_U192_N1_K1_H64_tiles_1x64x6x1" in text
    assert "moda_depth_forward_T5_S5_N2_K1_H64" in text
