"""The tile table: a choice depends on shape and capability alone."""

import itertools

import pytest

from pallas_kernels.triton import tiles


@pytest.mark.parametrize("capability", [*tiles.SHARED_BYTES, (8, 8), (11, 0), (13, 0)])
@pytest.mark.parametrize("head_dim", [16, 18, 64, 80, 128, 130, 256])
def test_every_choice_is_one_that_a_kernel_takes(capability, head_dim):
    for kernel, tokens, group in itertools.product(("forward", "dq", "dkv"), (1, 3, 63, 64, 4096), (1, 3, 8, 48, 200)):
        chosen = tiles.sequence_tiles(kernel, head_dim, tokens, group, capability)
        assert chosen.rows >= 16 and chosen.rows.bit_count() == 1
        assert chosen.keys >= 16 and chosen.keys.bit_count() == 1
        assert 1 <= chosen.heads <= chosen.rows and chosen.tokens >= 1
        assert (chosen.heads == 1) or (tokens < tiles.FEW_TOKENS and chosen.heads <= group)
    for kernel, slots, group in itertools.product(("forward", "backward"), (1, 5, 16, 512), (1, 8, 17, 200)):
        chosen = tiles.depth_tiles(kernel, head_dim, slots, group)
        assert chosen.rows >= 16 and chosen.rows.bit_count() == 1
        assert chosen.slots >= 16 and chosen.slots.bit_count() == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), 163),
        ((8, 6), 99),
        ((8, 9), 99),
        ((9, 0), 227),
        ((10, 0), 227),
        ((12, 0), 99),
        ((8, 8), 99),
        ((13, 0), 99),
    ],
)
def test_shared_memory_of_a_thread_block(capability, expected):
    """A capability that is not in the table has that of its generation's smallest, or of all."""
    assert tiles.shared_bytes(capability) == expected * 1024
