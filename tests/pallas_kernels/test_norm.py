"""RMSNorm's backward: XLA's formula against autodiff, and which implementation serves a call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, norm


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("rotated", "shape", "normed_axes"),
    [(False, (2, 3, 32), 1), (True, (2, 3, 4, 8), 2), (False, (2, 3, 4, 8), 1), (True, (2, 3, 4, 8), 1)],
    ids=["width", "all heads, rotated", "per head", "per head, rotated"],
)
def test_xla_equals_autodiff(rotated, shape, normed_axes):
    x, dy, scale = draw(*shape), draw(*shape, seed=1), draw(*shape[-normed_axes:], seed=2)
    angle = draw(2, 3, 4, seed=3)
    rotation = (jnp.cos(angle), jnp.sin(angle)) if rotated else None

    def forward(x, scale):
        y = scale * x * norm.inverse_rms(x, tuple(range(-scale.ndim, 0)), 0.1)
        return y if rotation is None else norm.rotate(y, *rotation)

    got = norm.rms_norm_backward(x, dy, scale, rotation, epsilon=0.1, implementation="xla")
    for a, b in zip(got, jax.vjp(forward, x, scale)[1](dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_kernel_and_xla_agree():
    x, dy = (draw(2, 3, 8, 64, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    rotation = tuple(draw(2, 3, 32, seed=seed) for seed in (2, 3))
    one, other = (
        norm.rms_norm_backward(x, dy, jnp.ones((8, 64)), rotation, epsilon=0.1, implementation=name)
        for name in norm.IMPLEMENTATIONS
    )
    np.testing.assert_allclose(one[0].astype(jnp.float32), other[0].astype(jnp.float32), atol=2e-2)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "rotated", "reason"),
    [(24, False, "24 columns: expected 1 to 4 times 64"), (64, True, "64 columns: expected 512 or 1024")],
)
def test_the_kernel_refuses_heads_that_do_not_fill_its_blocks(head_dim, rotated, reason, monkeypatch, caplog):
    x = draw(3, 5, 2, head_dim).astype(jnp.bfloat16)  # rows that the heads do not divide
    rotation = (jnp.ones((3, 5, head_dim // 2)),) * 2 if rotated else None
    arguments = x, x, jnp.ones(head_dim), rotation
    with pytest.raises(NotImplementedError, match=reason):
        norm.rms_norm_backward(*arguments, epsilon=0.1, implementation="mosaic_gpu")
    norm._best.cache_clear()
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))
    with caplog.at_level("INFO", logger="pallas_kernels"):
        chosen = norm.rms_norm_backward(*arguments, epsilon=0.1)
    norm._best.cache_clear()
    assert reason in caplog.text
    expected = norm.rms_norm_backward(*arguments, epsilon=0.1, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


def test_the_choice(monkeypatch, caplog):
    norm._best.cache_clear()
    assert norm._best(jnp.dtype("bfloat16"), 1024, None) == "xla"  # no Hopper here
    norm._best.cache_clear()
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))
    with caplog.at_level("INFO", logger="pallas_kernels"):
        chosen = [norm._best(jnp.dtype(dtype), 1024, 64) for dtype in ("bfloat16", "float32")]
        others = [norm._best(jnp.dtype("bfloat16"), columns, None) for columns in (192, 2048, 1100)]
    norm._best.cache_clear()
    assert chosen == ["mosaic_gpu", "xla"]
    assert others == ["mosaic_gpu", "mosaic_gpu", "xla"]
    assert "1100 columns" in caplog.text
    assert "dtype=float32" in caplog.text
    with pytest.raises(ValueError, match="expected None or one of"):
        norm.rms_norm_backward(draw(1, 2, 4), draw(1, 2, 4), jnp.ones(4), epsilon=0.1, implementation="triton")


def test_a_model_without_attention_kernels_has_none_for_its_norms():
    assert [norm.beside(name) for name in (None, "mosaic_gpu", "xla", "reference")] == [None, None, "xla", "xla"]
