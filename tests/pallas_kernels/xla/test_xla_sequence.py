"""Queries at explicit positions: the key blocks that none of them sees are not visited, and nothing changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block
from pallas_kernels.operands import Call, Mask, Upstream
from pallas_kernels.xla import sequence
from pallas_kernels.xla.blocks import sequence_blocks


def test_a_permutation_of_the_queries_permutes_the_result():
    T, order = 512, np.concatenate([np.arange(128, 256), np.arange(384, 512)])  # what one of two devices holds
    query, key, value, dout = jax.random.normal(jax.random.key(0), (4, 1, T, 2, 8))
    positions = jnp.asarray(order, jnp.int32)[None]
    forward, backward = (functools.partial(f, implementation="xla") for f in (block.forward, block.backward))
    everyone = Call(query, key, value, Mask(True), scale=0.3)
    some = Call(query[:, order], key, value, Mask(True, positions), scale=0.3)
    whole, lse, _ = forward(everyone)
    part, part_lse, _ = forward(some)
    np.testing.assert_allclose(part, whole[:, order], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(part_lse, lse[:, order], rtol=1e-6, atol=1e-6)

    here = np.zeros(T, bool)
    here[order] = True
    dout = jnp.where(here[None, :, None, None], dout, 0)  # so that the other queries add nothing to dkey and dvalue
    delta = jnp.sum(dout * whole, axis=-1)
    expected = backward(everyone, Upstream(dout, lse, delta))
    ours = backward(some, Upstream(dout[:, order], lse[:, order], delta[:, order]))
    np.testing.assert_allclose(ours[0], expected[0][:, order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5, atol=1e-5)


def test_as_many_key_blocks_as_the_latest_query_needs():
    masks = Mask(True, jnp.asarray([[0, 5, 63, 2], [7, 64, 300, 1]], jnp.int32))
    queries, keys = sequence_blocks(jnp.zeros((64, 8, 5, 4, 8)), jnp.zeros((64, 8, 512, 8)))
    assert (keys.size, keys.count, queries.count) == (64, 8, 1)
    assert int(sequence._key_blocks_seen(masks, queries, keys, 0)) == 5  # keys 0..300
    early = dataclasses.replace(masks, query_positions=masks.query_positions[:1])
    assert int(sequence._key_blocks_seen(early, queries, keys, 0)) == 1
    unknown = dataclasses.replace(masks, key_positions=jnp.zeros((2, 512), jnp.int32))
    assert sequence._key_blocks_seen(unknown, queries, keys, 0) == 8


@pytest.mark.parametrize("masked", ["positions and length", "segments", "nothing"])
def test_few_queries_take_all_keys_at_once(masked):
    """Hidden keys and values are NaN."""
    B, T, U, K, G, H = 2, 2, 300, 2, 3, 8
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal(s).astype(np.float32) for s in ((B, T, K * G, H), *2 * [(B, U, K, H)]))
    mask = Mask()
    if masked == "positions and length":
        length = np.array([270, 0], np.int32)
        mask = Mask(True, query_positions=np.array([[17, 280], [30, 3]], np.int32), key_length=length)
        for array in (key, value):
            array[np.arange(U) >= length[:, None]] = np.nan
    if masked == "segments":
        ids = np.sort(draw.integers(0, 3, (B, U)), axis=1).astype(np.int32)
        mask = Mask(False, query_segment_ids=np.array([[1, 7], [0, 2]], np.int32), key_segment_ids=ids)
    call = Call(query, key, value, mask, scale=0.3)
    expected = block.forward(call, implementation="reference")
    assert "while" not in str(jax.make_jaxpr(lambda call: block.forward(call, implementation="xla"))(call))
    part = block.forward(call, implementation="xla")
    np.testing.assert_allclose(part.out, expected.out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(part.lse, expected.lse, rtol=1e-6, atol=1e-6)
    assert np.isneginf(np.asarray(part.lse)).any() == (masked != "nothing")
