"""Whatever is wrong with a call is a ValueError that names the argument, never an error from inside JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import depth_attention, moda_attention, validation

B, T, S, N, K, H = 2, 3, 4, 4, 2, 8
ARRAYS = ("query", "key", "value", "depth_key", "depth_value")
SHAPES = dict(zip(ARRAYS, [(B, T, N, H), *2 * [(B, T, K, H)], *2 * [(B, T, S, K, H)]], strict=True))
DEPTH_ARRAYS = ("query", "depth_key", "depth_value")


def _arguments(names=ARRAYS, dtype=np.float32) -> dict:
    return {name: np.zeros(SHAPES[name], dtype) for name in names}


def _calls(arguments: dict):
    """The ops that take all of `arguments`."""
    yield lambda: moda_attention(**arguments)
    if not {"segment_ids", "causal", "query_positions", "key_length"} & set(arguments):
        yield lambda: depth_attention(**{k: v for k, v in arguments.items() if k not in ("key", "value")})


def _assert_refused(arguments: dict, *names: str, ops: str = "both") -> None:
    """A ValueError whose message begins with one of `names`, from both ops or from `moda_attention` alone."""
    for call in list(_calls(arguments))[: 1 if ops == "moda" else 2]:
        with pytest.raises(ValueError) as caught:
            call()
        message = str(caught.value)
        assert message.split()[0].split("=")[0] in names, message
        assert "expected" in message


names_of_arrays = st.sampled_from(ARRAYS)


@given(names_of_arrays, st.integers(0, 4), st.booleans())
def test_wrong_rank(name, axis, add):
    arguments = _arguments()
    axis = min(axis, arguments[name].ndim - 1)
    arguments[name] = np.expand_dims(arguments[name], axis) if add else arguments[name].take(0, axis)
    _assert_refused(arguments, name, "depth_value" if name == "depth_key" else name, ops="moda")


@given(names_of_arrays, st.integers(0, 4), st.integers(0, 9))
def test_wrong_size(name, axis, size):
    """The message names the array, or the first one that no longer goes with it; then it tells both shapes."""
    arguments = _arguments()
    shape = list(arguments[name].shape)
    axis = min(axis, len(shape) - 1)
    if shape[axis] == size:
        return
    shape[axis] = size
    heads_still_divide = name == "query" and axis == 2 and size > 0 and size % K == 0
    if heads_still_divide:
        return
    arguments[name] = np.zeros(shape, np.float32)
    follows = {"query": ("query", "key"), "key": ("key", "value"), "depth_key": ("depth_key", "depth_value")}
    _assert_refused(arguments, *follows.get(name, (name,)), ops="moda")


@given(st.sampled_from(DEPTH_ARRAYS), st.integers(0, 4), st.integers(0, 9))
def test_wrong_size_for_depth_attention(name, axis, size):
    arguments = _arguments(DEPTH_ARRAYS)
    shape = list(arguments[name].shape)
    axis = min(axis, len(shape) - 1)
    if shape[axis] == size or (name == "query" and axis == 2 and size > 0 and size % K == 0):
        return
    shape[axis] = size
    arguments[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"^(query|depth_key|depth_value) has .*expected"):
        depth_attention(**arguments)


@given(names_of_arrays, st.sampled_from(["float64", "int32", "bool", "complex64", "bfloat16", "float16"]))
def test_wrong_dtype(name, dtype):
    arguments = _arguments()
    arguments[name] = arguments[name].astype(jnp.dtype(dtype))
    _assert_refused(arguments, *(("query", "key") if name == "query" else (name,)), ops="moda")


@given(names_of_arrays, st.sampled_from([None, 1.0, "q", [[1.0]], object()]))
def test_not_an_array(name, value):
    if value is None and name in ("depth_key", "depth_value"):
        return
    _assert_refused(_arguments() | {name: value}, name, ops="moda")


@given(st.integers(1, 12), st.integers(1, 12))
def test_heads_that_do_not_divide(heads, kv_heads):
    if heads % kv_heads == 0:
        return
    query, key = np.zeros((B, T, heads, H), np.float32), np.zeros((B, T, kv_heads, H), np.float32)
    depth = np.zeros((B, T, S, kv_heads, H), np.float32)
    with pytest.raises(ValueError, match=rf"key has {kv_heads} heads: expected a divisor of query's {heads}"):
        moda_attention(query, key, key)
    with pytest.raises(ValueError, match=rf"depth_key has {kv_heads} heads: expected a divisor of query's {heads}"):
        depth_attention(query, depth, depth)


@pytest.mark.parametrize("name", ["depth_key", "depth_value"])
def test_one_depth_array_without_the_other(name):
    _assert_refused(_arguments() | {name: None}, name)


bad_lengths = st.one_of(
    st.integers(max_value=-1), st.integers(min_value=S + 1), st.booleans(), st.floats(), st.text(max_size=3),
    st.sampled_from([np.int64(S + 1), np.int32(-1), np.bool_(True), np.array([1], np.int32), np.array(1.0), [1], (1,)]),
    st.sampled_from(["int64", "uint32", "int8", "float32", "bool"]).map(lambda dtype: np.ones((), dtype)),
)  # fmt: skip


@given(st.sampled_from(["depth_length", "depth_start"]), bad_lengths)
def test_bad_depth_length_and_start(name, number):
    _assert_refused(_arguments() | {name: number}, name)


@pytest.mark.parametrize("name", ["depth_length", "depth_start"])
def test_depth_length_and_start_of_a_call_without_depth(name):
    arguments = _arguments(("query", "key", "value"))
    _assert_refused(arguments | {name: 1}, name, ops="moda")
    assert moda_attention(**arguments, **{name: 0}).shape == (B, T, N, H)


def test_good_depth_lengths():
    for length in (0, 3, S, np.int64(3), np.uint8(3)):
        checked = validation.checked_slots("depth_length", length, S)
        assert checked == length and type(checked) is int
    for length, clipped in ((-1, 0), (0, 0), (3, 3), (9, S)):
        for array in (jnp.int32(length), np.array(length, np.int32)):
            assert validation.checked_slots("depth_length", array, S) == clipped
        assert jax.jit(lambda length: validation.checked_slots("depth_length", length, S))(jnp.int32(length)) == clipped
    assert validation.checked_slots("depth_length", None, S) is None


@given(
    st.one_of(
        st.lists(st.integers(0, 5), max_size=3).map(tuple).filter(lambda shape: shape != (B, T)).map(np.zeros),
        st.sampled_from(["float32", "int64", "uint32", "int16", "bool"]).map(lambda dtype: np.ones((B, T), dtype)),
        st.sampled_from(["abc", 0, [[0, 0, 0], [0, 0, 0]]]),
    )
)
def test_bad_segment_ids(ids):
    _assert_refused(_arguments() | {"segment_ids": ids}, "segment_ids", ops="moda")


@given(
    st.sampled_from([("query_positions", (B, T)), ("key_length", (B,))]),
    st.one_of(
        st.lists(st.integers(0, 5), max_size=3).map(tuple).map(lambda shape: np.zeros(shape, np.int32)),
        st.sampled_from(["float32", "int64", "uint32", "int16", "bool"]),
        st.sampled_from([3, [[0, 1, 2], [0, 1, 2]], [3, 3], "abc"]),
    ),
)
def test_bad_query_positions_and_key_length(argument, value):
    name, shape = argument
    if isinstance(value, str) and value != "abc":
        value = np.zeros(shape, value)
    if isinstance(value, np.ndarray) and value.shape == shape and value.dtype == np.int32:
        return
    _assert_refused(_arguments() | {name: value}, name, ops="moda")


def test_more_keys_than_queries_need_positions_and_fewer_are_refused():
    arguments = _arguments() | {name: np.zeros((B, T + 2, K, H), np.float32) for name in ("key", "value")}
    with pytest.raises(ValueError, match=r"^key has shape \(2, 5, 2, 8\): expected .* 3 tokens, or query_positions"):
        moda_attention(**arguments)
    with pytest.raises(ValueError, match=r"^key has shape \(2, 5, 2, 8\): expected .* 3 tokens, or query_positions"):
        moda_attention(**arguments, causal=False, key_length=np.ones(B, np.int32))
    arguments["query_positions"] = np.zeros((B, T), np.int32)
    assert moda_attention(**arguments).shape == (B, T, N, H)
    _assert_refused(arguments | {"segment_ids": np.zeros((B, T), np.int32)}, "segment_ids", ops="moda")
    _assert_refused(arguments | {"query_positions": np.zeros((B, T + 2), np.int32)}, "query_positions", ops="moda")
    arguments |= {name: np.zeros((B, T - 1, K, H), np.float32) for name in ("key", "value")}
    with pytest.raises(ValueError, match=r"^key has shape \(2, 2, 2, 8\): expected at least the 3 tokens of query"):
        moda_attention(**arguments)


bad_scales = st.one_of(
    st.booleans(), st.text(max_size=3), st.complex_numbers(), st.sampled_from([float("inf"), float("nan"), 10**400]),
    st.sampled_from([np.ones(()), np.ones((1,)), jnp.ones(()), np.float32("inf"), [1.0]]),
    st.sampled_from([1e39, -1e39, 3.5e38, np.float64(1e300), 10**39]),  # finite, but not in float32
)  # fmt: skip


@given(bad_scales)
def test_bad_scale(scale):
    _assert_refused(_arguments() | {"scale": scale}, "scale")


def test_good_scales():
    for scale in (1, 0.5, -0.25, 0, np.float32(0.5), np.float16(2), np.int64(3)):
        assert validation.checked_scale(scale, H) == float(scale)
    assert validation.checked_scale(None, 64) == 0.125
    assert validation.checked_scale(-3.4e38, H) == -3.4e38
    assert validation.checked_scale(1e-40, H) == 0.0  # as float32 arithmetic takes it


@given(st.one_of(st.text(), st.integers(), st.booleans(), st.just(["xla"]), st.just(np.ones(2))))
def test_bad_implementation(implementation):
    if isinstance(implementation, str) and implementation in ("reference", "xla", "mosaic_gpu", "triton"):
        return
    _assert_refused(_arguments() | {"implementation": implementation}, "implementation")


@given(st.sampled_from(["causal", "return_lse"]), st.sampled_from([None, 0, 1, "yes", np.ones(()), np.ones((2, 2))]))
def test_bad_flags(name, value):
    _assert_refused(_arguments() | {name: value}, name, ops="moda")


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(ARRAYS), st.integers(0, 3))
def test_under_jit_the_same_errors_come_while_tracing(name, axis):
    arguments = _arguments()
    arguments[name] = arguments[name].take(0, axis)
    with pytest.raises(ValueError, match=f"^{name} has shape .*expected"):
        jax.jit(lambda **arrays: moda_attention(**arrays))(**arguments)


@pytest.mark.parametrize("dtype", ["int32", "float64", "complex64"])
def test_a_dtype_that_no_implementation_takes(dtype):
    with pytest.raises(ValueError, match=f"query has dtype {dtype}: expected one of .*bfloat16"):
        moda_attention(**_arguments(dtype=dtype))
