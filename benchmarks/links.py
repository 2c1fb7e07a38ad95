"""How long a collective takes: bytes over bandwidth plus latency per stage; NVLink in a machine, InfiniBand between.

NCCL sends in rings. A group that lies in one machine runs at NVLink's bandwidth. One that spans machines with k members
in each has k adapters of every machine to itself and runs at k times an adapter's bandwidth, or NVLink's if that is
less. A collective of n devices takes ceil(log2 n) stages of latency.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from benchmarks.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Links:
    """The machine.

    Attributes:
        nvlink: bytes per second that a GPU sends to its neighbours inside the machine.
        infiniband: bytes per second of a GPU's network adapter.
        nvlink_latency, infiniband_latency: seconds per stage.
        devices_per_machine: GPUs of a machine, neighbours in the mesh's order.
    """

    nvlink: float
    infiniband: float
    nvlink_latency: float
    infiniband_latency: float
    devices_per_machine: int

    def seconds(self, collective: Collective, mesh: Mapping[str, int]) -> float:
        """One execution of a collective on a mesh (devices along each axis, in order)."""
        machines = self._machines(collective.axes, mesh)
        stages = math.ceil(math.log2(collective.group_size))
        if len(set(machines)) == 1:
            return collective.link_bytes / self.nvlink + stages * self.nvlink_latency
        members = min(machines.count(machine) for machine in set(machines))
        bandwidth = min(self.nvlink, members * self.infiniband)
        return collective.link_bytes / bandwidth + stages * self.infiniband_latency

    def _machines(self, axes: tuple[str, ...], mesh: Mapping[str, int]) -> list[int]:
        """The machine of each member of the group of device 0."""
        devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
        group = devices[tuple(slice(None) if axis in axes else 0 for axis in mesh)]
        return (group.reshape(-1) // self.devices_per_machine).tolist()
