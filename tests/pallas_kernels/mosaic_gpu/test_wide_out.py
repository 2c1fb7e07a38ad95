"""`with_rest`: what delta = rowsum(dout * out) needs where a softmax is peaked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import implementation
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.parts import delta

DTYPE = jnp.bfloat16
SCALE = 0.125


def peaked(tokens, heads, kv_heads, head_dim):
    """query, ..., depth_value, dout: an even token gives its own sequence key 0.998 and its two depth slots the rest,
    equally; an odd one gives almost all to the two slots."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    key = draw(1, tokens, kv_heads, head_dim)
    unit = key / np.square(key).sum(-1, keepdims=True)
    query = np.repeat(7.0 / SCALE * unit, heads // kv_heads, axis=2)  # logit 7 with its own key
    query[:, 1::2] *= -1
    depth_key, depth_value = np.zeros((1, tokens, 2, kv_heads, head_dim)), draw(1, tokens, 2, kv_heads, head_dim)
    arrays = query, key, draw(1, tokens, kv_heads, head_dim), depth_key, depth_value, draw(*query.shape)
    return tuple(jnp.asarray(x, DTYPE) for x in arrays)


def oracle(query, key, value, depth_key, depth_value, dout):
    """float64 (out, dquery, dkey, ddepth_key) when segments let every token see itself alone."""
    q, k, v, dk, dv, do = (
        np.asarray(x.astype(jnp.float32), np.float64)[0] for x in (query, key, value, depth_key, depth_value, dout)
    )
    group = q.shape[1] // k.shape[1]
    keys, values = (  # [3, T, N, H]
        np.repeat(np.stack([x, *y.swapaxes(0, 1)]), group, axis=2) for x, y in ((k, dk), (v, dv))
    )
    logits = SCALE * (q * keys).sum(-1)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=0))[..., None]
    out = (p * values).sum(0)
    ds = SCALE * p * (do * (values - out)).sum(-1, keepdims=True)
    dkeys = (ds * q).reshape(3, len(q), -1, group, q.shape[-1]).sum(3)
    return out, (ds * keys).sum(0), dkeys[0], dkeys[1:].swapaxes(0, 1)


def errors(with_rest, arrays):
    """Relative L2 errors of out, dquery, dkey, ddepth_key, and out itself."""
    tokens = arrays[0].shape[1]
    segments = jnp.arange(tokens, dtype=jnp.int32)[None]
    mask = Mask(True, query_segment_ids=segments, key_segment_ids=segments)

    @jax.jit
    def run(query, key, value, depth_key, depth_value, dout):
        call = Call(query, key, value, mask, DepthKV(depth_key, depth_value), SCALE)
        part = implementation.forward(call, with_rest=with_rest)
        upstream = Upstream(dout, part.lse, delta(dout, part))
        dquery, dkey, _, ddepth_key, _ = implementation.backward(call, upstream)
        out = part.wide
        return out, dquery, dkey, ddepth_key

    got = run(*arrays)
    wide = [np.asarray(x.astype(jnp.float32), np.float64)[0] for x in got]
    return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(wide, oracle(*arrays), strict=True)]


def check(*shape):
    arrays = peaked(*shape)
    narrow, wide = errors(False, arrays), errors(True, arrays)
    assert wide[0] < 1e-4 < narrow[0], (wide, narrow)
    assert max(wide[1:]) < 1e-2, wide
    assert narrow[2] > 0.1, "this case should be one where it matters"


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_gradients_of_a_peaked_softmax():
    check(9, 2, 1, 64)


@pytest.mark.timeout(300)
def test_depth_forward_alone():
    query, *_, depth_key, depth_value, _ = peaked(5, 2, 1, 64)
    call = Call(query, depth=DepthKV(depth_key, depth_value), scale=SCALE)
    out, lse, rest = implementation.forward(call, with_rest=True)
    assert out.dtype == rest.dtype == DTYPE
    assert lse.dtype == jnp.float32
    out = out.astype(jnp.float32) + rest.astype(jnp.float32)
    mean = depth_value.astype(jnp.float32).mean(2)
    np.testing.assert_allclose(out, jnp.repeat(mean, 2, axis=2), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 4, 2, 64), (1000, 6, 2, 128), (129, 3, 3, 40), (9, 2, 1, 64)])
def test_gradients_of_a_peaked_softmax_on_the_chip(shape):
    check(*shape)
