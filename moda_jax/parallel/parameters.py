"""Parameters and optimizer state on the mesh: logical axes by name, the gather of one layer, the padded vocabulary.

Storage is split over fsdp and tensor. A layer's parameters are gathered over fsdp where they are used, inside the layer
loop, so that one layer's full matrices exist at a time; their gradient goes straight back to the split layout. Over
tensor they stay split.

The vocabulary need not divide by mesh.tensor: its rows are padded with zeros in memory, so that every device has as
many and the logits' products run on aligned sizes. Padded rows get no gradient (their logits are masked) and stay zero.
A checkpoint holds the model without them, whatever the mesh was.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moda_jax.numerics.loss_chunks import VOCABULARY_MULTIPLE
from moda_jax.parallel.mesh import FIELDS, RULES, current_mesh, partition_spec

Array = jax.Array

# Logical axes by the last two names of a parameter. Stacked layers have "layers" in front. Depth mechanisms add theirs.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding.table": ("vocabulary", "width"),
    "head.kernel": ("width", "vocabulary"),
    "query.kernel": ("width", "heads", "head_dim"),
    "key.kernel": ("width", "kv_heads", "head_dim"),
    "value.kernel": ("width", "kv_heads", "head_dim"),
    "output.kernel": ("heads", "head_dim", "width"),
    "query_norm.scale": ("heads",),  # N x H, head by head
    "key_norm.scale": ("kv_heads",),
    "gate.kernel": ("width", "ffn"),
    "up.kernel": ("width", "ffn"),
    "down.kernel": ("ffn", "width"),
    "attention_norm.scale": ("channels",),
    "ffn_norm.scale": ("channels",),
    "final_norm.scale": ("channels",),
}


def register_axes(axes: dict[str, tuple[str | None, ...]]) -> None:
    """Enters parameters into PARAMETER_AXES.

    Raises:
        ValueError: a parameter of that name has other axes already, or an axis has no rule.
    """
    for name, new in axes.items():
        partition_spec(*new)
        if PARAMETER_AXES.setdefault(name, new) != new:
            raise ValueError(f"parameter {name}: has the logical axes {PARAMETER_AXES[name]} already, not {new}")


def parameter_axes(path: tuple, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of a leaf of the training state, by its path; a scalar and a PRNG key have none.

    Args:
        path: key path of the leaf, in the parameters, in the optimizer's state, or in one layer's parameters.
        ndim: its rank; one more than the table's is a stack of layers.

    Raises:
        ValueError: a parameter that the table does not know.
    """
    if ndim == 0:
        return ()
    names = _names(path)
    axes = PARAMETER_AXES.get(".".join(names[-2:]))
    if axes is None or ndim - len(axes) not in (0, 1):
        raise ValueError(
            f"parameter {'.'.join(names)} of rank {ndim}: no logical axes in PARAMETER_AXES, so it cannot be sharded"
        )
    return axes if ndim == len(axes) else ("layers", *axes)


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """Rows stored for `vocab_size` tokens: a multiple of VOCABULARY_MULTIPLE on each of mesh.tensor devices."""
    multiple = tensor * VOCABULARY_MULTIPLE
    return -(-vocab_size // multiple) * multiple


def has_vocabulary(path: tuple, leaf: Any) -> bool:
    """Whether one of the leaf's dimensions is the vocabulary."""
    return "vocabulary" in parameter_axes(path, leaf.ndim)


def resize_vocabulary(path: tuple, leaf: Array, rows: int) -> Array:
    """The leaf with its vocabulary axis, if it has one, padded with zeros or cut to `rows`."""
    if not has_vocabulary(path, leaf):
        return leaf
    axis = parameter_axes(path, leaf.ndim).index("vocabulary")
    if leaf.shape[axis] >= rows:
        return jax.lax.slice_in_dim(leaf, 0, rows, axis=axis)
    return jnp.pad(leaf, [(0, rows - size if i == axis else 0) for i, size in enumerate(leaf.shape)])


def pad_vocabulary(tree: Any, rows: int) -> Any:
    """The tree with every vocabulary axis padded with zeros, or cut, to `rows`."""
    return jax.tree.map_with_path(lambda path, leaf: resize_vocabulary(path, leaf, rows), tree)


def state_shardings(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """The NamedSharding of every leaf of a training state (or of its parameters alone); moments follow parameters."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(*parameter_axes(path, leaf.ndim))), state
    )


def saved_shardings(mesh: Mesh, state: Any) -> Any:
    """As `state_shardings`, for the state as it is saved, where the vocabulary divides by nothing: the width instead.

    Args:
        mesh: the mesh.
        state: without padding.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        axes = parameter_axes(path, leaf.ndim)
        if "vocabulary" not in axes:
            return NamedSharding(mesh, partition_spec(*axes))
        whole = ("fsdp", "tensor")
        width = leaf.shape[axes.index("width")]
        parts = whole if width % (mesh.shape["fsdp"] * mesh.shape["tensor"]) == 0 else ("fsdp",)
        return NamedSharding(mesh, PartitionSpec(*(parts if axis == "width" else None for axis in axes)))

    return jax.tree.map_with_path(sharding, state)


def check_divisible(sizes: dict[str, int], params: Any) -> None:
    """Checks that every split dimension of every parameter divides by its mesh axes.

    Args:
        sizes: devices along each mesh axis.
        params: arrays or shapes, vocabulary padded.

    Raises:
        ValueError: naming parameter, axis and sizes.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        for axis, size in zip(parameter_axes(path, leaf.ndim), leaf.shape, strict=True):
            for mesh_axis in RULES[axis] if axis is not None else ():
                if size % sizes[mesh_axis]:
                    field = f" ({FIELDS[axis]})" if axis in FIELDS else ""
                    raise ValueError(
                        f"mesh.{mesh_axis}={sizes[mesh_axis]}: does not divide axis {axis}{field} of size {size} of "
                        f"parameter {'.'.join(_names(path))}, shape {tuple(leaf.shape)}"
                    )


def gather_layer(params: Any) -> Any:
    """One layer's parameters, whole over fsdp; as they are where there is no mesh. The gradient comes back split."""
    mesh = current_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params

    def gather(path: tuple, leaf: Array) -> Array:
        split = partition_spec(*parameter_axes(path, leaf.ndim))
        whole = PartitionSpec(*(None if part == "fsdp" else part for part in split))
        return leaf if split == whole else _gather(leaf, split, whole)

    return jax.tree.map_with_path(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, split: PartitionSpec, whole: PartitionSpec) -> Array:
    # Pinned before and after: else the partitioner may move the gather out of the loop, to all layers at once.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


def _gather_fwd(x, split, whole):
    return _gather(x, split, whole), None


def _gather_bwd(split, whole, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _names(path: tuple) -> tuple[str, ...]:
    """The names in a key path, without list indices and, at the end, Flax's name for a variable's array."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    if names[-1] in ("value", "raw_value"):
        names.pop()
    return tuple(name for name in names if isinstance(name, str))
