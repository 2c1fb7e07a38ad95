"""The device mesh and the one table that says which logical axis is split over which mesh axis.

Every array of the training step names its dimensions by logical axes ("batch", "kv_heads", ...). `RULES` maps them to
the mesh's axes; nothing else in the package names a mesh axis for a dimension. The model asks for a layout with
`constrain`, which does nothing where no mesh is set: on one device the program is the same as without this module.

    data      batch
    fsdp      batch; and the width of parameters and optimizer state, which are gathered per layer
    tensor    heads, KV heads, FFN channels, vocabulary
    context   tokens
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moda_jax.config import Config, MeshConfig

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes that it is split over. "width" is D of a parameter, "channels" D of an activation or a norm.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "channels": (),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),
    "slots": (),
    "pair": (),  # key and value of a depth projection
}

# The config field that sets a logical axis' size, for messages.
FIELDS = {
    "width": "model.width",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "ffn": "model.ffn_width",
}


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are these logical axes; None: not split.

    Raises:
        ValueError: an unknown axis, or two dimensions that want the same mesh axis.
    """
    taken: list[str] = []
    parts = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r}: no rule in RULES; known: {', '.join(RULES)}")
        mesh_axes = RULES[axis] if axis is not None else ()
        taken += mesh_axes
        parts.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    if len(set(taken)) != len(taken):
        raise ValueError(f"logical axes {axes}: two of them are split over the same mesh axis ({', '.join(taken)})")
    return PartitionSpec(*parts)


def current_mesh() -> AbstractMesh | None:
    """The mesh that the function being traced runs on, as `on_mesh` set it; None: one device, or another's mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def constrain(x: Any, *axes: str | None) -> Any:
    """`x` laid out as the logical axes of its dimensions say; as it is where there is no mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*axes))


def on_mesh[**A, R](mesh: Mesh | AbstractMesh | None, function: Callable[A, R]) -> Callable[A, R]:
    """`function`, traced with `mesh` as the current one; itself where `mesh` is None."""
    if mesh is None:
        return function
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh

    @functools.wraps(function)
    def traced(*args: A.args, **kwargs: A.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(abstract):
            return function(*args, **kwargs)

    return traced


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, with -1 replaced by what the others leave.

    Raises:
        ValueError: the product is not, or cannot be made, the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if num_devices % known:
            raise ValueError(
                f"{text}: the fixed sizes have the product {known}, which does not divide the {num_devices} devices"
            )
        return {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
    if known != num_devices:
        raise ValueError(
            f"{text}: the product is {known}, expected the number of devices, {num_devices}; set one axis to -1 for "
            "the rest, or show JAX fewer devices (CUDA_VISIBLE_DEVICES)"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh over all devices of all processes; None where there is one device.

    Devices of one process are neighbours, the last axes innermost: tensor and context stay inside a machine as long as
    their product divides its devices.

    Args:
        config: the mesh section.
        devices: None: `jax.devices()`.

    Raises:
        ValueError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    if len(devices) == 1:
        return None
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def named_sharding(mesh: Mesh | AbstractMesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(*axes))


def check_config(config: Config, sizes: dict[str, int]) -> None:
    """Checks that the batch and the sequence can be split; parameters are checked by `parameters.check_divisible`.

    Raises:
        ValueError: with the fields and sizes.
    """
    rows = sizes["data"] * sizes["fsdp"]
    parts = rows * config.train.accumulation_steps
    if config.train.batch_size % parts:
        raise ValueError(
            f"train.batch_size={config.train.batch_size}: expected a multiple of {parts} = mesh.data={sizes['data']} x "
            f"mesh.fsdp={sizes['fsdp']} x train.accumulation_steps={config.train.accumulation_steps}"
        )
    context, length = sizes["context"], config.data.sequence_length
    if context > 1 and length % (2 * context):
        raise ValueError(
            f"data.sequence_length={length}: expected a multiple of {2 * context} = 2 x mesh.context={context} (every "
            "device takes one early and one late piece of the sequence)"
        )
