"""The internal block: lengths that differ, explicit masks, merged lse and delta, gradient buffers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.tolerances import assert_close

from pallas_kernels import block

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
        options = {"scale": SCALE, "causal": masks["causal"], "implementation": implementation} | arrays_of_masks
        out, lse = block.attention_forward(*inputs, length, **options)
        delta = jnp.sum(out * dout, axis=-1) - dlse
        return out, lse, *block.attention_backward(*inputs, length, dout, lse, delta, **options)

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
    options = {"scale": SCALE, "implementation": implementation}

    @jax.jit
    def run():
        outs, lses = [], []
        for part in parts:
            out, lse = block.attention_forward(
                query, key[:, part], value[:, part], causal=True, key_positions=positions[:, part], **options
            )
            outs.append(out), lses.append(lse)
        out, lse = block.depth_forward(query, depth_key, depth_value, FILLED, **options)
        outs.append(out), lses.append(lse)
        lse = jax.nn.logsumexp(jnp.stack(lses), axis=0)
        out = sum(out * jnp.exp(part - lse)[..., None] for out, part in zip(outs, lses, strict=True))
        delta = jnp.sum(out * dout, axis=-1) - dlse
        backward = functools.partial(block.attention_backward, causal=True, **options)
        gradients = [
            backward(
                *(query, key[:, part], value[:, part], None, None, None, dout, lse, delta),
                key_positions=positions[:, part],
            )
            for part in parts
        ]
        depth = block.depth_backward(query, depth_key, depth_value, FILLED, dout, lse, delta, **options)
        return {
            "out": out, "lse": lse, "dquery": gradients[0][0] + gradients[1][0] + depth[0],
            "dkey": jnp.concatenate([gradients[0][1], gradients[1][1]], axis=1),
            "dvalue": jnp.concatenate([gradients[0][2], gradients[1][2]], axis=1),
            "ddepth_key": depth[1], "ddepth_value": depth[2],
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
        lse, delta = expected["lse"].astype(np.float32), _delta(expected, dout, dlse)
        options = {"scale": SCALE, "implementation": implementation}
        options |= {"depth_key_gradient": buffers[0], "depth_value_gradient": buffers[1]}
        whole = block.attention_backward(q, k, v, dk, dv, length, dout, lse, delta, causal=True, **options)
        return whole[3:], block.depth_backward(q, dk, dv, length, dout, lse, delta, **options)[1:]

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
        out, lse = block.depth_forward(
            query, depth_key, depth_value, length, scale=SCALE, implementation=implementation
        )
        assert not np.any(np.asarray(out)) and np.all(np.isneginf(np.asarray(lse)))
        delta = np.full(lse.shape, np.nan, np.float32)  # what becomes of it does not matter
        gradients = block.depth_backward(
            query, depth_key, depth_value, length, dout, lse, delta, scale=SCALE, implementation=implementation
        )
        assert all(not np.any(np.asarray(gradient)) for gradient in gradients)
