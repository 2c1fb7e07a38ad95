"""RMSNorm's backward kernel: interpreted with race detection, lowered for CUDA, and (marker `gpu`) run on the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.mosaic_gpu import norm_backward
from pallas_kernels.mosaic_gpu.norm_backward import rms_norm_backward

EPSILON = 1e-2
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}  # relative L2 error of dx, whose rounding is all there is
on_the_gpu = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]

# rows, shape of a row, dtype, rotated
CASES = [
    (7, (512,), jnp.bfloat16, False),
    (9, (8, 64), jnp.float16, True),
    (4, (16, 32), jnp.bfloat16, True),
    (37, (192,), jnp.bfloat16, False),
    (11, (384,), jnp.float16, False),
    (3, (2048,), jnp.bfloat16, False),
    (3, (16, 128), jnp.bfloat16, True),
]
LARGE = [
    (32768, (1024,), jnp.bfloat16, False),
    (32768, (16, 64), jnp.bfloat16, True),
    (32768, (8, 64), jnp.bfloat16, True),
    (4097, (768,), jnp.float16, False),
    (4751, (4, 256), jnp.float16, True),
    (999, (4, 128), jnp.bfloat16, True),
    (50001, (64,), jnp.bfloat16, False),
    (50001, (384,), jnp.float16, False),
    (8192, (2048,), jnp.bfloat16, False),
    (4095, (5120,), jnp.float16, False),
    (2048, (8192,), jnp.bfloat16, False),
    (8192, (16, 128), jnp.bfloat16, True),
    (4095, (64, 64), jnp.float16, True),
    (1024, (32, 256), jnp.bfloat16, True),
]


def draw(rows, shape, dtype, rotated, seed=0):
    """x, dy, scale, rotation."""
    rng = np.random.default_rng(seed)
    x, dy = (jnp.asarray(rng.standard_normal((rows, *shape)), dtype) for _ in range(2))
    scale = jnp.asarray(1 + rng.standard_normal(shape) / 4, jnp.float32)
    angle = rng.uniform(0, 7, (rows, shape[-1] // 2))
    return x, dy, scale, (jnp.float32(np.cos(angle)), jnp.float32(np.sin(angle))) if rotated else None


def oracle(x, dy, scale, rotation):
    """dx and dscale in float64, pairs as complex numbers."""
    x, dy, scale = (np.asarray(a, np.float64) for a in (x, dy, scale))
    if rotation is not None:
        half = x.shape[-1] // 2
        back = np.float64(rotation[0])[:, None] - 1j * np.float64(rotation[1])[:, None]
        turned = (dy[..., :half] + 1j * dy[..., half:]) * back
        dy = np.concatenate([turned.real, turned.imag], axis=-1)
    axes = tuple(range(1, x.ndim))
    r = 1 / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + EPSILON)
    g = scale * dy
    return r * (g - x * r * np.mean(g * x * r, axis=axes, keepdims=True)), np.sum(dy * x * r, axis=0)


def check(case):
    arguments = draw(*case)
    dx, dscale = rms_norm_backward(*arguments, epsilon=EPSILON)
    assert dx.dtype == case[2] and dscale.dtype == jnp.float32 and dscale.shape == case[1]
    for name, got, want, tolerance in zip(
        ("dx", "dscale"), (dx, dscale), oracle(*arguments), (TOLERANCE[jnp.dtype(case[2]).name], 1e-5), strict=True
    ):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < tolerance, f"{name}: {error:.1e}"
    return arguments, (dx, dscale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    check(case)
    if jax.default_backend() != "gpu":
        assert not gpu_callbacks.get_races().races_found


def test_more_rows_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(norm_backward, "CTAS", 2)
    check((21, (256,), jnp.bfloat16, False))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_lowers_for_cuda(case):
    specs = jax.eval_shape(lambda: draw(*case))
    run = jax.jit(functools.partial(rms_norm_backward, epsilon=EPSILON, interpret=False))
    assert "moda_rms_norm_backward" in run.trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.float32, "columns": 256}, "float32: expected bfloat16"),
        ({"dtype": jnp.bfloat16, "columns": 9216}, "9216 columns: expected 1 to 4 times 64, 128 or 256"),
        ({"dtype": jnp.bfloat16, "columns": 320}, "320 columns: .* or a multiple of 1024 up to 8192"),
        ({"dtype": jnp.bfloat16, "columns": 256, "rotated_dim": 64}, "256 columns: expected 512 or 1024"),
        ({"dtype": jnp.bfloat16, "columns": 960, "rotated_dim": 80}, "or a multiple of 2048"),
        ({"dtype": jnp.bfloat16, "columns": 1024, "rotated_dim": 16}, "head_dim=16: expected 32"),
    ],
)
def test_what_is_not_supported(options, message):
    with pytest.raises(NotImplementedError, match=message):
        norm_backward.check_supported(**options)


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_the_gpu) for case in LARGE], ids=str)
def test_on_the_gpu(case):
    arguments, first = check(case)
    again = rms_norm_backward(*arguments, epsilon=EPSILON)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again, strict=True))
