"""How a kernel is split over the devices of a caller's mesh.

XLA's partitioner cannot look into a kernel: left to itself it gathers all that the kernel reads on every device, and
every device then does all of the work. A `Rule` names the dimensions of what goes in and comes out. Those that the
kernel can be split over stay where they are, and every device runs the kernel on its own part.

    automatic axes   the layout is known when XLA compiles: the rule goes with the operation
                     (`jax.experimental.custom_partitioning`), forwards as a rule of Shardy's.
    explicit axes    the layout is in the types: `jax.shard_map`.
    manual axes      the caller has split the arrays, under `jax.shard_map`: nothing is left to do.
    one device       the kernel alone.

A program with such a rule in it is not found again in JAX's persistent compilation cache: its key has an address in it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array, custom_batching
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

type Axes = Mapping[str, tuple[str, ...]]
"""The mesh axes that a dimension is split over, by its name; one that is not split is not in it."""

type Local = Callable[..., Sequence[Array]]
"""function(axes, *operands) -> results: a kernel on one device's part of its operands."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The dimensions of a kernel's operands and results, each by a name; of "a b" the parts of a are the larger steps.

    Attributes:
        operands, results: the names of every array's dimensions.
        whole: names of dimensions that every device needs whole. The others may be split.
        sizes: of names that no dimension has for itself.
    """

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    whole: frozenset[str]
    sizes: tuple[tuple[str, int], ...] = ()

    def mapped(self, name: str, operands: Sequence[bool]) -> Rule:
        """The rule under `jax.vmap`: a dimension that may be split, in front of those operands and of all results."""
        return dataclasses.replace(
            self,
            operands=tuple((name, *dims) if is_mapped else dims
                           for dims, is_mapped in zip(self.operands, operands, strict=True)),
            results=tuple((name, *dims) for dims in self.results),
        )  # fmt: skip

    def for_shardy(self) -> SdyShardingRule:
        """The rule as XLA's partitioner takes it."""

        def mapping(dims: tuple[str, ...]) -> ArrayMapping:
            return ArrayMapping(*(CompoundFactor(*d.split()) if " " in d else d for d in dims))

        names = dict.fromkeys(name for dims in self.operands + self.results for d in dims for name in d.split())
        return SdyShardingRule(
            tuple(map(mapping, self.operands)), tuple(map(mapping, self.results)),
            need_replication_factors=tuple(name for name in names if name in self.whole), **dict(self.sizes),
        )  # fmt: skip

    def axes(self, mesh: Any, arrays: Sequence[Any], specs: Sequence[PartitionSpec]) -> Axes:
        """What is split over which axes of the mesh, as the first array says of whose dimension some are known.

        Args:
            arrays: the operands, or the operands and the results: their shapes.
            specs: how they lie now.
        """
        found: dict[str, tuple[str, ...]] = {}
        for dims, array, spec in zip(self.operands + self.results, arrays, specs, strict=False):
            for d, size, entry in zip(dims, array.shape, tuple(spec), strict=False):
                name, *parts = d.split()
                if name in self.whole or name in found:
                    continue
                size //= math.prod(dict(self.sizes)[part] for part in parts)
                taken = {axis for axes in found.values() for axis in axes}
                axes = _leading(mesh, size, _axes_of(entry), taken)
                if axes:
                    found[name] = axes
        return found

    def spec(self, dims: tuple[str, ...], axes: Axes) -> PartitionSpec:
        """How an array lies whose dimensions have these names."""
        return PartitionSpec(*(axes.get(d.split()[0]) for d in dims))


def partitioned(function: Local, rule: Rule, operands: Sequence[Array], *, references: bool = False) -> list[Array]:
    """`function` of the operands, on every device of the mesh that they lie on with its own part of them.

    Args:
        function: takes the axes over which its operands are split, and the operands: with no axes, all of them. Sums
            over a split dimension are its own to make (`jax.lax.psum`). It is not differentiated.
        rule: of its operands and results.
        references: whether it makes some (`jax.new_ref`); then it has no constant that is an array.
    """
    mesh = _mesh(operands)
    if AxisType.Manual in mesh.axis_types:
        return list(function({}, *operands))
    if AxisType.Explicit in mesh.axis_types:
        return _over_explicit_axes(mesh, function, rule, operands)
    if max(jax.device_count(), mesh.size) == 1:
        return list(function({}, *operands))
    return _by_partitioner(function, rule, operands, references)


