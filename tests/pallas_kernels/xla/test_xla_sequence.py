"""Queries at explicit positions: the key blocks that none of them sees are not visited, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block
from pallas_kernels.xla import sequence
from pallas_kernels.xla.blocks import sequence_blocks


def test_a_permutation_of_the_queries_permutes_the_result():
    T, order = 512, np.concatenate([np.arange(128, 256), np.arange(384, 512)])  # what one of two devices holds
    query, key, value, dout = jax.random.normal(jax.random.key(0), (4, 1, T, 2, 8))
    positions = jnp.asarray(order, jnp.int32)[None]
    whole, lse = block.attention_forward(query, key, value, scale=0.3, causal=True, implementation="xla")
    options = {"scale": 0.3, "causal": True, "query_positions": positions, "implementation": "xla"}
    part, part_lse = block.attention_forward(query[:, order], key, value, **options)
    np.testing.assert_allclose(part, whole[:, order], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(part_lse, lse[:, order], rtol=1e-6, atol=1e-6)

    here = np.zeros(T, bool)
    here[order] = True
    dout = jnp.where(here[None, :, None, None], dout, 0)  # so that the other queries add nothing to dkey and dvalue
    delta = jnp.sum(dout * whole, axis=-1)
    operands = key, value, None, None, None
    expected = block.attention_backward(
        query, *operands, dout, lse, delta, scale=0.3, causal=True, implementation="xla"
    )  # fmt: skip
    ours = block.attention_backward(
        query[:, order], *operands, dout[:, order], lse[:, order], delta[:, order], **options
    )
    np.testing.assert_allclose(ours[0], expected[0][:, order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5, atol=1e-5)


def test_as_many_key_blocks_as_the_latest_query_needs():
    masks = sequence.Masks(True, jnp.asarray([[0, 5, 63, 2], [7, 64, 300, 1]], jnp.int32), None, None, None, None)
    queries, keys = sequence_blocks(jnp.zeros((64, 8, 1, 4, 8)), jnp.zeros((64, 8, 512, 8)))
    assert (keys.size, keys.count, queries.count) == (64, 8, 1)
    assert int(sequence._key_blocks_seen(masks, queries, keys, 0)) == 5  # keys 0..300
    early = masks._replace(query_positions=masks.query_positions[:1])
    assert int(sequence._key_blocks_seen(early, queries, keys, 0)) == 1
    unknown = masks._replace(key_positions=jnp.zeros((2, 512), jnp.int32))
    assert sequence._key_blocks_seen(unknown, queries, keys, 0) == 8
