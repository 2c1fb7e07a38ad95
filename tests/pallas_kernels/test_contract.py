"""The op's contract: every implementation against the float64 oracle, over a covering selection of cases.

In all cases every two values of two axes meet. The quick ones among them hold every value; the others are `slow`.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.attention_cases import AXES, Case, cases_of_every_value, covering_cases, make_inputs
from support.dense_attention import dense_attention
from support.tolerances import assert_close

from pallas_kernels import moda_attention

pytestmark = pytest.mark.usefixtures("small_blocks")
NAMES = (*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS)
CASES = covering_cases()
QUICK_CASES = cases_of_every_value(CASES)
# Kernels that also run under the interpreter, where there is no GPU. A case takes seconds there, hence few and small
# ones. A barrier that nobody signals blocks inside the runtime, and only the thread method gets out of that.
INTERPRETED = ("mosaic_gpu",)
SMALL_CASES = tuple(
    c for c in CASES if c.tokens <= 65 and c.slots <= 16 and c.group <= 4 and c.head_dim <= 64 and c.dtype != "float32"
)[:5]
# Triton's interpreter is for a whole process, and has a step of CI of its own. It takes about 20 ms for a token and KV
# head of the depth part, hence few tokens.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_MARKS = (pytest.mark.timeout(400, method="thread"),)
QUICK_INTERPRETED = SMALL_CASES[:1]


def _depth_tiles(case: Case) -> int:
    return case.batch * case.tokens * case.kv_heads if case.slots else 0


def _runs() -> list:
    """Every implementation that can run here, with its cases."""

    def slow_unless(quick: bool) -> tuple:
        return () if quick else (pytest.mark.slow,)

    runs = [(name, case, slow_unless(case in QUICK_CASES)) for name in ("reference", "xla") for case in CASES]
    if jax.default_backend() == "gpu":
        runs += [(name, case, (pytest.mark.gpu,)) for name in ("mosaic_gpu", "triton") for case in CASES]
    elif TRITON_INTERPRETED:
        runs += [("triton", case, ()) for case in CASES if case.dtype != "float32" and _depth_tiles(case) <= 100]
    else:
        runs += [
            (name, case, INTERPRETED_MARKS + slow_unless(case in QUICK_INTERPRETED))
            for name in INTERPRETED
            for case in SMALL_CASES
        ]
    return [pytest.param(name, case, id=f"{name}-{case}", marks=marks) for name, case, marks in runs]


@functools.cache
def _inputs(case: Case) -> dict:
    return make_inputs(case, seed=CASES.index(case))


@functools.cache
def _expected(case: Case) -> dict[str, np.ndarray]:
    arrays = dict(_inputs(case))
    segment_ids = arrays.pop("segment_ids")
    return attention_oracle.attention(
        **arrays, depth_length=case.filled, scale=_scale(case), causal=case.causal,
        query_segment_ids=segment_ids, key_segment_ids=segment_ids,
    )  # fmt: skip


@functools.cache
def _dense(case: Case) -> dict[str, jax.Array] | None:
    """What XLA makes of the case in its own narrow dtype."""
    if case.dtype == "float32":
        return None
    arrays = dict(_inputs(case))
    visible = np.tril(np.ones((case.tokens, case.tokens), bool)) if case.causal else True
    visible = np.broadcast_to(visible, (case.batch, case.tokens, case.tokens))
    if case.segments:
        visible = visible & (arrays["segment_ids"][:, :, None] == arrays["segment_ids"][:, None, :])
    filled = np.arange(case.slots) < case.filled
    primals = [arrays[name] for name in ("query", "key", "value", "depth_key", "depth_value")]
    primals[3:] = [np.where(filled[:, None, None], array, np.zeros_like(array)) for array in primals[3:]]

    @jax.jit
    def run(*primals):
        results, pullback = jax.vjp(
            lambda *args: dense_attention(*args, visible=visible, filled=filled, scale=_scale(case)), *primals
        )
        return *results, *pullback((jnp.asarray(arrays["dout"]), jnp.asarray(arrays["dlse"])))

    return dict(zip(NAMES, run(*primals), strict=True))


def _scale(case: Case) -> float:
    return case.head_dim**-0.5 if case.scale is None else case.scale


def _run(implementation: str, case: Case) -> dict[str, jax.Array]:
    """out, lse and the five gradients, in one compiled function."""
    arrays = _inputs(case)
    lengths = {"all": None, "int": case.filled, "traced": case.filled, "traced beyond": case.slots + 3}
    length = lengths[case.length]
    if "traced" in case.length:
        length = jnp.int32(length)

    def run(length, segment_ids, dout, dlse, *primals):
        def op(*primals):
            return moda_attention(
                *primals, depth_length=length, causal=case.causal, segment_ids=segment_ids, scale=case.scale,
                implementation=implementation, return_lse=True,
            )  # fmt: skip

        results, pullback = jax.vjp(op, *primals)
        return *results, *pullback((dout, dlse))

    if not isinstance(length, jax.Array):
        run = functools.partial(run, length)
        traced = ()
    else:
        traced = (length,)
    primals = (arrays[name] for name in ("query", "key", "value", "depth_key", "depth_value"))
    results = jax.jit(run)(*traced, arrays["segment_ids"], arrays["dout"], arrays["dlse"], *primals)
    return dict(zip(NAMES, results, strict=True))


@pytest.mark.parametrize(("implementation", "case"), _runs())
def test_outputs_and_gradients_match_the_oracle(implementation, case):
    try:
        actual = _run(implementation, case)
    except NotImplementedError as error:
        pytest.skip(f"{implementation} says: {error}")
    dtype = jnp.dtype(case.dtype)
    assert actual["lse"].dtype == jnp.float32
    assert {array.dtype for name, array in actual.items() if name != "lse"} == {dtype}
    assert_close(actual, _expected(case), dtype, _dense(case))
    for name in ("ddepth_key", "ddepth_value"):
        assert not np.any(np.asarray(actual[name][:, :, case.filled :])), f"{name} is not 0 in unfilled slots"


WINDOWED = Case(17, 18, 2, 64, True, False, "bfloat16", None, "all", 1, 1)
WINDOWS = ((5, 16, True), (17, 18, False), (9, 4, True))  # start, length, whether they are traced; the last is empty


@pytest.mark.parametrize(
    ("implementation", "window"),
    [("reference", WINDOWS[0])]
    + [("xla", window) for window in WINDOWS]
    + [pytest.param("mosaic_gpu", window, marks=(*INTERPRETED_MARKS, pytest.mark.slow)) for window in WINDOWS],
)
def test_a_window_of_slots_is_the_slots_that_it_holds(implementation, window):
    """`depth_start`: slots before it are as those from `depth_length` on, whatever they hold."""
    start, length, traced = window
    case = WINDOWED._replace(dtype="float32") if implementation != "mosaic_gpu" else WINDOWED
    arrays = make_inputs(case)
    del arrays["segment_ids"]
    inside = slice(start, max(start, length))
    held = {name: arrays[name][:, :, inside] for name in ("depth_key", "depth_value")}
    expected = attention_oracle.attention(**(arrays | held), scale=_scale(case), causal=True)
    outside = np.delete(np.arange(case.slots), inside)
    for name in ("depth_key", "depth_value"):
        arrays[name][:, :, outside] = np.nan
    ends = {"depth_start": start, "depth_length": length}
    given, fixed = ({name: jnp.int32(end) for name, end in ends.items()}, {}) if traced else ({}, ends)
    dout, dlse = arrays.pop("dout"), arrays.pop("dlse")

    @jax.jit
    def run(given, *primals):
        op = functools.partial(moda_attention, implementation=implementation, return_lse=True, **given, **fixed)
        results, pullback = jax.vjp(op, *primals)
        return *results, *pullback((dout, dlse))

    actual = dict(zip(NAMES, run(given, *arrays.values()), strict=True))
    for name in ("ddepth_key", "ddepth_value"):
        assert not np.any(np.asarray(actual[name][:, :, outside])), f"{name} is not 0 outside of the window"
        actual[name] = actual[name][:, :, inside]
    dense = None
    if case.dtype != "float32":
        primals = [arrays[name] for name in ("query", "key", "value")] + list(held.values())
        visible = np.tril(np.ones((1, case.tokens, case.tokens), bool))
        run_dense = functools.partial(
            dense_attention, visible=visible, filled=np.ones(max(length - start, 0), bool), scale=_scale(case)
        )
        results, pullback = jax.vjp(run_dense, *primals)
        dense = dict(zip(NAMES, (*results, *pullback((jnp.asarray(dout), jnp.asarray(dlse)))), strict=True))
    if not held["depth_key"].size:
        for name in ("ddepth_key", "ddepth_value"):
            assert actual.pop(name).size == expected.pop(name).size == 0
    assert_close(actual, expected, jnp.dtype(case.dtype), dense)


@pytest.mark.parametrize("cases", [CASES, QUICK_CASES], ids=["all", "quick"])
def test_the_selection_covers_every_value_of_every_axis(cases):
    for axis, values in enumerate(AXES):
        assert {case[axis] for case in cases} == set(values)
