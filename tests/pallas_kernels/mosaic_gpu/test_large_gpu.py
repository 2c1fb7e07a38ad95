"""The whole op on the chip at the lengths that are trained: against float32 on sampled heads, poisoned, repeated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.dense_attention import dense_attention
from support.tolerances import DENSE_FACTOR_GRADIENT, DENSE_FACTOR_OUTPUT, relative_error

from pallas_kernels import moda_attention

pytestmark = pytest.mark.gpu
NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "ddepth_key", "ddepth_value")


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens, N query heads on K, H, `filled` of S slots."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    filled: int
    causal: bool = True
    documents: int = 1
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        name = f"T{self.tokens}-N{self.heads}-K{self.kv_heads}-H{self.head_dim}-S{self.filled}of{self.slots}"
        return f"{name}-{'causal' if self.causal else 'full'}-documents{self.documents}-{self.dtype}"


CASES = (
    Case(16384, 16, 8, 64, 70, 35),
    Case(16384, 8, 4, 64, 64, 64, dtype="float16"),
    Case(16381, 4, 2, 128, 20, 19, documents=5),
    Case(8192, 16, 2, 64, 256, 250),
    Case(8190, 6, 2, 64, 3, 3, causal=False),
)


def draw(case: Case) -> dict[str, np.ndarray | jax.Array]:
    """The op's arrays; unfilled slots hold NaN."""
    keys = iter(jax.random.split(jax.random.key(case.tokens + case.slots), 7))
    heads, kv_heads, depth = (
        (1, case.tokens, *rest)
        for rest in ((case.heads, case.head_dim), (case.kv_heads, case.head_dim),
                     (case.slots, case.kv_heads, case.head_dim))
    )  # fmt: skip
    shapes = {"query": heads, "key": kv_heads, "value": kv_heads, "depth_key": depth, "depth_value": depth}
    arrays = {name: jax.random.normal(next(keys), shape, case.dtype) for name, shape in shapes.items()}
    for name in ("depth_key", "depth_value"):
        arrays[name] = arrays[name].at[:, :, case.filled :].set(jnp.nan)
    arrays["dout"] = jax.random.normal(next(keys), heads, case.dtype)
    arrays["dlse"] = jax.random.normal(next(keys), heads[:3], jnp.float32)
    return arrays


def op_and_gradients(case: Case, arrays: dict, segment_ids: jax.Array | None) -> tuple[jax.Array, ...]:
    """(out, lse, five gradients) of the public op; the number of filled slots is known at run time only."""

    @jax.jit
    def run(length, dout, dlse, *primals):
        def op(*primals):
            return moda_attention(
                *primals, depth_length=length, causal=case.causal, segment_ids=segment_ids,
                implementation="mosaic_gpu", return_lse=True,
            )  # fmt: skip

        results, pullback = jax.vjp(op, *primals)
        return *results, *pullback((dout, dlse))

    primals = (arrays[name] for name in ("query", "key", "value", "depth_key", "depth_value"))
    return run(jnp.int32(case.filled), arrays["dout"], arrays["dlse"], *primals)


def dense(case: Case, arrays: dict, segment_ids: jax.Array | None, kv_head: int, dtype: str) -> tuple[jax.Array, ...]:
    """The same for one KV head and its queries, by plain XLA in `dtype`."""
    group = case.heads // case.kv_heads
    own = slice(kv_head * group, (kv_head + 1) * group)
    query, dout, dlse = (arrays[name][:, :, own] for name in ("query", "dout", "dlse"))
    key, value = (arrays[name][:, :, kv_head : kv_head + 1] for name in ("key", "value"))
    depth = (arrays[name][:, :, : case.filled, kv_head : kv_head + 1] for name in ("depth_key", "depth_value"))

    # One query head at a time: the logits of one are 1 GB at T = 16384.
    @jax.jit
    def run(dout, dlse, *primals):
        visible = jnp.ones((1, case.tokens, case.tokens), bool)
        if case.causal:
            visible = jnp.tril(visible)
        if segment_ids is not None:
            visible &= segment_ids[:, :, None] == segment_ids[:, None]

        def op(*primals):
            return _dense(*primals, visible, case.head_dim**-0.5)

        results, pullback = jax.vjp(op, *primals)
        return *results, *pullback((dout, dlse))

    parts = []
    primals = [x.astype(dtype) for x in (key, value, *depth)]
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        for g in range(group):
            head = slice(g, g + 1)
            out = run(dout[:, :, head].astype(dtype), dlse[:, :, head], query[:, :, head].astype(dtype), *primals)
            parts.append(jax.device_get(out))
    joined = [np.concatenate([part[i] for part in parts], axis=2) for i in range(3)]
    summed = [sum(np.asarray(part[i], np.float64) for part in parts) for i in range(3, 7)]
    return *joined, *summed


