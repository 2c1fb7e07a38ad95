"""Every kernel and tile choice, compiled to machine code for the cards that it is for: it fits, and hardly spills."""

import pytest
from support.triton_compile import compile_for, launches

from pallas_kernels.triton import call, tiles

# The capabilities whose users the project names; 8.7, 10.3 and 12.1 have the tiles of a neighbour.
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
LARGEST_SPILL_BYTES = 64  # of a thread; more than a few rarely used numbers would show in the inner loop
KERNELS = ["depth_forward", "sequence_forward", "sequence_dq", "sequence_dkv", "depth_backward"]
QUICK = ((8, 0), 64, "decoding")  # the default run's; the others are slow, five kernels each
CASES = {
    "plain": {},
    "every_mask": {"explicit": True, "buffers": "bfloat16"},
    "decoding": {"tokens": 1, "keys": 1000, "explicit": True},
    "float16": {"dtype": "float16", "tokens": 1000, "group": 3, "buffers": "float32", "scale": -0.125},
    "many_heads": {"tokens": 3, "keys": 1000, "group": 48, "explicit": True, "buffers": "float32"},
}

pytestmark = pytest.mark.skipif(call.interpreting(), reason="TRITON_INTERPRET=1: nothing is compiled")


def _cases() -> list:
    """All cases at H = 64 on an A100, and on every card those whose tiles are their own."""
    chosen = [(capability, 64, "every_mask") for capability in CAPABILITIES]
    chosen += [(capability, head_dim, "plain") for capability in CAPABILITIES for head_dim in (128, 256)]
    chosen += [((8, 0), 64, name) for name in CASES if name != "every_mask"]
    chosen += [
        ((8, 6), 80, "every_mask"),
        ((9, 0), 128, "every_mask"),
        ((8, 6), 256, "many_heads"),
        ((9, 0), 128, "many_heads"),
        ((8, 6), 18, "float16"),
    ]
    return [
        pytest.param(
            *case, id=f"sm_{case[0][0]}{case[0][1]}-H{case[1]}-{case[2]}",
            marks=() if case == QUICK else pytest.mark.slow,
        )
        for case in chosen
    ]  # fmt: skip


@pytest.mark.parametrize(("capability", "head_dim", "case"), _cases())
def test_a_kernel_fits_its_card_and_hardly_spills(capability, head_dim, case):
    started = launches(capability, head_dim=head_dim, **CASES[case])
    assert [launch.kernel.fn.__name__.removeprefix("moda_") for launch in started] == KERNELS
    for launch in started:
        resources = compile_for(launch, capability)
        assert resources.shared_bytes <= tiles.SHARED_BYTES[capability], (launch.kernel.fn.__name__, resources)
        assert resources.spilled_bytes <= LARGEST_SPILL_BYTES, (launch.kernel.fn.__name__, resources)
