"""The sequence kernels on the chip: values at larger shapes, bit-equal repeats, poisoned outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu.sequence.backward import sequence_backward
from pallas_kernels.mosaic_gpu.sequence.forward import sequence_forward
from pallas_kernels.operands import Call, Mask, Upstream
from pallas_kernels.parts import delta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

SCALE = 0.125


@functools.partial(jax.jit, static_argnames=("causal", "dtype"))
def dense(query, key, value, dout, rows, *, causal, dtype):
    """(out, lse, dquery, dkey, dvalue) of plain attention computed in `dtype`."""
    batch, query_tokens, heads, head_dim = query.shape
    key_tokens, kv_heads = key.shape[1:3]
    visible = jnp.ones((batch, query_tokens, key_tokens), bool)
    if causal:
        query_positions = rows.get("query_positions", jnp.arange(query_tokens)[None])
        visible &= rows.get("key_positions", jnp.arange(key_tokens)[None])[:, None] <= query_positions[:, :, None]
    if "query_segment_ids" in rows:
        visible &= rows["query_segment_ids"][:, :, None] == rows["key_segment_ids"][:, None]
    if "key_length" in rows:
        visible &= (jnp.arange(key_tokens) < rows["key_length"][:, None])[:, None]

    def forward(query, key, value):
        grouped = query.reshape(batch, query_tokens, kv_heads, heads // kv_heads, head_dim)
        logits = SCALE * jnp.einsum("btkgh,bukh->bkgtu", grouped, key, precision="highest")
        logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        p = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
        out = jnp.einsum("bkgtu,bukh->btkgh", p, value, precision="highest")
        return out.reshape(query.shape), lse.transpose(0, 3, 1, 2).reshape(query.shape[:3])

    (out, lse), pullback = jax.vjp(forward, *(x.astype(dtype) for x in (query, key, value)))
    return out, lse, *pullback((dout.astype(dtype), jnp.zeros_like(lse)))


@functools.partial(jax.jit, static_argnames=("causal",))
def kernels(query, key, value, dout, rows, *, causal):
    """(out, lse, dquery, dkey, dvalue) of the kernels."""
    call = Call(query, key, value, Mask(causal, **rows), scale=SCALE)
    part = sequence_forward(call)
    return *part[:2], *sequence_backward(call, Upstream(dout, part.lse, delta(dout, part)))


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    got, expected = np.where(np.isfinite(got), got, 0.0), np.where(np.isfinite(expected), expected, 0.0)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-4)


CASES = {
    # name: B, T, U, N, K, H, causal, masks, dtype
    "causal": (1, 1024, 1024, 4, 2, 64, True, (), jnp.bfloat16),
    "ragged": (2, 1021, 1021, 3, 1, 64, True, (), jnp.float16),
    "full": (1, 600, 777, 4, 2, 64, False, (), jnp.bfloat16),
    "key_length": (2, 500, 500, 2, 2, 64, False, ("key_length",), jnp.bfloat16),
    "segments": (1, 1000, 1000, 4, 1, 64, True, ("segments",), jnp.bfloat16),
    "positions": (1, 500, 700, 2, 1, 64, True, ("segments", "positions"), jnp.bfloat16),
    # Whole blocks and no diagonal: nothing but the rows says that a block has to be masked.
    "segments_whole_blocks": (1, 1536, 1536, 4, 2, 64, False, ("segments",), jnp.bfloat16),
    "segments_of_wide_heads": (1, 1024, 1024, 4, 2, 128, False, ("segments",), jnp.float16),
    "positions_whole_blocks": (1, 1536, 1536, 2, 1, 64, True, ("positions",), jnp.bfloat16),
    "key_length_whole_blocks": (2, 768, 768, 2, 1, 64, False, ("key_length",), jnp.float16),
    "segments_and_key_length": (2, 768, 1000, 2, 1, 64, False, ("segments", "key_length"), jnp.bfloat16),
    "head_dim_128": (1, 1000, 1000, 4, 2, 128, True, (), jnp.bfloat16),
    "long": (1, 8192, 8192, 2, 1, 64, True, (), jnp.bfloat16),
    "many_heads": (1, 2048, 2048, 64, 8, 64, True, (), jnp.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_on_the_gpu(name):
    batch, query_tokens, key_tokens, heads, kv_heads, head_dim, causal, masks, dtype = CASES[name]
    rng = np.random.default_rng(len(name))
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    query, dout = draw(batch, query_tokens, heads, head_dim), draw(batch, query_tokens, heads, head_dim)
    key, value = draw(batch, key_tokens, kv_heads, head_dim), draw(batch, key_tokens, kv_heads, head_dim)
    rows = {}
    if "segments" in masks:
        rows["query_segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (batch, query_tokens))), jnp.int32)
        rows["key_segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (batch, key_tokens))), jnp.int32)
    if "positions" in masks:
        rows["query_positions"] = jnp.asarray(rng.permutation(query_tokens)[None], jnp.int32)
        rows["key_positions"] = jnp.asarray(rng.permutation(key_tokens)[None], jnp.int32)
    if "key_length" in masks:
        rows["key_length"] = jnp.asarray([0, key_tokens // 2 + 3], jnp.int32)
    # Memory that the outputs will probably be given is full of NaN: an element that is never written shows.
    poison = [jnp.full(x.shape, jnp.nan, x.dtype) for x in (query, query, key, value)]
    jax.block_until_ready(poison)
    del poison
    got = jax.device_get(kernels(query, key, value, dout, rows, causal=causal))
    again = jax.device_get(kernels(query, key, value, dout, rows, causal=causal))
    exact = dense(query, key, value, dout, rows, causal=causal, dtype=jnp.float32)
    plain = dense(query, key, value, dout, rows, causal=causal, dtype=dtype)
    for label, x, y, wanted, rounded in zip(
        ("out", "lse", "dquery", "dkey", "dvalue"), got, again, exact, plain, strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=f"{label}: two runs differ")
        bound = (2.0 if label in ("out", "lse") else 3.0) * relative_error(rounded, wanted)
        assert relative_error(x, wanted) < bound, f"{label}: {relative_error(x, wanted):.2e}, allowed {bound:.2e}"