def laid_out_like(array: Array, other: Array) -> Array:
    """`array` as `other` lies, where explicit axes make that a part of its type: a gradient has its operand's."""
    sharding = jax.typeof(other).sharding
    kinds = sharding.mesh.axis_types
    if AxisType.Explicit not in kinds or AxisType.Manual in kinds:
        return array
    return jax.sharding.reshard(array, sharding)


def _mesh(operands: Sequence[Array]) -> Any:
    """The mesh that is being traced for, or the one that the operands' types name."""
    mesh = jax.sharding.get_abstract_mesh()
    meshes = [jax.typeof(x).sharding.mesh for x in operands]
    return next((other for other in (mesh, *meshes) if not other.empty), mesh)


def _by_partitioner(
    function: Local, rule: Rule, operands: Sequence[Array], references: bool, level: int = 0
) -> list[Array]:
    """Automatic axes. level: how often the function is mapped."""

    def partition(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        arrays = (*arguments, *results)
        axes = rule.axes(mesh, arrays, [array.sharding.spec for array in arrays])

        def lie(arrays: tuple[tuple[str, ...], ...]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, rule.spec(dims, axes)) for dims in arrays)

        # What is returned here may have no references of its own, but an operation that has them inside.
        local = operation(axes) if references else functools.partial(part, axes)
        return mesh, local, lie(rule.results), lie(rule.operands)

    def part(axes: Axes, *operands: Array) -> tuple[Array, ...]:
        return tuple(function(axes, *operands))

    def operation(axes: Axes) -> Callable[..., tuple[Array, ...]]:
        made = custom_partitioning(functools.partial(part, axes))
        made.def_partition(partition, sharding_rule=rule.for_shardy())
        return made

    whole = operation({})
    mapped = custom_batching.custom_vmap(lambda *operands: whole(*operands))

    @mapped.def_vmap
    def over_mapped_axis(size: int, is_mapped: Sequence[bool], *operands: Array) -> tuple[Any, Any]:
        del size
        in_axes = tuple(0 if x else None for x in is_mapped)

        def every(axes: Axes, *operands: Array) -> Sequence[Array]:
            return jax.vmap(functools.partial(part, axes), in_axes)(*operands)

        inner = rule.mapped(f"mapped{level}", is_mapped)
        results = tuple(_by_partitioner(every, inner, operands, references, level + 1))
        return results, (True,) * len(results)

    return list(mapped(*operands))


def _over_explicit_axes(mesh: Any, function: Local, rule: Rule, operands: Sequence[Array]) -> list[Array]:
    """Explicit axes."""
    axes = rule.axes(mesh, operands, [jax.typeof(x).sharding.spec for x in operands])
    placed = [
        jax.sharding.reshard(x, NamedSharding(mesh, rule.spec(dims, axes)))
        for x, dims in zip(operands, rule.operands, strict=True)
    ]
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    run = jax.shard_map(
        lambda *local: tuple(function(axes, *local)), mesh=mesh, axis_names=explicit, check_vma=False,
        in_specs=tuple(rule.spec(dims, axes) for dims in rule.operands),
        out_specs=tuple(rule.spec(dims, axes) for dims in rule.results),
    )  # fmt: skip
    return list(run(*placed))


def _axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of a PartitionSpec's entry."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _leading(mesh: Any, size: int, axes: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """As many of the axes as divide a dimension of that size, the first of them first, none that is taken."""
    found: list[str] = []
    for axis in axes:
        if axis in taken or size % math.prod(mesh.shape[name] for name in (*found, axis)):
            break
        found.append(axis)
    return tuple(found)
