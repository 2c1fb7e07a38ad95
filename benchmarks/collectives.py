"""What a compiled program sends between devices: its collectives, read from the optimised HLO.

For each: its kind, arrays and mesh axes, how often it runs per call (loop bodies count by their trip counts), and
the bytes that cross a device's links in a ring.

    all-gather, all-to-all   (n - 1) / n x result       reduce-scatter    (n - 1) / n x operand
    all-reduce           2 x (n - 1) / n x result       permute           result

An all-reduce of which every device reads only its own part is marked `sliced`: XLA's GPU compiler turns it into a
reduce-scatter, the CPU compiler does not. Its bytes are counted as those of a reduce-scatter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of `KINDS`.
        arrays: (dtype, shape) of each result.
        axes: mesh axes that its groups span.
        group_size: devices of a group.
        times: executions per call of the program.
        sliced: an all-reduce that a GPU runs as a reduce-scatter.
        name: the source operation, from the metadata.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    axes: tuple[str, ...]
    group_size: int
    times: int
    sliced: bool
    name: str

    @property
    def result_bytes(self) -> int:
        """Bytes of the results on one device, of one execution."""
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def link_bytes(self) -> float:
        """Bytes that one device sends in one execution, in a ring."""
        share = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return (1 if self.sliced else 2) * share * self.result_bytes
        if self.kind == "reduce-scatter":
            return share * self.group_size * self.result_bytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.result_bytes
        return share * self.result_bytes


def find_collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program between two or more devices.

    Args:
        hlo: `compiled.as_text()`.
        mesh: devices along each axis, in the mesh's order.

    Raises:
        ValueError: HLO that this reader does not understand.
    """
    computations = _computations(hlo)
    times = _executions(computations)
    found = []
    for name, instructions in computations.items():
        for instruction in instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind not in KINDS or times[name] == 0:
                continue
            group = _group(instruction.rest, kind, mesh)
            if len(group) > 1:
                label = re.search(r'op_name="([^"]*)"', instruction.rest)
                for sliced, arrays in _split(instruction, kind, name, computations, len(group)).items():
                    found.append(
                        Collective(
                            kind, arrays, _axes(group, mesh), len(group), times[name], sliced, label[1] if label else ""
                        )
                    )
    return found


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operation: str
    rest: str


def _computations(hlo: str) -> dict[str, list[_Instruction]]:
    """Instructions by computation; the entry is called "ENTRY"."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in hlo.splitlines():
        if opening := _COMPUTATION.match(line):
            current = computations.setdefault("ENTRY" if opening[1] else opening[2], [])
        elif instruction := _INSTRUCTION.match(line):
            name, result, operation, rest = instruction.groups()
            arrays = tuple(
                (dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in _ARRAY.findall(result)
            )
            current.append(_Instruction(name, arrays, operation, rest))
    if "ENTRY" not in computations:
        raise ValueError("hlo: no entry computation found")
    return computations


def _executions(computations: Mapping[str, list[_Instruction]]) -> dict[str, int]:
    """How often each computation runs per call of the program."""
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    for name, instructions in computations.items():
        for instruction in instructions:
            trips = 1
            if instruction.operation == "while":
                known = _TRIPS.search(instruction.rest)
                trips = int(known[1]) if known else 0  # data-dependent: see below
            for called in _CALLED.findall(instruction.rest):
                for callee in re.findall(r"%([\w.\-]+)", called):
                    callers[callee].append((name, trips))
    times: dict[str, int] = {}

    def count(name: str) -> int:
        # Loops without a known trip count are those inside attention, which hold no collective.
        if name not in times:
            times[name] = 1 if name == "ENTRY" else sum(trips * count(caller) for caller, trips in callers[name])
        return times[name]

    for name in computations:
        count(name)
    return times


def _split(
    instruction: _Instruction, kind: str, computation: str, computations: Mapping[str, list[_Instruction]], parts: int
) -> dict[bool, tuple]:
    """The arrays of a collective by whether all that reads them takes one of `parts` parts (all-reduces only)."""
    if kind != "all-reduce":
        return {False: instruction.arrays}
    names = {0: instruction.name}
    if len(instruction.arrays) > 1:
        elements = _readers(computations[computation], instruction.name)
        names = {int(re.search(r"index=(\d+)", element.rest)[1]): element.name for element in elements}
    arrays: dict[bool, list] = {}
    for index, array in enumerate(instruction.arrays):
        part, rest = divmod(math.prod(array[1]), parts)
        name = names.get(index)
        sliced = rest == 0 and name is not None and _is_sliced(name, computation, computations, part)
        arrays.setdefault(sliced, []).append(array)
    return {sliced: tuple(of_kind) for sliced, of_kind in arrays.items()}


_SAME_ELEMENTS = ("bitcast", "reshape", "transpose", "copy", "convert")


def _is_sliced(name: str, computation: str, computations: Mapping[str, list[_Instruction]], part: int) -> bool:
    """Whether every reader of `name` takes `part` elements of it by a dynamic slice, perhaps inside a fusion."""

    def takes_part(reader: _Instruction) -> bool:
        if reader.operation == "dynamic-slice":
            return math.prod(reader.arrays[0][1]) == part
        if reader.operation in _SAME_ELEMENTS:
            return _is_sliced(reader.name, computation, computations, part)
        if reader.operation != "fusion":
            return False
        callee = re.search(r"calls=%([\w.\-]+)", reader.rest)[1]
        operands = _operands(reader)
        inside = [
            parameter.name
            for parameter in computations[callee]
            if parameter.operation == "parameter" and operands[int(parameter.rest.split(")")[0])] == name
        ]
        return all(_is_sliced(parameter, callee, computations, part) for parameter in inside)

    readers = _readers(computations[computation], name)
    return bool(readers) and all(map(takes_part, readers))


def _readers(instructions: list[_Instruction], name: str) -> list[_Instruction]:
    return [instruction for instruction in instructions if name in _operands(instruction)]


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])


def _group(rest: str, kind: str, mesh: Mapping[str, int]) -> list[int]:
    """The devices of the first group (of a permute: of the first pair)."""
    devices = math.prod(mesh.values())
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
        return [] if pairs is None else [int(pairs[1]), int(pairs[2])]
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(i) for i in match[1].split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = np.arange(devices).reshape([int(n) for n in match[3].split(",")])
        if match[4]:
            order = order.transpose([int(n) for n in match[4].split(",")])
        return order.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        names = re.findall(r"'(\w+)'", match[2])
        if not set(names) <= set(sizes):
            raise ValueError(f"hlo: replica groups {match[0]!r} are not understood")
        order = np.moveaxis(np.arange(devices).reshape(list(sizes.values())), [list(sizes).index(n) for n in names],
                            range(len(names)))  # fmt: skip
        return order.reshape(math.prod(sizes[n] for n in names), -1)[:, 0].tolist()
    if "replica_groups={}" in rest:
        return list(range(devices))
    raise ValueError(f"hlo: no replica groups found in {rest[:200]!r}")


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)
