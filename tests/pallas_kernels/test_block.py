"""The internal block: lengths that differ, explicit masks, merged lse and delta, gradient buffers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.tolerances import assert_close

from pallas_kernels import block
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.parts import Part, delta, merge

pytestmark = pytest.mark.usefixtures("small_blocks")
IMPLEMENTATIONS = ("reference", "xla")
B, T, U, S, K, G, H = 2, 71, 131, 11, 2, 2, 16
FILLED = 9
SCALE = 0.3


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)

    def normal(*shape):
        return draw.standard_normal(shape).astype(np.float32)

    arrays = {
        "query": normal(B, T, K * G, H), "key": normal(B, U, K, H), "value": normal(B, U, K, H),
        "depth_key": normal(B, T, S, K, H), "depth_value": normal(B, T, S, K, H),
    }  # fmt: skip
    for name in ("depth_key", "depth_value"):
        arrays[name][:, :, FILLED:] = np.nan
    return arrays


@functools.cache
def _output_gradients() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    shape = (B, T, K * G, H)
    return draw.standard_normal(shape).astype(np.float32), draw.standard_normal(shape[:3]).astype(np.float32)


def _masks(kind: str) -> dict:
    """Keyword masks of the block, by what they are for."""
    draw = np.random.default_rng(2)
    if kind == "default positions":
        return {"causal": True}
    if kind == "decoding":  # a cache that is filled in part, queries at its end
        length = np.array([96, 40], np.int32)
        positions = length[:, None] - T + np.arange(T, dtype=np.int32)
        return {"causal": True, "query_positions": positions, "key_length": length}
    if kind == "context":  # this device's queries against another's keys, packed documents
        return {
            "causal": True,
            "query_positions": np.stack([np.arange(T) + 60, draw.permutation(T) + 60]).astype(np.int32),
            "key_positions": np.stack([draw.permutation(U), np.arange(U)]).astype(np.int32),
            "query_segment_ids": np.sort(draw.integers(1, 4, (B, T)), axis=1).astype(np.int32),
            "key_segment_ids": np.sort(draw.integers(0, 3, (B, U)), axis=1).astype(np.int32),
        }
    return {"causal": False, "key_length": np.array([U, 0], np.int32)}  # "an empty row"


def _call(inputs, length, masks) -> Call:
    """query, key, value, depth_key, depth_value, of which the latter two pairs may be None."""
    query, key, value, depth_key, depth_value = inputs
    depth = None if depth_key is None else DepthKV(depth_key, depth_value, length=length)
    return Call(query, key, value, Mask(**masks), depth, SCALE)


def _delta(expected: dict, dout, dlse) -> np.ndarray:
    return (np.sum(expected["out"] * dout, axis=-1) - dlse).astype(np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("depth", [True, False], ids=["depth", "no_depth"])
@pytest.mark.parametrize("kind", ["default positions", "decoding", "context", "an empty row"])
def test_block_matches_the_oracle(implementation, depth, kind):
    arrays, masks, (dout, dlse) = dict(_arrays()), _masks(kind), _output_gradients()
    length = FILLED
    if not depth:
        arrays |= {"depth_key": None, "depth_value": None}
        length = None
    expected = attention_oracle.attention(**arrays, depth_length=length, scale=SCALE, **masks, dout=dout, dlse=dlse)

    @jax.jit
    def run(inputs, length, dout, dlse, arrays_of_masks):
        call = _call(inputs, length, {"causal": masks["causal"]} | arrays_of_masks)
        part = block.forward(call, implementation=implementation)
        assert part.rest is None
        upstream = Upstream(dout, part.lse, delta(dout, part, dlse))
        return *part[:2], *block.backward(call, upstream, implementation=implementation)

    length = None if length is None else jnp.int32(length)
    given = {name: mask for name, mask in masks.items() if name != "causal"}
    results = run(tuple(arrays.values()), length, dout, dlse, given)
    names = [*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS]
    actual = {name: array for name, array in zip(names, results, strict=True) if array is not None}
    assert len(actual) == (7 if depth else 5)
    assert_close(actual, expected, jnp.dtype("float32"))
    unseen = np.isneginf(expected["lse"])
    assert unseen.any() == (not depth and kind != "default positions")
    assert not np.any(np.asarray(actual["out"])[unseen]) and not np.any(np.asarray(actual["dquery"])[unseen])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_halves_of_the_keys_merge_to_the_whole(implementation):
    """Forward by log-sum-exp; backward with the merged lse and delta gives each half its share, exactly."""
    arrays, (dout, dlse) = _arrays(), _output_gradients()
    query, key, value, depth_key, depth_value = arrays.values()
    expected = attention_oracle.attention(**arrays, depth_length=FILLED, scale=SCALE, causal=True, dout=dout, dlse=dlse)
    half = 40
    positions = np.tile(np.arange(U, dtype=np.int32), (B, 1))
    parts = [slice(0, half), slice(half, U)]
    calls = [
        Call(query, key[:, part], value[:, part], Mask(True, key_positions=positions[:, part]), scale=SCALE)
        for part in parts
    ]
    calls.append(Call(query, depth=DepthKV(depth_key, depth_value, length=FILLED), scale=SCALE))

    @jax.jit
    def run():
        whole = functools.reduce(merge, [block.forward(call, implementation=implementation) for call in calls])
        upstream = Upstream(dout, whole.lse, delta(dout, whole, dlse))
        *gradients, depth = (block.backward(call, upstream, implementation=implementation) for call in calls)
        out, lse = whole.out, whole.lse
        return {
            "out": out, "lse": lse, "dquery": gradients[0].query + gradients[1].query + depth.query,
            "dkey": jnp.concatenate([gradients[0].key, gradients[1].key], axis=1),
            "dvalue": jnp.concatenate([gradients[0].value, gradients[1].value], axis=1),
            "ddepth_key": depth.depth_key, "ddepth_value": depth.depth_value,
        }  # fmt: skip

    assert_close(run(), expected, jnp.dtype("float32"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("buffer_dtype", ["float32", "bfloat16"])
def test_gradient_buffers_are_added_to(implementation, buffer_dtype):
    arrays, (dout, dlse) = _arrays(), _output_gradients()
    expected = attention_oracle.attention(
        **{name: array[:, :T] for name, array in arrays.items()},
        depth_length=FILLED, scale=SCALE, causal=True, dout=dout, dlse=dlse,
    )  # fmt: skip
    draw = np.random.default_rng(3)
    start = draw.standard_normal((2, B, T, S, K, H)).astype(buffer_dtype)
    start[:, :, :, FILLED] = -0.0  # untouched means every bit: not even the sign of a zero
    start[:, :, :, FILLED + 1 :] = np.nan

    @jax.jit
    def run(length, buffers):
        q, k, v, dk, dv = (array[:, :T] for array in arrays.values())
        upstream = Upstream(dout, expected["lse"].astype(np.float32), _delta(expected, dout, dlse))
        call = Call(q, k, v, Mask(True), DepthKV(dk, dv, length=length), SCALE)
        alone = Call(q, depth=call.depth, scale=SCALE)
        run = functools.partial(block.backward, buffers=tuple(buffers), implementation=implementation)
        return run(call, upstream)[3:], run(alone, upstream)[3:]

    for results in run(jnp.int32(FILLED), start):
        for result, before, name in zip(results, start, ("ddepth_key", "ddepth_value"), strict=True):
            result = np.asarray(result)
            assert result.dtype == before.dtype
            assert result[:, :, FILLED:].tobytes() == before[:, :, FILLED:].tobytes()
            added = result[:, :, :FILLED].astype(np.float64)
            wanted = before[:, :, :FILLED].astype(np.float64) + expected[name][:, :, :FILLED]
            tolerance = 1e-5 if buffer_dtype == "float32" else 2.0**-8
            np.testing.assert_allclose(added, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_filled_slot_gives_an_empty_depth_part(implementation):
    query, _, _, depth_key, depth_value = _arrays().values()
    dout, _ = _output_gradients()
    for length in (0, jnp.int32(0)):
        call = Call(query, depth=DepthKV(depth_key, depth_value, length=length), scale=SCALE)
        out, lse, _ = block.forward(call, implementation=implementation)
        assert not np.any(np.asarray(out)) and np.all(np.isneginf(np.asarray(lse)))
        upstream = Upstream(dout, lse, np.full(lse.shape, np.nan, np.float32))  # what becomes of delta does not matter
        gradients = block.backward(call, upstream, implementation=implementation)
        assert gradients.key is None and gradients.value is None
        assert all(not np.any(np.asarray(gradient)) for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("buffer_dtype", [None, "float32", "bfloat16"])
def test_a_window_of_slots_is_these_slots_alone(implementation, buffer_dtype):
    """Slots before `start` and from `length` on: no weight, no gradient, and no bit of their buffers changes."""
    start, length, (dout, dlse) = 4, 7, _output_gradients()
    query, key, value, *depth = (array[:, :T].copy() for array in _arrays().values())
    window = [array[:, :, start:length] for array in depth]
    expected = attention_oracle.attention(
        query, key, value, *window, scale=SCALE, causal=True, dout=dout, dlse=dlse
    )  # fmt: skip
    for array in depth:
        array[:, :, :start] = array[:, :, length:] = np.nan
    buffers = None
    if buffer_dtype is not None:
        buffers = np.random.default_rng(3).standard_normal((2, B, T, S, K, H)).astype(buffer_dtype)

    @jax.jit
    def run(start, length, buffers):
        call = Call(query, key, value, Mask(True), DepthKV(*depth, start, length), SCALE)
        part = block.forward(call, implementation=implementation)
        upstream = Upstream(dout, part.lse, delta(dout, part, dlse))
        given = None if buffers is None else tuple(buffers)
        return *part[:2], *block.backward(call, upstream, buffers=given, implementation=implementation)

    names = [*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS]
    actual = dict(zip(names, run(jnp.int32(start), jnp.int32(length), buffers), strict=True))
    outside = [*range(start), *range(length, S)]
    for i, name in enumerate(("ddepth_key", "ddepth_value")):
        came = np.asarray(actual[name])
        before = np.zeros_like(came) if buffers is None else buffers[i]
        assert came.dtype == before.dtype
        assert came[:, :, outside].tobytes() == before[:, :, outside].tobytes()
        actual[name] = came[:, :, start:length].astype(np.float64) - before[:, :, start:length].astype(np.float64)
        if buffer_dtype == "bfloat16":
            assert np.abs(actual.pop(name) - expected[name]).max() < 2.0**-6 * np.abs(expected[name]).max()
    assert_close(actual, {name: expected[name] for name in actual}, jnp.dtype("float32"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("buffers", [False, True], ids=["fresh", "buffers"])
def test_deferred_gradients_of_two_calls_are_added_by_one(implementation, buffers):
    """Two layers' calls over slots that grow, and a third with the query heads of both: as if none had waited."""
    first, lengths = 4, (6, FILLED)
    query, key, value, *depth = (array[:, :T] for array in _arrays().values())
    draw = np.random.default_rng(4)
    douts = draw.standard_normal((2, *query.shape)).astype(np.float32)
    start = draw.standard_normal((2, B, T, S, K, H)).astype(np.float32) if buffers else None

    @jax.jit
    def run(first, lengths, start):
        full = late = old = None if start is None else tuple(start)
        results, waiting = [], []
        for i, dout in enumerate(douts):
            slots = DepthKV(*depth, length=lengths[i])
            call = Call(query + i, key, value, Mask(True), slots, SCALE)
            part = block.forward(call, implementation=implementation)
            upstream = Upstream(dout, part.lse, delta(dout, part))
            run = functools.partial(block.backward, implementation=implementation)
            whole = run(call, upstream, buffers=full)
            call = dataclasses.replace(call, depth=dataclasses.replace(slots, deferred=first))
            some = run(call, upstream, buffers=late)
            full, late = (None, None) if start is None else (whole[3:], some[3:])
            results.append((whole, some))
            waiting.append((call.query, upstream))
        grouped = jax.tree.map(
            lambda *xs: jnp.concatenate([x.reshape(B, T, K, -1, *x.shape[3:]) for x in xs], axis=3), *waiting
        )
        wide, upstream = jax.tree.map(lambda x: x.reshape(B, T, -1, *x.shape[4:]), grouped)
        call = Call(wide, depth=DepthKV(*depth, length=first), scale=SCALE, query_gradient=False)
        return results, run(call, upstream, buffers=late if old is None else results[1][1][3:])

    results, together = run(jnp.int32(first), jnp.asarray(lengths), start)
    for i, (whole, some) in enumerate(results):
        for name, x, y in zip(("query", "key", "value"), whole, some, strict=False):
            np.testing.assert_array_equal(x, y, err_msg=f"{name} of call {i}")
        for x, y, before in zip(whole[3:], some[3:], (0, 0) if start is None else start, strict=True):
            before = np.broadcast_to(before, x.shape)
            np.testing.assert_array_equal(y[:, :, :first], before[:, :, :first])
            np.testing.assert_allclose(x[:, :, first:], y[:, :, first:], rtol=1e-6, atol=1e-6)
    assert together.query is None
    for i in range(3, 5):
        total = results[1][0][i] if buffers else results[0][0][i] + results[1][0][i]
        np.testing.assert_allclose(together[i][:, :, :first], total[:, :, :first], rtol=1e-5, atol=1e-5)


def test_parts_merge_by_log_sum_exp_and_an_empty_one_changes_no_bit():
    draw = np.random.default_rng(0)
    logits, values = (draw.standard_normal((2, 3, 1, 5, *rest)).astype(np.float32) for rest in ((), (4,)))

    def part(of):
        weights = np.exp(logits[..., of])
        out = np.einsum("btns,btnsh->btnh", weights, values[..., of, :]) / weights.sum(-1, keepdims=True)
        return Part(jnp.asarray(out), jnp.asarray(np.log(weights.sum(-1))))

    both, whole = merge(part(slice(0, 2)), part(slice(2, 5))), part(slice(0, 5))
    np.testing.assert_allclose(both.out, whole.out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.lse, whole.lse, rtol=1e-5, atol=1e-6)
    same = merge(whole, Part.of_nothing(jnp.full_like(whole.out, jnp.nan)))
    assert np.asarray(same.out).tobytes() == np.asarray(whole.out).tobytes()
    assert np.asarray(same.lse).tobytes() == np.asarray(whole.lse).tobytes()
