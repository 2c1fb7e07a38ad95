"""Batches on the mesh: which rows a process reads, and host arrays placed on the devices.

The data pipeline knows blocks of rows, not devices. Where tensor and context stay inside a process, every process reads
its own block; where they span processes, those processes read the same block and each device takes its tokens of it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moda_jax.data.packing import Batch
from moda_jax.parallel.attention import balanced_order
from moda_jax.parallel.mesh import named_sharding


class RowBlock(NamedTuple):
    """A process's share of every global batch: block `index` of `count` equal ones."""

    index: int
    count: int


def row_block(mesh: Mesh, process_index: int | None = None) -> RowBlock:
    """The block of rows that this process's devices need.

    Args:
        mesh: the mesh; an object array of devices is all that is used of it.
        process_index: None: this process.

    Raises:
        ValueError: the process's devices need rows that are not one of equal blocks (an unusual order of devices).
    """
    process_index = jax.process_index() if process_index is None else process_index
    data, fsdp = mesh.devices.shape[:2]
    places = mesh.devices.reshape(data * fsdp, -1)  # a row of devices shares its rows of the batch
    wanted = [i for i, devices in enumerate(places) if any(device.process_index == process_index for device in devices)]
    size = len(wanted)
    if not wanted or (data * fsdp) % size or wanted[0] % size or wanted != list(range(wanted[0], wanted[0] + size)):
        raise ValueError(
            f"mesh of data={data} x fsdp={fsdp}: the devices of process {process_index} hold the parts {wanted} of the "
            "batch, expected one block; put the devices of a process next to each other"
        )
    return RowBlock(wanted[0] // size, data * fsdp // size)


class BatchPlacement:
    """Puts batches on the devices, the tokens in balanced order.

    Args:
        mesh: the mesh.
        batch_size: rows of a global batch.
        sequence_length: T.
    """

    def __init__(self, mesh: Mesh, batch_size: int, sequence_length: int):
        self.block = row_block(mesh)
        self._shape = (batch_size, sequence_length)
        self._sharding = named_sharding(mesh, "batch", "tokens")
        self._order = balanced_order(sequence_length, mesh.shape["context"])
        self._first = self.block.index * (batch_size // self.block.count)

    def abstract(self) -> Batch:
        """Shapes, dtypes and shardings of a global batch."""
        integers = jax.ShapeDtypeStruct(self._shape, np.int32, sharding=self._sharding)
        mask = jax.ShapeDtypeStruct(self._shape, np.float32, sharding=self._sharding)
        return Batch(integers, integers, integers, integers, mask)

    def __call__(self, batch: Batch) -> Batch:
        """This process's block of rows [B / count, T], in the order of the sequence, to global arrays [B, T]."""
        return Batch(*(self._place(array) for array in batch))

    def _place(self, rows: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._shape[0])
            return rows[start - self._first : stop - self._first, self._order[index[1]]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)
