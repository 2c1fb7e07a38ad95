"""How an axis is cut into blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.xla.blocks import Blocks, TokenBlocks


@pytest.mark.parametrize("largest", [1, 2, 5, 64])
def test_every_element_is_fresh_in_exactly_one_block(largest):
    for length in (1, 2, 3, 7, 10, 63, 64, 65, 129):
        blocks = Blocks.of(length, largest)
        assert blocks.size <= largest
        seen = []
        for index in range(blocks.count):
            start = int(blocks.start(index))
            assert 0 <= start <= length - blocks.size
            seen.extend(start + np.flatnonzero(np.asarray(blocks.fresh(index))))
        assert seen == list(range(length))
        assert blocks.ragged == (blocks.count * blocks.size != length)


@pytest.mark.parametrize(
    "largest", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 5, 64]
)
def test_blocks_of_tokens_put_back_what_they_cut(largest):
    for length in (1, 2, 7, 10, 63, 64, 65):
        blocks = TokenBlocks.of(length, largest)
        assert blocks.size <= largest
        tokens = np.arange(3 * length * 4).reshape(3, length, 4)
        view, seen = blocks.view(jnp.asarray(tokens)), jnp.zeros_like(blocks.view(jnp.asarray(tokens)))
        for index in range(blocks.count):
            seen = blocks.put(seen, blocks.cut(view, index), index)
            part = np.asarray(blocks.cut(view, index, 1, 2))
            np.testing.assert_array_equal(part, np.asarray(blocks.cut(view, index))[:, :, 1:3])
            seen = blocks.put(seen, jnp.asarray(part), index, 1)
        np.testing.assert_array_equal(np.asarray(blocks.flat(seen)), tokens)


@pytest.mark.parametrize(("length", "largest", "count"), [(64, 16, 4), (60, 16, 4), (63, 16, 7), (61, 16, 4)])
def test_blocks_of_tokens_are_strided_where_a_count_near_the_fewest_divides(length, largest, count):
    blocks = TokenBlocks.of(length, largest)
    assert blocks.count == count
    assert blocks.strided == (length % count == 0)
    block = np.asarray(blocks.cut(blocks.view(jnp.arange(length)[None, :, None]), 1))[0, :, 0]
    expected = np.arange(1, length, count) if blocks.strided else 16 + np.arange(blocks.size)
    np.testing.assert_array_equal(block, expected)
