"""The op's contract with a cache: fewer queries than keys, at any places among them, of which some are filled."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.dense_attention import dense_attention
from support.tolerances import assert_close

from pallas_kernels import moda_attention

pytestmark = pytest.mark.usefixtures("small_blocks")
NAMES = (*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS)
PRIMALS = ("query", "key", "value", "depth_key", "depth_value")


class Case(NamedTuple):
    """One call. The first half of the slots is filled, rounded up; of the last row no key is, if lengths are given."""

    queries: int
    keys: int
    slots: int
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    causal: bool = True
    segments: bool = False
    lengths: bool = True

    @property
    def filled(self) -> int:
        return (self.slots + 1) // 2

    def __str__(self) -> str:
        words = [f"T{self.queries}of{self.keys}", f"S{self.slots}", f"G{self.group}", f"H{self.head_dim}", self.dtype]
        return "-".join(words + [name for name in ("causal", "segments", "lengths") if getattr(self, name)])


CASES = (
    Case(1, 70, 5, 3, 2, 2, 32, "float32"),
    Case(3, 47, 16, 2, 1, 1, 32, "float32", segments=True, lengths=False),
    Case(33, 33, 3, 2, 2, 1, 16, "float32"),
    Case(2, 41, 0, 2, 1, 3, 16, "float32", causal=False, segments=True),
    Case(1, 65, 0, 2, 1, 4, 64, "bfloat16"),
    Case(2, 64, 5, 3, 1, 1, 64, "float16", segments=True),
    Case(65, 129, 1, 2, 1, 3, 64, "bfloat16"),
    Case(1, 129, 72, 2, 2, 8, 128, "bfloat16", causal=False),
)
QUICK_CASES = {CASES[i] for i in (0, 1, 3, 5)}
INTERPRETED_MARKS = (pytest.mark.timeout(180, method="thread"),)  # see test_contract.py


def _runs() -> list:
    slow = {case: () if case in QUICK_CASES else (pytest.mark.slow,) for case in CASES}
    runs = [(name, case, slow[case]) for name in ("reference", "xla") for case in CASES]
    narrow = [case for case in CASES if case.dtype != "float32"]
    if jax.default_backend() == "gpu":
        runs += [(name, case, (pytest.mark.gpu,)) for name in ("mosaic_gpu", "triton") for case in narrow]
    elif os.environ.get("TRITON_INTERPRET") == "1":  # see test_contract.py
        runs += [("triton", case, ()) for case in narrow]
    else:
        runs += [("mosaic_gpu", case, (*INTERPRETED_MARKS, pytest.mark.slow)) for case in CASES[4:6]]
    return [pytest.param(name, case, id=f"{name}-{case}", marks=marks) for name, case, marks in runs]


@functools.cache
def _inputs(case: Case) -> dict:
    """The arrays, dout, dlse and the masks; unfilled slots and keys hold NaN."""
    draw = np.random.default_rng(CASES.index(case))
    dtype = jnp.dtype(case.dtype)
    heads = case.kv_heads * case.group
    query, key = (case.batch, case.queries, heads, case.head_dim), (case.batch, case.keys, case.kv_heads, case.head_dim)
    depth = (case.batch, case.queries, case.slots, *key[2:])
    shapes = dict(zip((*PRIMALS, "dout"), (query, key, key, depth, depth, query), strict=True))
    arrays = {name: draw.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    arrays["dlse"] = draw.standard_normal(query[:3]).astype(np.float32)
    for name in ("depth_key", "depth_value"):
        arrays[name][:, :, case.filled :] = np.nan
    lengths = np.append(draw.integers(case.queries, case.keys + 1, case.batch - 1), 0).astype(np.int32)
    if case.lengths:
        for name in ("key", "value"):
            arrays[name][np.arange(case.keys) >= lengths[:, None]] = np.nan
    first = np.maximum(lengths - case.queries, 0)[:, None]
    arrays["query_positions"] = (first + np.arange(case.queries)).astype(np.int32)
    arrays["query_positions"][-1] = draw.permutation(case.keys)[: case.queries]  # any places, in any order
    arrays["key_length"] = lengths if case.lengths else None
    arrays["segment_ids"] = np.sort(draw.integers(-2, 3, (case.batch, case.keys)), axis=1)[:, ::-1].astype(np.int32)
    if not case.segments:
        arrays["segment_ids"] = None
    return arrays


def _oracle_masks(case: Case) -> dict:
    arrays = _inputs(case)
    ids, positions = arrays["segment_ids"], arrays["query_positions"]
    return {
        "causal": case.causal, "query_positions": positions, "key_length": arrays["key_length"],
        "key_segment_ids": ids,
        "query_segment_ids": None if ids is None else np.take_along_axis(ids, positions, axis=1),
    }  # fmt: skip


@functools.cache
def _expected(case: Case) -> dict[str, np.ndarray]:
    arrays = {name: _inputs(case)[name] for name in (*PRIMALS, "dout", "dlse")}
    return attention_oracle.attention(
        **arrays, depth_length=case.filled, scale=case.head_dim**-0.5, **_oracle_masks(case)
    )


@functools.cache
def _dense(case: Case) -> dict[str, jax.Array] | None:
    """What XLA makes of the case in its own narrow dtype; rows that see nothing are left out of its error."""
    if case.dtype == "float32":
        return None
    arrays, masks, index = _inputs(case), _oracle_masks(case), np.arange(case.keys)
    visible = np.ones((case.batch, case.queries, case.keys), bool)
    if case.causal:
        visible &= index <= masks["query_positions"][:, :, None]
    if case.segments:
        visible &= masks["query_segment_ids"][:, :, None] == masks["key_segment_ids"][:, None]
    if case.lengths:
        visible &= (index < masks["key_length"][:, None])[:, None]
    filled = np.arange(case.slots) < case.filled
    primals = [np.where(np.isnan(x), np.zeros_like(x), x) for x in (arrays[name] for name in PRIMALS)]
    results, pullback = jax.vjp(
        lambda *args: dense_attention(*args, visible=visible, filled=filled, scale=case.head_dim**-0.5), *primals
    )
    results = *results, *pullback((jnp.asarray(arrays["dout"]), jnp.asarray(arrays["dlse"])))
    return {name: jnp.nan_to_num(x, neginf=-np.inf) for name, x in zip(NAMES, results, strict=True)}


def _run(implementation: str, case: Case) -> dict[str, jax.Array]:
    """out, lse and the five gradients, in one compiled function; the masks are traced."""
    arrays = dict(_inputs(case))
    primals = [arrays.pop(name) for name in PRIMALS]
    gradients = arrays.pop("dout"), arrays.pop("dlse")

    @jax.jit
    def run(primals, gradients, masks, depth_length):
        op = functools.partial(
            moda_attention, depth_length=depth_length, causal=case.causal, implementation=implementation,
            return_lse=True, **masks,
        )  # fmt: skip
        results, pullback = jax.vjp(op, *primals)
        return *results, *pullback(gradients)

    return dict(zip(NAMES, run(primals, gradients, arrays, jnp.int32(case.filled)), strict=True))


@pytest.mark.parametrize(("implementation", "case"), _runs())
def test_outputs_and_gradients_match_the_oracle(implementation, case):
    actual = _run(implementation, case)
    dtype = jnp.dtype(case.dtype)
    assert {name: array.dtype for name, array in actual.items()} == dict.fromkeys(NAMES, dtype) | {"lse": jnp.float32}
    assert_close(actual, _expected(case), dtype, _dense(case))
    if case.lengths:
        beyond = np.arange(case.keys) >= _inputs(case)["key_length"][:, None]
        for name in ("dkey", "dvalue"):
            assert not np.any(np.asarray(actual[name])[beyond]), f"{name} is not 0 beyond key_length"
    for name in ("ddepth_key", "ddepth_value"):
        assert not np.any(np.asarray(actual[name][:, :, case.filled :])), f"{name} is not 0 in unfilled slots"


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_one_query_at_a_time_is_the_whole_sequence(implementation):
    """A static cache that fills under one compilation gives what one call over all tokens gives."""
    draw = np.random.default_rng(0)
    tokens = 6
    query, key, value = (draw.standard_normal((2, tokens, n, 8)).astype(np.float32) for n in (4, 2, 2))
    depth = [draw.standard_normal((2, tokens, 3, 2, 8)).astype(np.float32) for _ in range(2)]
    whole = moda_attention(query, key, value, *depth, implementation=implementation)

    @jax.jit
    def step(t, key, value):
        one = [jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in (query, *depth)]
        place = jnp.broadcast_to(t, (2, 1)).astype(jnp.int32)
        return moda_attention(
            one[0], key, value, *one[1:], query_positions=place, key_length=place[:, 0] + 1,
            implementation=implementation,
        )  # fmt: skip

    for t in range(tokens):
        cache = [np.where(np.arange(tokens)[:, None, None] <= t, x, np.float32(np.nan)) for x in (key, value)]
        np.testing.assert_allclose(step(t, *cache), whole[:, t : t + 1], rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


def test_key_length_is_clipped_and_positions_may_lie_outside():
    """A position before the first key sees none; one behind the last sees all, and has the last key's segment."""
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((3, n, 1, 8)).astype(np.float32) for n in (1, 5, 5))
    ids = np.array([[1, 1, 2, 2, 2]] * 3, np.int32)
    positions = np.array([[-1], [9], [9]], np.int32)
    for implementation in ("reference", "xla"):
        out, lse = moda_attention(
            query, key, value, query_positions=positions, key_length=np.array([7, 9, -2], np.int32), segment_ids=ids,
            implementation=implementation, return_lse=True,
        )  # fmt: skip
        assert np.isneginf(np.asarray(lse))[:, 0, 0].tolist() == [True, False, True]
        assert not np.any(np.asarray(out)[[0, 2]])
        logits = key[1, 2:, 0] @ query[1, 0, 0] * 8**-0.5
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(out[1, 0, 0], weights @ value[1, 2:, 0], rtol=1e-5)
