"""The depth stream: entries land in their slots, and no entry is ever lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax import DepthStream


def entry(seed, shape=(2, 3, 2, 4)):
    return tuple(jax.random.normal(jax.random.key(seed + i), shape) for i in (0, 100))


def test_appended_entries_stand_in_order():
    stream = DepthStream.empty(2, 3, 4, 2, 4, jnp.float32)
    assert stream.length.dtype == jnp.int32
    for i in range(3):
        stream = stream.append(*entry(i))
    assert int(stream.length) == 3
    for i in range(3):
        np.testing.assert_array_equal(stream.key[:, :, i], entry(i)[0])
        np.testing.assert_array_equal(stream.value[:, :, i], entry(i)[1])
    np.testing.assert_array_equal(stream.key[:, :, 3], 0)


def test_a_full_stream_refuses_when_its_length_is_concrete():
    stream = DepthStream.empty(2, 3, 1, 2, 4, jnp.float32).append(*entry(0))
    with pytest.raises(ValueError, match="all 1 slots are filled"):
        stream.append(*entry(1))


def test_a_full_stream_keeps_its_entries_when_its_length_is_traced():
    @jax.jit
    def fill(stream):
        def step(stream, i):
            return stream.append(*(e + i for e in entry(0))), None

        return jax.lax.scan(step, stream, jnp.arange(5.0))[0]

    stream = fill(DepthStream.empty(2, 3, 3, 2, 4, jnp.float32))
    assert int(stream.length) == 5, "that two entries were lost must show"
    for i in range(3):
        np.testing.assert_array_equal(stream.key[:, :, i], entry(0)[0] + i)


def test_length_stays_concrete_under_jit_when_nothing_traces_it():
    def two_in_one_slot(key):
        return DepthStream.empty(2, 3, 1, 2, 4, jnp.float32).append(key, key).append(key, key).key

    with pytest.raises(ValueError, match="all 1 slots"):
        jax.jit(two_in_one_slot)(entry(0)[0])


def test_is_a_pytree_and_entries_are_cast():
    stream = DepthStream.empty(2, 3, 2, 2, 4, jnp.bfloat16).append(*entry(0))
    assert stream.key.dtype == jnp.bfloat16
    again = jax.tree.unflatten(jax.tree.structure(stream), jax.tree.leaves(stream))
    assert int(again.length) == 1
    assert jax.vmap(lambda s: s.append(*entry(1)).length)(
        jax.tree.map(lambda x: jnp.stack([x, x]), stream)
    ).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_wrong_shape_is_named(name):
    stream = DepthStream.empty(2, 3, 2, 2, 4, jnp.float32)
    good, bad = jnp.zeros((2, 3, 2, 4)), jnp.zeros((2, 3, 1, 4))
    with pytest.raises(ValueError, match=f"{name} has shape \\(2, 3, 1, 4\\), expected"):
        stream.append(**{"key": good, "value": good, name: bad})
