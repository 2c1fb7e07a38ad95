"""The op at the ends of its numbers: logits far below and above zero, NaN in what a query does not attend to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.tolerances import relative_error

from pallas_kernels import depth_attention, moda_attention

pytestmark = pytest.mark.usefixtures("small_blocks")
IMPLEMENTATIONS = ("reference", "xla")
KERNEL_MARK = pytest.mark.gpu if jax.default_backend() == "gpu" else pytest.mark.timeout(180, method="thread")
T, S, H = 72, 3, 16
ERROR_PER_LSE = 4.0  # in 2^-24, relative; 0.9 to 1.8 were measured


def _far_logits(sign: float) -> tuple[np.ndarray, ...]:
    """One row, two heads; all logits are of about 1e32 and of one sign, and each token's largest stands far above the
    others: the first key of its document, or for every third token its second slot."""
    draw = np.random.default_rng(0)
    query, key = np.zeros((1, T, 2, H)), np.zeros((1, T, 1, H))
    depth_key = np.zeros((1, T, S, 1, H))
    query[..., 0] = 1e16
    key[..., 0], depth_key[..., 0] = -3e16, -3e16
    key[:, [0, 40], :, 0] = -1e16
    depth_key[:, ::3, 1, :, 0] = -0.5e16
    if sign > 0:
        key, depth_key = -1e32 / key[..., :1] * np.eye(1, H), -1e32 / depth_key[..., :1] * np.eye(1, H)
    values = draw.standard_normal((1, T, 1, H)), draw.standard_normal((1, T, S, 1, H))
    arrays = query, key, values[0], depth_key, values[1]
    return tuple(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in arrays)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finite_logits_of_any_size_count(implementation, sign):
    """A query is empty when nothing is visible to it, whatever its logits are."""
    arrays = _far_logits(sign)
    ids = jnp.asarray(np.repeat([[1, 2]], [40, T - 40], axis=1), jnp.int32)
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), arrays[0].dtype)
    expected = attention_oracle.attention(
        *arrays, scale=1.0, causal=True, query_segment_ids=ids, key_segment_ids=ids, dout=dout, dlse=np.zeros((1, T, 2))
    )

    @jax.jit
    def run(*arrays):
        op = functools.partial(
            moda_attention, segment_ids=ids, scale=1.0, return_lse=True, implementation=implementation
        )
        (out, lse), pullback = jax.vjp(op, *arrays)
        return out, lse, *pullback((dout, jnp.zeros_like(lse)))

    actual = dict(zip((*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS), run(*arrays), strict=True))
    for name in ("out", "lse", "dvalue", "ddepth_value"):  # the other gradients are 0 * 1e16
        error = relative_error(actual[name], expected[name])
        assert error < 1e-5, f"{name}: {error:.1e}"


@KERNEL_MARK
def test_the_kernel_takes_no_query_with_far_logits_for_an_empty_one():
    """Beyond 2^30 a kernel's exponents may leave their range: that is NaN, and never the 0 of a query without keys."""
    query, key, value = (jnp.tile(x[:, :64], (1, 1, 1, 4)).astype(jnp.bfloat16) for x in _far_logits(-1.0)[:3])
    ids = jnp.asarray(np.repeat([[1, 2]], [40, 24], axis=1), jnp.int32)
    out = moda_attention(query, key, value, segment_ids=ids, scale=0.25, implementation="mosaic_gpu")
    expected = attention_oracle.attention(
        query, key, value, scale=0.25, causal=True, query_segment_ids=ids, key_segment_ids=ids
    )["out"]  # fmt: skip
    out = np.asarray(out, np.float64)
    right = np.isclose(out, expected, rtol=1e-2).all(axis=-1)
    assert (right | np.isnan(out).any(axis=-1)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finite_logits_of_any_size_count_in_depth_attention(implementation):
    query, _, _, depth_key, depth_value = _far_logits(-1.0)
    depth_key = depth_key.at[:, :, 0].multiply(2)  # one largest logit, so that float64's own rounding does not matter
    expected = attention_oracle.attention(
        query, query[:, :0, :1], query[:, :0, :1], depth_key, depth_value, 2, scale=1.0, causal=False
    )
    out, lse = depth_attention(
        query, depth_key, depth_value, depth_length=2, scale=1.0, implementation=implementation, return_lse=True
    )
    assert relative_error(out, expected["out"]) < 1e-5
    assert relative_error(lse, expected["lse"]) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_error_grows_like_the_lse(implementation):
    """A shift of all logits by c changes no probability; what float32 makes of them is off by c 2^-24 and more."""
    draw = np.random.default_rng(0)
    shapes = (1, 64, 2, H), *2 * [(1, 64, 1, H)], *2 * [(1, 64, 8, 1, H)]
    arrays = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    dout, dlse = draw.standard_normal(shapes[0]).astype(np.float32), draw.standard_normal((1, 64, 2)).astype(np.float32)

    @jax.jit
    def run(*arrays):
        results, pullback = jax.vjp(
            lambda *a: moda_attention(*a, implementation=implementation, return_lse=True), *arrays
        )
        return *results, *pullback((dout, dlse))

    for shift in (0.0, 1e2, 1e4):
        for array in (arrays[0], arrays[1], arrays[3]):
            array[..., 0] = np.sqrt(shift * H**0.5)
        expected = attention_oracle.attention(*arrays, scale=H**-0.5, causal=True, dout=dout, dlse=dlse)
        names = (*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS)
        errors = {n: relative_error(x, expected[n]) for n, x in zip(names, run(*arrays), strict=True)}
        limit = ERROR_PER_LSE * max(np.abs(expected["lse"]).max(), 1.0) * 2.0**-24
        assert max(errors.values()) < limit, (shift, errors)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_a_nan_in_a_value_goes(implementation):
    """To all queries that see it; perhaps to earlier ones of its row and KV head; nowhere else."""
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, T, n, H)).astype(np.float32) for n in (4, 2, 2))
    depth = [draw.standard_normal((2, T, S, 2, H)).astype(np.float32) for _ in range(2)]
    clean = moda_attention(query, key, value, *depth, implementation=implementation)
    for name in ("key", "value"):
        arrays = {"key": key.copy(), "value": value.copy()}
        arrays[name][0, 50, 1, 3] = np.nan
        out = np.asarray(moda_attention(query, **arrays, depth_key=depth[0], depth_value=depth[1],
                                        implementation=implementation))  # fmt: skip
        assert np.isnan(out[0, 50:, 2:]).any(axis=-1).all(), name
        np.testing.assert_array_equal(out[1], clean[1])
        np.testing.assert_array_equal(out[0, :, :2], clean[0, :, :2])
        if name == "key":  # hidden logits are replaced before anything is made of them
            np.testing.assert_array_equal(out[0, :50], clean[0, :50])
    depth[1][0, 50, 1, 1, 3] = np.nan
    out = np.asarray(moda_attention(query, key, value, *depth, implementation=implementation))
    assert np.isnan(out[0, 50, 2:, 3]).all()
    rest = np.isnan(out).any(axis=-1)
    rest[0, 50, 2:] = False
    assert not rest.any()
