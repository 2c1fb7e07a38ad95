"""The mixture's kernels: interpreted with race detection, lowered for CUDA, and (marker `gpu`) run on the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from support.repeated_tokens import DIFFERENT, first_of_each, repeated

from pallas_kernels.mosaic_gpu import mixture, token_slots
from pallas_kernels.mosaic_gpu.mixture import mixture_backward, mixture_forward

EPSILON = 1e-3
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}  # relative L2 error of what is rounded to the dtype
on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]

# tokens, slots, filled, columns, dtype, dtype of the gradient
CASES = [
    (8, 5, 3, 256, jnp.bfloat16, jnp.float32),
    (4, 3, 3, 384, jnp.float16, jnp.float16),
    (4, 2, 0, 128, jnp.bfloat16, jnp.bfloat16),
]
LARGE = [
    (32768, 73, 73, 1024, jnp.bfloat16, jnp.bfloat16),
    (32768, 73, 36, 1024, jnp.bfloat16, jnp.bfloat16),
    (4096, 49, 48, 384, jnp.bfloat16, jnp.float32),
    (4100, 9, 1, 768, jnp.float16, jnp.float16),
    (64, 9, 0, 512, jnp.bfloat16, jnp.bfloat16),
    (20, 200, 199, 128, jnp.float16, jnp.float32),
]


def draw(tokens, slots, length, columns, dtype, gradient_dtype, seed=0):
    """hidden, direction, length, dresult, dhidden; what is not filled is NaN. See `repeated`."""
    rng = np.random.default_rng(seed)
    tokens, all_tokens = min(tokens, DIFFERENT), tokens
    hidden, dhidden = (rng.standard_normal((tokens, slots, columns), np.float32) for _ in range(2))
    hidden[:, length:] = dhidden[:, length:] = np.nan
    dresult = rng.standard_normal((tokens, columns), np.float32), rng.standard_normal(tokens, np.float32)
    arguments = (
        jnp.asarray(hidden, dtype), jnp.float32(2 / columns**0.5 * rng.standard_normal(columns)), jnp.int32(length),
        (jnp.asarray(dresult[0], dtype), jnp.asarray(dresult[1] / 4)), jnp.asarray(dhidden, gradient_dtype),
    )  # fmt: skip
    hidden, direction, length, dresult, dhidden = arguments
    hidden, dresult, dhidden = jax.tree.map(lambda x: repeated(x, all_tokens), (hidden, dresult, dhidden))
    return hidden, direction, length, dresult, dhidden


def oracle(hidden, direction, length, dresult, dhidden):
    """out, lse, ddirection, dhidden in float64, the filled slots alone; of the tokens that differ."""
    tokens = len(hidden)
    hidden, dhidden, *dresult = (x[:DIFFERENT] for x in (hidden, dhidden, *dresult))
    count = np.bincount(np.arange(tokens) % len(hidden))  # how often each of them stands there
    v, w, dout, dlse, before = (
        np.asarray(a, np.float64)
        for a in (hidden[:, :length], direction, *dresult, dhidden[:, :length])
    )  # fmt: skip
    inverse = 1 / np.sqrt(np.mean(v**2, axis=-1) + EPSILON)
    logits = (v @ w) * inverse
    lse = np.logaddexp.reduce(logits, axis=-1) if length else np.full(len(v), -np.inf)
    weights = np.exp(logits - lse[:, None]) if length else logits
    along = np.einsum("rd,rsd->rs", dout, v)
    dlogits = weights * (along - np.sum(weights * along, axis=1, keepdims=True) + dlse[:, None])
    normed = v * inverse[..., None]
    slope = dlogits * inverse
    dv = weights[..., None] * dout[:, None] + slope[..., None] * (
        w - normed * np.mean(normed * w, axis=-1, keepdims=True)
    )
    return np.einsum("rs,rsd->rd", weights, v), lse, np.einsum("r,rs,rsd->d", count, slope, v), before + dv


def run(case, **options):
    hidden, direction, length, dresult, dhidden = draw(*case)
    forward = functools.partial(mixture_forward, epsilon=EPSILON, **options)
    backward = functools.partial(mixture_backward, epsilon=EPSILON, **options)
    result = jax.jit(forward)(hidden, direction, length)
    return result, jax.jit(backward)(hidden, direction, length, result, dresult, dhidden)


def check(case):
    arguments, filled = draw(*case), case[2]
    (out, lse), (ddirection, dhidden) = run(case)
    assert (out.dtype, lse.dtype, ddirection.dtype, dhidden.dtype) == (case[4], jnp.float32, jnp.float32, case[5])
    want = oracle(arguments[0], arguments[1], filled, *arguments[3:])
    rounded = TOLERANCE[jnp.dtype(case[4]).name]
    sums = TOLERANCE.get(jnp.dtype(case[5]).name, rounded)
    got = *(first_of_each(x) for x in (out, lse)), ddirection, first_of_each(dhidden[:, :filled])
    # delta is of the rounded mixture: each term of ddirection is as exact as that, and they cancel in part.
    for name, a, b, tolerance in zip(
        ("out", "lse", "ddirection", "dhidden"), got, want, (rounded, 1e-5, 2 * rounded, sums), strict=True
    ):
        a = np.asarray(a, np.float64)
        if not filled:
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f"{name}: {error:.1e}"
    kept = np.asarray(first_of_each(dhidden[:, filled:]), np.float32)
    np.testing.assert_array_equal(kept, np.asarray(arguments[4][:DIFFERENT, filled:], np.float32), "not filled")
    return (out, lse), (ddirection, dhidden)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    check(case)
    if jax.default_backend() != "gpu":
        assert not gpu_callbacks.get_races().races_found


def test_more_tokens_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(mixture, "FORWARD_CTAS", 2)
    monkeypatch.setattr(mixture, "BACKWARD_CTAS", 2)
    check((20, 2, 2, 128, jnp.bfloat16, jnp.bfloat16))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_lowers_for_cuda(case):
    specs = _specs(case)
    forward = jax.jit(functools.partial(mixture_forward, epsilon=EPSILON, interpret=False))
    backward = jax.jit(functools.partial(mixture_backward, epsilon=EPSILON, interpret=False))
    hidden, direction, length, dresult, dhidden = specs
    text = forward.trace(hidden, direction, length).lower(lowering_platforms=("cuda",)).as_text()
    assert "moda_mixture_forward" in text
    text = backward.trace(hidden, direction, length, dresult, dresult, dhidden)
    assert "moda_mixture_backward" in text.lower(lowering_platforms=("cuda",)).as_text()


def _specs(case):
    tokens, slots, _, columns, dtype, gradient_dtype = case
    spec = jax.ShapeDtypeStruct
    result = spec((tokens, columns), dtype), spec((tokens,), jnp.float32)
    stream = (tokens, slots, columns)
    return (
        spec(stream, dtype), spec((columns,), jnp.float32), spec((), jnp.int32), result, spec(stream, gradient_dtype)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.float32, "tokens": 4, "columns": 256}, "float32: expected bfloat16"),
        (
            {"dtype": jnp.bfloat16, "tokens": 4, "columns": 2048},
            "2048 columns: expected a multiple of 128, at most 1024",
        ),
        ({"dtype": jnp.bfloat16, "tokens": 4, "columns": 320}, "320 columns: expected a multiple of 128"),
        ({"dtype": jnp.bfloat16, "tokens": 6, "columns": 256}, "6 tokens: expected a multiple of 4"),
    ],
)
def test_what_is_not_supported(options, message):
    with pytest.raises(NotImplementedError, match=message):
        token_slots.check_supported(**options)


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_the_gpu) for case in LARGE], ids=str)
def test_on_the_gpu(case):
    """Values, and the same bits again."""
    first = jax.tree.leaves(check(case))
    for a, b in zip(first, jax.tree.leaves(run(case)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
