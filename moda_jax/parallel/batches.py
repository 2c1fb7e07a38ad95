"""Batches on the mesh: which rows a process reads, and host arrays placed on the devices.

The data pipeline knows blocks of rows, not devices. Where tensor and context stay inside a process, every process reads
its own block; where they span processes, those processes read the same block and each device takes its tokens of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moda_jax.parallel.attention import balanced_order
from moda_jax.parallel.mesh import named_sharding


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """An array of a global batch, before it is there.

    Attributes:
        shape: of all processes' rows together, the rows first.
        dtype: NumPy's name of it.
        axes: logical axes of the dimensions, see `moda_jax.parallel.mesh.RULES`; "batch" first.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


class RowShare(NamedTuple):
    """A process's share of every global batch: block `index` of `count` equal ones."""

    index: int
    count: int


def row_share(mesh: Mesh, process_index: int | None = None) -> RowShare:
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
    return RowShare(wanted[0] // size, data * fsdp // size)


class BatchPlacement:
    """Puts batches on the devices, what lies along "tokens" in balanced order.

    Args:
        mesh: the mesh.
        layout: of a global batch, a pytree of `ArrayLayout`.
    """

    def __init__(self, mesh: Mesh, layout: Any):
        self.share = row_share(mesh)
        self._mesh, self._layout = mesh, layout

    def abstract(self) -> Any:
        """Shapes, dtypes and shardings of a global batch."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=named_sharding(self._mesh, *a.axes)), self._layout
        )

    def __call__(self, batch: Any) -> Any:
        """This process's block of rows, in the order of the sequence, to global arrays."""
        return jax.tree.map(self._place, self._layout, batch)

    def _place(self, layout: ArrayLayout, rows: np.ndarray) -> jax.Array:
        first = self.share.index * (layout.shape[0] // self.share.count)
        context = self._mesh.shape["context"]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(layout.shape[0])
            taken = rows[start - first : stop - first]
            for axis in range(1, rows.ndim):
                if layout.axes[axis] == "tokens":
                    taken = np.take(taken, balanced_order(layout.shape[axis], context)[index[axis]], axis)
                else:
                    taken = taken[(slice(None),) * axis + (index[axis],)]
            return taken

        return jax.make_array_from_callback(layout.shape, named_sharding(self._mesh, *layout.axes), part)
