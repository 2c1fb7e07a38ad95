"""How an axis is cut into blocks."""

import numpy as np
import pytest

from pallas_kernels.xla.blocks import Blocks


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
