"""The weighted sums' kernels: interpreted with race detection, lowered for CUDA, and (marker `gpu`) run on the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from support.repeated_tokens import DIFFERENT, first_of_each, repeated

from pallas_kernels.mosaic_gpu import weighted_sums
from pallas_kernels.mosaic_gpu.weighted_sums import sums_backward, sums_forward

TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}  # relative L2 error of what is rounded to the dtype
on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]

# tokens, slots, filled, sums, columns, dtype, dtype of the gradient
CASES = [
    (8, 5, 3, 2, 256, jnp.bfloat16, jnp.float32),
    (4, 3, 3, 4, 384, jnp.float16, jnp.float16),
    (4, 2, 0, 1, 128, jnp.bfloat16, jnp.bfloat16),
]
LARGE = [
    (32768, 37, 37, 4, 1024, jnp.bfloat16, jnp.bfloat16),
    (32768, 37, 20, 1, 1024, jnp.bfloat16, jnp.bfloat16),
    (4096, 25, 24, 4, 384, jnp.bfloat16, jnp.float32),
    (4100, 9, 1, 3, 768, jnp.float16, jnp.float16),
    (64, 9, 0, 2, 512, jnp.bfloat16, jnp.bfloat16),
]


def draw(tokens, slots, length, sums, columns, dtype, gradient_dtype, seed=0):
    """hidden, weights, length, dout, dhidden; what is not filled is NaN. See `repeated`."""
    rng = np.random.default_rng(seed)
    tokens, all_tokens = min(tokens, DIFFERENT), tokens
    hidden, dhidden = (rng.standard_normal((tokens, slots, columns), np.float32) for _ in range(2))
    weights = rng.standard_normal((tokens, sums, slots), np.float32)
    hidden[:, length:] = dhidden[:, length:] = weights[:, :, length:] = np.nan
    dout = rng.standard_normal((tokens, sums, columns), np.float32)
    arguments = (
        jnp.asarray(hidden, dtype), jnp.asarray(weights), jnp.int32(length), jnp.asarray(dout, dtype),
        jnp.asarray(dhidden, gradient_dtype),
    )  # fmt: skip
    return tuple(x if i == 2 else repeated(x, all_tokens) for i, x in enumerate(arguments))


def run(case):
    hidden, weights, length, dout, dhidden = draw(*case)
    return jax.jit(sums_forward)(hidden, weights, length), jax.jit(sums_backward)(
        hidden, weights, length, dout, dhidden
    )


def check(case):
    filled, arguments = case[2], draw(*case)
    out, (dweights, dhidden) = run(case)
    assert (out.dtype, dweights.dtype, dhidden.dtype) == (case[5], jnp.float32, case[6])
    v, a, dout, before = (
        np.asarray(x[:DIFFERENT], np.float64)
        for x in (arguments[0][:, :filled], arguments[1][:, :, :filled], arguments[3], arguments[4][:, :filled])
    )  # fmt: skip
    want = (
        np.einsum("rcs,rsd->rcd", a, v), np.einsum("rcd,rsd->rcs", dout, v), before + np.einsum("rcs,rcd->rsd", a, dout)
    )  # fmt: skip
    rounded = TOLERANCE[jnp.dtype(case[5]).name]
    sums = TOLERANCE.get(jnp.dtype(case[6]).name, 1e-5)
    got = out, dweights[:, :, :filled], dhidden[:, :filled]
    each = map(first_of_each, got)
    for name, x, y, tolerance in zip(("out", "dweights", "dhidden"), each, want, (rounded, 1e-5, sums), strict=True):
        x = np.asarray(x, np.float64)
        error = np.linalg.norm(x - y)
        assert error <= tolerance * np.linalg.norm(y), f"{name}: {error:.1e}"
    kept = np.asarray(first_of_each(dhidden[:, filled:]), np.float32)
    np.testing.assert_array_equal(kept, np.asarray(arguments[4][:DIFFERENT, filled:], np.float32), "not filled")
    return got


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    check(case)
    if jax.default_backend() != "gpu":
        assert not gpu_callbacks.get_races().races_found


def test_more_tokens_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(weighted_sums, "CTAS", 2)
    check((20, 2, 2, 1, 128, jnp.bfloat16, jnp.bfloat16))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_lowers_for_cuda(case):
    tokens, slots, _, sums, columns, dtype, gradient_dtype = case
    spec = jax.ShapeDtypeStruct
    stream, length = spec((tokens, slots, columns), dtype), spec((), jnp.int32)
    weights, dout = spec((tokens, sums, slots), jnp.float32), spec((tokens, sums, columns), dtype)
    for function, others in ((sums_forward, ()), (sums_backward, (dout, spec(stream.shape, gradient_dtype)))):
        traced = jax.jit(functools.partial(function, interpret=False)).trace(stream, weights, length, *others)
        assert f"moda_weighted_{function.__name__}_C{sums}" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_more_sums_than_fit_are_refused():
    with pytest.raises(NotImplementedError, match="5 sums: expected at most 4"):
        weighted_sums.check_sums(5)


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_the_gpu) for case in LARGE], ids=str)
def test_on_the_gpu(case):
    """Values, and the same bits again."""
    first = check(case)
    out, (dweights, dhidden) = run(case)
    for a, b in zip(first, (out, dweights[:, :, : case[2]], dhidden[:, : case[2]]), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