def _dense(query, key, value, depth_key, depth_value, visible, scale):
    """`dense_attention` with a traced mask."""
    tokens = query.shape[1]
    sequence = jnp.einsum("btgh,buh->btgu", query, key[:, :, 0], preferred_element_type=jnp.float32)
    depth = jnp.einsum("btgh,btsh->btgs", query, depth_key[:, :, :, 0], preferred_element_type=jnp.float32)
    sequence = jnp.where(visible[:, :, None], sequence * scale, -jnp.inf)
    logits = jnp.concatenate([sequence, depth * scale], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    out = jnp.einsum("btgu,buh->btgh", weights[..., :tokens], value[:, :, 0], preferred_element_type=jnp.float32)
    out += jnp.einsum(
        "btgs,btsh->btgh", weights[..., tokens:], depth_value[:, :, :, 0], preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype), jax.nn.logsumexp(logits, axis=-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_op_at_training_lengths(case):
    arrays = draw(case)
    segment_ids = None
    if case.documents > 1:
        starts = np.random.default_rng(0).random((1, case.tokens)) < case.documents / case.tokens
        segment_ids = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    # Memory that the outputs will probably be given is full of NaN: an element that is never written shows.
    poison = [jnp.full_like(array, jnp.nan) for array in arrays.values()]
    jax.block_until_ready(poison)
    del poison
    got = op_and_gradients(case, arrays, segment_ids)
    again = op_and_gradients(case, arrays, segment_ids)
    for name, first, second in zip(NAMES, got, again, strict=True):
        assert jnp.array_equal(first, second), f"{name}: two runs differ"
        assert jnp.isfinite(first).all(), f"{name} is not finite everywhere"
    del again
    for name, gradient in zip(NAMES[5:], got[5:], strict=True):
        assert not jnp.any(gradient[:, :, case.filled :]), f"{name} is not 0 in unfilled slots"
    kv_head = case.kv_heads - 1
    exact = dense(case, arrays, segment_ids, kv_head, "float32")
    plain = dense(case, arrays, segment_ids, kv_head, case.dtype)
    group = case.heads // case.kv_heads
    queries, keys = slice(kv_head * group, None), slice(kv_head, kv_head + 1)
    sampled = [x[:, :, queries] for x in got[:3]] + [x[:, :, keys] for x in got[3:5]]
    sampled += [x[:, :, : case.filled, keys] for x in got[5:]]
    failures = []
    for name, x, wanted, rounded in zip(NAMES, sampled, exact, plain, strict=True):
        factor = DENSE_FACTOR_GRADIENT if name.startswith("d") else DENSE_FACTOR_OUTPUT
        error, bound = relative_error(x, wanted), max(1e-5, factor * relative_error(rounded, wanted))
        if not error <= bound:
            failures.append(f"{name}: relative error {error:.3g}, allowed {bound:.3g}")
    assert not failures, "\n".join(failures)


def test_the_traced_mask_computes_what_dense_attention_computes():
    """`_dense` against the shared dense computation, at a size where both are cheap."""
    case = Case(32, 2, 1, 64, 3, 3, dtype="float32")
    arrays = draw(case)
    visible = np.tril(np.ones((1, 32, 32), bool))
    names = ("query", "key", "value", "depth_key", "depth_value")
    expected = dense_attention(*(arrays[n] for n in names), visible=visible, filled=np.ones(3, bool), scale=0.125)
    actual = _dense(*(arrays[n] for n in names), jnp.asarray(visible), 0.125)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3)


def test_a_scan_that_keeps_the_output_runs_the_kernel_once():
    """XLA's dynamic-slice fusion must not clone the kernel to write the stacked output in place."""

    def layers(x, keys):
        def layer(x, key):
            out = moda_attention(x, key, key, implementation="mosaic_gpu")
            return jnp.tanh(out), out

        return jax.lax.scan(layer, x, keys)

    query = jnp.ones((1, 1024, 4, 64), jnp.bfloat16)
    text = jax.jit(layers).lower(query, jnp.ones((3, 1, 1024, 2, 64), jnp.bfloat16)).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "moda_sequence_forward" in line]
    assert len(calls) == 1, "\n".join(line[:200] for line in calls)
