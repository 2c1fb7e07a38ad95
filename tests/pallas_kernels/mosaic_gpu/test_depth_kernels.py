"""The depth kernels: interpreted with race detection, lowered for CUDA, and (marker `gpu`) run on the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from support.selection import quick_first

from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import implementation
from pallas_kernels.mosaic_gpu.depth import tiles as depth_tiles
from pallas_kernels.mosaic_gpu.depth.backward import depth_backward
from pallas_kernels.mosaic_gpu.depth.forward import depth_forward
from pallas_kernels.mosaic_gpu.depth.tiles import DepthTiles
from pallas_kernels.mosaic_gpu.warpgroup import shared_bytes
from pallas_kernels.operands import Call, DepthKV, Upstream

SCALE = 0.3
TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3}  # relative L2 error against float64 on the rounded inputs


def draw(batch, tokens, num_heads, num_kv_heads, head_dim, slots, filled, dtype, seed=0, value_scale=1.0):
    """query, dout, depth_key, depth_value (NaN in slots that are not seen), lse, delta.

    `filled` is how many slots are seen from the first on, or the window (start, length) of those that are. `dtype` may
    be a pair: the queries', and the depth entries'.

    lse is that of the seen slots and of other, random keys. A random lse alone would not do: P > 1, which no softmax
    has, overflows float16 (seen on the chip: dS above 65504 and a dquery that is not finite).
    """
    dtype, entries = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    keys = jax.random.split(jax.random.key(seed), 6)
    heads = (batch, tokens, num_heads)
    query, dout = (jax.random.normal(k, (*heads, head_dim), dtype) for k in keys[:2])
    depth = [jax.random.normal(k, (batch, tokens, slots, num_kv_heads, head_dim), dtype) for k in keys[2:4]]
    depth[1] *= value_scale
    if entries != dtype:  # with small numbers among them, which are subnormal
        depth = [jnp.where(jnp.arange(head_dim) % 16 == 5, x * 2**-7, x).astype(entries) for x in depth]
    seen = window(filled)
    depth = [jnp.full_like(x, jnp.nan).at[:, :, seen].set(x[:, :, seen]) for x in depth]
    logits = np.einsum("btkgh,btskh->btkgs", grouped(query, num_kv_heads), wide(depth[0])[:, :, seen]) * SCALE
    others = np.asarray(jax.random.normal(keys[4], heads), np.float64) + 4
    lse = np.logaddexp(others, np.logaddexp.reduce(logits, axis=-1, initial=-np.inf).reshape(heads))
    return query, dout, *depth, jnp.asarray(lse, jnp.float32), jax.random.normal(keys[5], heads)


def window(filled):
    return slice(*filled) if isinstance(filled, tuple) else slice(0, filled)


def ends(filled):
    """(start, length) as the kernels take them, traced."""
    return tuple(map(jnp.int32, filled)) if isinstance(filled, tuple) else (None, jnp.int32(filled))


def forward(query, key, value, ends, **options):
    return depth_forward(Call(query, depth=DepthKV(key, value, *ends), scale=SCALE), **options)


def backward(query, key, value, ends, upstream, buffers=None, *, deferred=None, query_gradient=True, **options):
    call = Call(query, depth=DepthKV(key, value, *ends, deferred), scale=SCALE, query_gradient=query_gradient)
    return depth_backward(call, Upstream(*upstream), buffers, **options)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def grouped(x, num_kv_heads):
    x = wide(x)
    return x.reshape(*x.shape[:2], num_kv_heads, -1, *x.shape[3:])


def forward_oracle(query, key, value, filled):
    k, v = (wide(x)[:, :, window(filled)] for x in (key, value))
    if not k.shape[2]:
        return np.zeros(query.shape), np.full(query.shape[:3], -np.inf)
    logits = np.einsum("btkgh,btskh->btkgs", grouped(query, key.shape[3]), k) * SCALE
    peak = logits.max(-1, keepdims=True)
    p = np.exp(logits - peak)
    total = p.sum(-1, keepdims=True)
    out = np.einsum("btkgs,btskh->btkgh", p / total, v)
    return out.reshape(query.shape), (np.log(total) + peak).reshape(query.shape[:3])


def backward_oracle(query, dout, key, value, lse, delta, filled):
    kv_heads = key.shape[3]
    q, do, lse, delta = (grouped(x, kv_heads) for x in (query, dout, lse, delta))
    k, v = (wide(x)[:, :, window(filled)] for x in (key, value))
    p = np.exp(np.einsum("btkgh,btskh->btkgs", q, k) * SCALE - lse[..., None])
    ds = p * (np.einsum("btkgh,btskh->btkgs", do, v) - delta[..., None])
    dk, dv = np.zeros(key.shape), np.zeros(key.shape)
    dk[:, :, window(filled)] = np.einsum("btkgs,btkgh->btskh", ds, q) * SCALE
    dv[:, :, window(filled)] = np.einsum("btkgs,btkgh->btskh", p, do)
    return (np.einsum("btkgs,btskh->btkgh", ds, k) * SCALE).reshape(query.shape), dk, dv


def check(name, got, want, dtype):
    got, dtype = wide(got), dtype[0] if isinstance(dtype, tuple) else dtype
    assert np.isfinite(got).all(), f"{name} is not finite at {np.argwhere(~np.isfinite(got))[0]}"
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    worst = np.unravel_index(np.abs(got - want).argmax(), want.shape)
    assert error < TOLERANCE[jnp.dtype(dtype).name], f"{name}: relative error {error:.1e}, worst at {worst}"


def check_races():
    if jax.default_backend() != "gpu":
        assert not gpu_callbacks.get_races().races_found


FLOAT8 = jnp.float8_e4m3fn
# B, T, N, K, H, S, filled, dtype, tiles of the forward
FORWARD = [
    (1, 5, 4, 2, 64, 5, 5, jnp.bfloat16, None),
    (1, 3, 2, 2, 64, 40, 37, jnp.float16, None),
    (2, 3, 3, 3, 32, 20, 18, jnp.float16, DepthTiles(16, 3, 1)),
    (1, 2, 17, 1, 64, 33, 2, jnp.bfloat16, None),
    (1, 3, 4, 2, 64, 40, (3, 37), jnp.bfloat16, None),
    (1, 3, 2, 2, 64, 20, (17, 17), jnp.float16, None),
    (1, 5, 4, 4, 64, 20, (5, 13), jnp.bfloat16, DepthTiles(16, 2, 1)),
    (1, 3, 4, 2, 64, 60, (10, 50), jnp.float16, DepthTiles(32, 2, 1)),
    (1, 2, 12, 1, 256, 18, 17, jnp.bfloat16, None),
    (1, 5, 4, 2, 64, 40, (3, 37), (jnp.float16, FLOAT8), None),
    (1, 3, 4, 2, 128, 20, 17, (jnp.bfloat16, FLOAT8), None),
]
LARGE_FORWARD = [
    (1, 1024, 16, 8, 64, 64, 64, jnp.bfloat16, None),
    (1, 777, 64, 8, 64, 70, 37, jnp.bfloat16, None),
    (2, 513, 16, 8, 128, 130, 129, jnp.float16, None),
    (1, 129, 34, 1, 80, 40, 40, jnp.float16, None),
    (1, 65, 64, 2, 64, 512, 511, jnp.bfloat16, None),
    (1, 333, 4, 4, 8, 35, 18, jnp.float16, None),
    (1, 777, 16, 8, 64, 70, (5, 37), jnp.bfloat16, None),
    (2, 129, 16, 8, 128, 130, (100, 129), jnp.float16, None),
    (1, 333, 4, 4, 40, 16, (9, 16), jnp.bfloat16, None),
    (1, 777, 16, 8, 64, 70, (29, 37), jnp.bfloat16, None),
    (1, 333, 16, 8, 64, 70, (0, 5), jnp.bfloat16, DepthTiles(32, 2, 3)),
    (1, 333, 16, 8, 256, 70, 37, jnp.bfloat16, None),
    (1, 129, 24, 1, 136, 40, (3, 39), jnp.float16, None),
    (1, 777, 16, 8, 64, 70, 37, (jnp.bfloat16, FLOAT8), None),
    (1, 777, 64, 8, 64, 70, (5, 70), (jnp.float16, FLOAT8), None),
    (2, 129, 16, 8, 128, 130, 129, (jnp.bfloat16, FLOAT8), None),
    (1, 333, 34, 1, 64, 16, 16, (jnp.bfloat16, FLOAT8), None),
]


def run_forward(case):
    *dims, slots, filled, dtype, tiles = case
    # Values of 8 bits are nearly all subnormal here: if they were flushed to zero nothing would be left.
    query, _, key, value, *_ = draw(*dims, slots, filled, dtype, value_scale=2**-8 if isinstance(dtype, tuple) else 1)
    run = jax.jit(lambda *arrays: forward(*arrays, tiles=tiles)[:2])
    out, lse = run(query, key, value, ends(filled))
    want, want_lse = forward_oracle(query, key, value, filled)
    check("out", out, want, dtype)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4, err_msg="lse")
    return run, (query, key, value, ends(filled)), (out, lse)


@pytest.mark.parametrize("case", quick_first(FORWARD, 2), ids=str)
def test_forward(case):
    run_forward(case)
    check_races()


def test_forward_without_filled_slots():
    query, _, key, value, *_ = draw(1, 3, 2, 2, 64, 16, 0, jnp.bfloat16)
    out, lse, _ = forward(query, key, value, (None, 0))
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()
    out, lse, _ = forward(query, key[:, :, :0], value[:, :, :0], (None, None))
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


# B, T, N, K, H, S, filled, dtype, dtype of the buffers, whether dquery is given, tiles
BACKWARD = [
    (1, 5, 4, 2, 64, 5, 5, jnp.bfloat16, None, False, None),
    (1, 3, 4, 4, 64, 40, 37, jnp.float16, jnp.float16, True, DepthTiles(32, 2, 1)),
    (1, 3, 4, 4, 64, 18, 7, jnp.bfloat16, None, True, DepthTiles(16, 3, 1)),
    (2, 3, 3, 3, 32, 20, 18, jnp.bfloat16, jnp.float32, True, None),
    (1, 2, 20, 1, 64, 18, 0, jnp.float16, None, False, None),
    (1, 3, 4, 2, 64, 40, (3, 37), jnp.bfloat16, None, False, None),
    (1, 3, 4, 4, 64, 20, (17, 19), jnp.float16, jnp.float16, True, DepthTiles(16, 2, 1)),
    (1, 3, 2, 2, 64, 18, (2, 17), jnp.bfloat16, jnp.float32, False, None),
    (1, 5, 4, 4, 64, 20, (5, 13), jnp.bfloat16, jnp.bfloat16, False, DepthTiles(16, 2, 1)),
    (1, 3, 4, 2, 64, 60, (10, 50), jnp.float16, None, True, DepthTiles(32, 2, 1)),
    (1, 2, 2, 2, 256, 18, 17, jnp.bfloat16, jnp.bfloat16, True, None),
    (1, 2, 12, 1, 160, 17, 17, jnp.float16, None, False, None),
    (1, 3, 4, 2, 64, 40, 37, (jnp.bfloat16, FLOAT8), jnp.bfloat16, True, None),
    (1, 3, 4, 4, 64, 20, (3, 19), (jnp.float16, FLOAT8), None, False, None),
    (1, 2, 2, 2, 128, 18, 17, (jnp.bfloat16, FLOAT8), jnp.float32, True, None),
]
LARGE_BACKWARD = [
    (1, 1024, 16, 8, 64, 64, 64, jnp.bfloat16, None, False, None),
    (1, 777, 64, 8, 64, 70, 37, jnp.bfloat16, None, True, None),
    (2, 513, 16, 8, 64, 70, 70, jnp.bfloat16, jnp.bfloat16, False, None),
    (2, 100, 16, 8, 128, 130, 129, jnp.float16, jnp.float16, True, None),
    (1, 129, 34, 1, 80, 40, 39, jnp.float16, None, False, None),
    (2, 333, 16, 8, 64, 70, 51, jnp.bfloat16, jnp.float32, False, None),
    (1, 65, 32, 2, 128, 64, 50, jnp.bfloat16, jnp.float32, True, None),
    (1, 333, 4, 4, 8, 35, 18, jnp.float16, None, True, None),
    (1, 1024, 16, 8, 64, 64, 50, jnp.bfloat16, None, True, DepthTiles(32, 3, 1)),
    (1, 777, 16, 8, 64, 70, 51, jnp.bfloat16, jnp.bfloat16, True, DepthTiles(16, 3, 2)),
    (1, 333, 16, 8, 128, 70, 51, jnp.bfloat16, jnp.float32, True, DepthTiles(16, 2, 1)),
    (1, 50, 16, 8, 64, 64, 0, jnp.bfloat16, None, False, None),
    (1, 777, 16, 8, 64, 70, (5, 37), jnp.bfloat16, None, True, None),
    (1, 777, 16, 8, 64, 70, (40, 70), jnp.bfloat16, jnp.bfloat16, False, None),
    (1, 777, 16, 8, 64, 70, (29, 37), jnp.bfloat16, jnp.bfloat16, True, None),
    (1, 333, 16, 8, 64, 70, (5, 29), jnp.bfloat16, jnp.bfloat16, False, DepthTiles(32, 2, 1)),
    (1, 333, 16, 8, 128, 70, (33, 51), jnp.float16, jnp.float32, True, DepthTiles(16, 2, 1)),
    (1, 50, 16, 8, 64, 64, (30, 30), jnp.bfloat16, None, False, None),
    (1, 333, 16, 8, 256, 70, 51, jnp.bfloat16, None, True, None),
    (1, 333, 16, 8, 256, 70, 51, jnp.bfloat16, jnp.bfloat16, True, None),
    (1, 129, 24, 1, 136, 70, (5, 37), jnp.float16, jnp.float32, False, None),
    (2, 513, 16, 8, 64, 70, 70, (jnp.bfloat16, FLOAT8), jnp.bfloat16, False, None),
    (1, 777, 64, 8, 64, 70, (5, 37), (jnp.float16, FLOAT8), None, True, None),
    (2, 100, 16, 8, 128, 130, 129, (jnp.bfloat16, FLOAT8), jnp.float32, True, None),
]


# As above, then: the first slot that gets a gradient (None: not deferred), whether the query's gradient is wanted.
DEFERRED = [
    (1, 3, 4, 2, 64, 40, 37, jnp.bfloat16, jnp.bfloat16, True, None, 33, True),
    (1, 3, 2, 2, 64, 18, (2, 17), jnp.bfloat16, jnp.float32, False, None, 9, True),
    (1, 3, 4, 4, 64, 20, 18, jnp.float16, jnp.float16, True, DepthTiles(16, 2, 1), 18, True),
    (1, 2, 20, 1, 64, 18, 17, jnp.bfloat16, jnp.bfloat16, True, None, 2, True),
    (1, 3, 16, 2, 64, 40, 33, jnp.bfloat16, jnp.bfloat16, False, None, None, False),
    (1, 2, 20, 1, 64, 18, 17, jnp.float16, jnp.float32, True, None, 3, False),
    (1, 3, 4, 2, 64, 40, 37, (jnp.bfloat16, FLOAT8), jnp.bfloat16, True, None, 33, True),
    (1, 3, 16, 2, 64, 40, 33, (jnp.float16, FLOAT8), jnp.float16, False, None, None, False),
    (1, 3, 2, 2, 128, 18, (2, 17), (jnp.bfloat16, FLOAT8), jnp.float32, False, None, 9, True),
]
LARGE_DEFERRED = [
    (2, 513, 16, 8, 64, 70, 70, jnp.bfloat16, jnp.bfloat16, True, None, 64, True),
    (1, 777, 16, 8, 64, 70, 6, jnp.bfloat16, jnp.bfloat16, True, None, 0, True),
    (1, 777, 16, 8, 64, 70, 40, jnp.bfloat16, jnp.bfloat16, True, DepthTiles(16, 3, 3), 40, True),
    (1, 1024, 16, 8, 64, 70, (5, 51), jnp.float16, jnp.float16, False, DepthTiles(32, 2, 2), 30, True),
    (2, 333, 16, 8, 64, 70, 51, jnp.bfloat16, jnp.float32, True, None, 45, True),
    (2, 100, 16, 4, 128, 130, 129, jnp.float16, jnp.float16, True, None, 120, True),
    (1, 333, 16, 8, 256, 70, 51, jnp.bfloat16, jnp.bfloat16, True, None, 45, True),
    (2, 513, 64, 8, 64, 70, 64, jnp.bfloat16, jnp.bfloat16, False, None, None, False),
    (1, 129, 48, 1, 80, 70, 40, jnp.bfloat16, jnp.float32, False, None, None, False),
    (1, 129, 64, 4, 64, 70, 0, jnp.bfloat16, jnp.bfloat16, False, None, None, False),
    (2, 513, 16, 8, 64, 70, 70, (jnp.bfloat16, FLOAT8), jnp.bfloat16, True, None, 64, True),
    (2, 513, 64, 8, 64, 70, 64, (jnp.bfloat16, FLOAT8), jnp.bfloat16, False, None, None, False),
    (1, 777, 16, 8, 64, 70, (5, 51), (jnp.float16, FLOAT8), jnp.float16, False, None, 30, True),
    (2, 100, 16, 4, 128, 130, 129, (jnp.bfloat16, FLOAT8), jnp.bfloat16, True, None, 120, True),
    (2, 333, 16, 8, 64, 70, 51, (jnp.bfloat16, FLOAT8), jnp.float32, True, None, 45, True),
]


def run_backward(case):
    *dims, slots, filled, dtype, buffer_dtype, adds, tiles = case[:11]
    deferred, wanted = case[11:] or (None, True)
    query, dout, key, value, lse, delta = draw(*dims, slots, filled, dtype, seed=1)
    rng = np.random.default_rng(3)
    buffers = None
    if buffer_dtype is not None:
        buffers = [jnp.asarray(rng.standard_normal(key.shape), buffer_dtype) for _ in range(2)]
    added = jnp.asarray(rng.standard_normal(query.shape), query.dtype) if adds else None

    @jax.jit
    def run(query, key, value, filled, dout, lse, delta, buffers, added):
        return backward(
            query, key, value, filled, (dout, lse, delta), buffers, tiles=tiles, dquery=added,
            deferred=None if deferred is None else jnp.int32(deferred), query_gradient=wanted,
        )  # fmt: skip

    arguments = (query, key, value, ends(filled), dout, lse, delta, buffers, added)
    returned = got = run(*arguments)
    want = list(backward_oracle(query, dout, key, value, lse, delta, filled))
    if adds:
        want[0] += wide(added)
    if not wanted:
        assert got[0] is None
        got, want[0] = (jnp.zeros_like(query), *got[1:]), np.zeros(query.shape)
    hidden = np.delete(np.arange(slots), window(filled))
    if deferred is not None:
        hidden = np.union1d(hidden, np.arange(deferred))
        for x in want[1:]:
            x[:, :, :deferred] = 0
    for i in range(2):
        before = np.zeros(key.shape) if buffers is None else wide(buffers[i])
        want[1 + i] += before
        np.testing.assert_array_equal(wide(got[1 + i])[:, :, hidden], before[:, :, hidden])
    for name, x, y in zip(("dquery", "ddepth_key", "ddepth_value"), got, want, strict=True):
        check(name, x, y, dtype)
    assert {x.dtype for x in got[1:]} == {jnp.dtype(query.dtype if buffers is None else buffer_dtype)}
    return run, arguments, returned


@pytest.mark.parametrize("case", quick_first(BACKWARD, 2), ids=str)
def test_backward(case):
    run_backward(case)
    check_races()


@pytest.mark.parametrize("case", quick_first(DEFERRED, 2), ids=str)
def test_deferred_gradients(case):
    run_backward(case)
    check_races()


def test_deferred_gradients_need_buffers_for_the_others():
    query, dout, key, value, *rows = draw(1, 2, 2, 2, 64, 16, 16, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="deferred, but no buffers"):
        backward(query, key, value, (None, 16), (dout, *rows), deferred=8)


WIDE_OR_NARROW = [(8, 70, 64), (1, 16, 64), (32, 256, 128), (3, 5, 40), (2, 70, 256), (12, 20, 136)]


@pytest.mark.parametrize(
    ("group", "slots", "head_dim"),
    [(2, 12, 64), *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE_OR_NARROW)],
)
def test_every_kernel_lowers_for_cuda(group, slots, head_dim):
    dtype, batch, tokens, kv_heads = jnp.bfloat16, 2, 47, 4
    heads, depth = (batch, tokens, kv_heads * group), (batch, tokens, slots, kv_heads, head_dim)
    query = jax.ShapeDtypeStruct((*heads, head_dim), dtype)
    rows = jax.ShapeDtypeStruct(heads, jnp.float32)
    array, filled = jax.ShapeDtypeStruct(depth, dtype), jax.ShapeDtypeStruct((), jnp.int32)

    def lower(f, *arguments):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    windows = ((None, filled), (filled, filled))
    for ends in windows:
        run = functools.partial(forward, interpret=False)
        assert "moda_depth_forward" in lower(run, query, array, array, ends)
        lower(functools.partial(run, with_rest=True), query, array, array, ends)
    for gradient_dtype, name in ((None, ""), (dtype, "_accumulate"), (jnp.float32, "_accumulate_float32")):
        buffers = None if gradient_dtype is None else (jax.ShapeDtypeStruct(depth, gradient_dtype),) * 2
        run = functools.partial(backward, interpret=False)
        for ends in windows:
            text = lower(run, query, array, array, ends, (query, rows, rows), buffers)
            assert f"moda_depth_backward{name}_T" in text
        if buffers is not None:
            arguments = query, array, array, windows[0], (query, rows, rows), buffers
            text = lower(functools.partial(run, deferred=3), *arguments)
            assert f"moda_depth_backward{name}_deferred_T" in text
            text = lower(functools.partial(run, query_gradient=False), *arguments)
            assert f"moda_depth_backward{name}_slots_T" in text


def test_the_kernels_of_a_step_with_entries_of_8_bits_lower_for_cuda():
    heads, depth = (2, 47, 4), (2, 47, 12, 2, 64)
    query, rows = jax.ShapeDtypeStruct((*heads, 64), jnp.bfloat16), jax.ShapeDtypeStruct(heads, jnp.float32)
    entries, buffer = jax.ShapeDtypeStruct(depth, FLOAT8), jax.ShapeDtypeStruct(depth, jnp.bfloat16)
    ends = None, jax.ShapeDtypeStruct((), jnp.int32)

    def step(query, key, value, ends, *arguments):
        out = forward(query, key, value, ends, interpret=False)
        run = functools.partial(backward, query, key, value, ends, *arguments, interpret=False)
        return out, run(deferred=3), run(query_gradient=False)

    traced = jax.jit(step).trace(query, entries, entries, ends, (query, rows, rows), (buffer, buffer))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("forward", "backward_accumulate_deferred", "backward_accumulate_slots"):
        assert f"moda_depth_{name}_T94_S12_N4_K2_H64_float8_tiles" in text


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"dtype": jnp.float32}, "dtype=float32"),
        ({"head_dim": 258}, "head_dim=258: expected an even number up to 256"),
        ({"head_dim": 61}, "head_dim=61"),
        ({"slots": 513}, "513 depth slots"),
        ({"entries": FLOAT8, "head_dim": 32}, r"head_dim=32 with depth entries in float8_e4m3fn: expected one of"),
        ({"entries": jnp.float32}, "depth entries in float32: expected bfloat16, the query's, or float8_e4m3fn"),
    ],
)
def test_what_is_not_taken(facts, message):
    def check(dtype=jnp.bfloat16, head_dim=64, slots=8, entries=None):
        query = jax.ShapeDtypeStruct((1, 1, 4, head_dim), dtype)
        depth = jax.ShapeDtypeStruct((1, 1, slots, 2, head_dim), dtype if entries is None else entries)
        implementation.check_supported(Call(query, depth=DepthKV(depth, depth)))

    check()
    with pytest.raises(NotImplementedError, match=message):
        check(**facts)


@pytest.mark.parametrize(
    ("group", "head_dim", "slots", "expected"),
    [(2, 64, 70, 4), (1, 64, 46, 4), (4, 128, 35, 4), (8, 64, 70, 1), (2, 256, 70, 4), (4, 256, 70, 1), (2, 64, 16, 1)],
)
def test_calls_go_together_whose_heads_fit_into_a_tile(group, head_dim, slots, expected, monkeypatch):
    monkeypatch.setattr(implementation, "MOST_TOGETHER", 4)
    depth = jax.ShapeDtypeStruct((2, 16, slots, 3, head_dim), jnp.bfloat16)
    call = Call(jax.ShapeDtypeStruct((2, 16, 3 * group, head_dim), jnp.bfloat16), depth=DepthKV(depth, depth))
    assert dispatch.gradient_group("mosaic_gpu", call) == expected
    assert dispatch.gradient_group("xla", call) == 1


def test_tiles_that_do_not_fit_are_refused_with_shape_and_tiles():
    query, dout, key, value, lse, delta = draw(1, 2, 2, 2, 64, 16, 16, jnp.bfloat16)
    tiles = depth_tiles.DepthTiles(256, 8, 1)
    with pytest.raises(
        ValueError, match=r"depth forward: DepthTiles\(rows=256.*DepthShape\(tokens=2.* bytes of shared"
    ):
        forward(query, key, value, (None, 16), tiles=tiles)
    with pytest.raises(
        ValueError, match=r"depth backward: DepthTiles\(rows=256.*DepthShape\(tokens=2.* bytes of shared"
    ):
        backward(query, key, value, (None, 16), (dout, lse, delta), tiles=tiles)


def test_tiles_fit_for_every_shape():
    """And a multiprocessor loads one chunk while it works on another, of the same block or of another one."""
    for head_dim, narrow in [*((size, False) for size in (8, 64, 80, 128, 136, 256)), (64, True), (128, True)]:
        most, stages = depth_tiles.most_heads(head_dim), 2 if head_dim <= 128 else 1
        for group in (1, 2, 3, 5, 8, 16, 32):
            for slots in (1, 16, 70, 512):
                heads = depth_tiles.tile_heads(group, most)
                shape = depth_tiles.DepthShape(100, slots, 2 * group, 2, head_dim, heads, narrow)
                tiles = depth_tiles.forward_tiles(shape)
                scratch = depth_tiles.forward_scratch(shape, tiles, jnp.bfloat16)
                assert (
                    tiles.stages >= stages and tiles.blocks * shared_bytes(scratch) <= depth_tiles.MAX_SHARED_BYTES
                ), shape
                kinds = (depth_tiles.FRESH, depth_tiles.SMALL_BUFFERS, depth_tiles.FLOAT_BUFFERS)
                for kind, deferred in [*((kind, False) for kind in kinds), (depth_tiles.SMALL_BUFFERS, True)]:
                    tiles = depth_tiles.backward_tiles(shape, kind, deferred=deferred)
                    scratch = depth_tiles.backward_scratch(shape, tiles, jnp.bfloat16, kind, deferred)
                    needed = tiles.blocks * shared_bytes(scratch)
                    assert tiles.stages * tiles.blocks >= stages and needed <= depth_tiles.MAX_SHARED_BYTES, (
                        shape,
                        kind,
                    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE_FORWARD, ids=str)
def test_forward_on_the_chip(case):
    run, arguments, first = run_forward(case)
    poison = [jnp.full(arguments[0].shape, jnp.nan, jnp.bfloat16) for _ in range(3)]
    jax.block_until_ready(poison)
    del poison
    for a, b in zip(first, run(*arguments), strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*LARGE_BACKWARD, *LARGE_DEFERRED], ids=str)
def test_backward_on_the_chip(case):
    run, arguments, first = run_backward(case)
    poison = [jnp.full(arguments[1].shape, jnp.nan, jnp.bfloat16) for _ in range(4)]
    jax.block_until_ready(poison)
    del poison
    again = run(*arguments)  # which may be without the query's gradient
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))


@pytest.mark.gpu
def test_buffers_are_accumulated_in_place():
    query, dout, key, value, lse, delta = draw(1, 4096, 16, 8, 64, 70, 70, jnp.bfloat16)
    buffers = (jnp.zeros_like(key), jnp.zeros_like(value))

    def layers(query, dout, key, value, lse, delta, buffers):
        def layer(carry, filled):
            upstream = dout, lse, delta
            dq, dk, dv = backward(query, key, value, (None, filled), upstream, carry[1:], dquery=carry[0])
            return (dq, dk, dv), None

        return jax.lax.scan(layer, (jnp.zeros_like(query), *buffers), jnp.arange(70, 0, -10))[0]

    compiled = jax.jit(layers, donate_argnums=6).lower(query, dout, key, value, lse, delta, buffers).compile()
    dims = ",".join(map(str, key.shape))
    copies = [line for line in compiled.as_text().splitlines() if " copy" in line and f"[{dims}]" in line]
    assert not copies, copies
    assert compiled.memory_analysis().temp_size_in_bytes < key.nbytes / 4
