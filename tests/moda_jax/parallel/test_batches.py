"""Which rows a process reads, on meshes of many processes."""

import types

import numpy as np
import pytest

from moda_jax.parallel.batches import row_share


def mesh(shape, devices_per_process):
    """A stand-in for a Mesh: devices in order, so many to a process."""
    count = int(np.prod(shape))
    devices = np.empty(count, object)
    devices[:] = [types.SimpleNamespace(process_index=i // devices_per_process) for i in range(count)]
    return types.SimpleNamespace(devices=devices.reshape(shape))


@pytest.mark.parametrize(
    ("shape", "devices_per_process", "expected"),
    [
        ((2, 2, 2, 1), 8, [(0, 1)]),
        ((2, 2, 2, 1), 4, [(0, 2), (1, 2)]),
        ((8, 1, 1, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 2, 2, 2), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # context inside, tensor across processes
        ((1, 1, 1, 8), 4, [(0, 1), (0, 1)]),  # both read all rows, and place different tokens of them
        ((2, 1, 1, 4), 1, [(0, 2)] * 4 + [(1, 2)] * 4),
    ],
)
def test_blocks(shape, devices_per_process, expected):
    made = mesh(shape, devices_per_process)
    assert [tuple(row_share(made, process)) for process in range(len(expected))] == expected


def test_rows_that_are_no_block_are_refused():
    made = mesh((4, 1, 1, 1), 2)
    made.devices = made.devices[[0, 2, 1, 3]]
    with pytest.raises(ValueError, match=r"the devices of process 0 hold the parts \[0, 2\] of the batch"):
        row_share(made, 0)
