"""Parameters and optimizer state on the mesh: their shardings, the gather of one layer, the padded vocabulary.

Storage is split over fsdp and tensor. A layer's parameters are gathered over fsdp where they are used, inside the layer
loop, so that one layer's full matrices exist at a time; their gradient goes straight back to the split layout. Over
tensor they stay split.

A training state's vocabulary is padded with rows of zeros, on every mesh to the same size, so that its products run on
aligned sizes and mesh.tensor divides it. Padded rows get no gradient (their logits are masked) and stay zero.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moda_jax.parallel.mesh import FIELDS, RULES, current_mesh, partition_spec
from moda_jax.parameter import ParameterKind, ParameterKinds

Array = jax.Array

# At 100278 the rows are not aligned as the tensor cores' fast kernels want them: the loss's three products were seen to
# take 70 ms on an H100 where 30 are expected, and do at a multiple of 128. The 3 is for mesh.tensor = 3, 6 and 12.
VOCABULARY_MULTIPLE = 3 * 128


def padded_vocabulary(vocab_size: int) -> int:
    """Rows stored for `vocab_size` tokens in a training state."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def pad_vocabulary(tree: Any, kinds: ParameterKinds, rows: int) -> Any:
    """A training state, or its parameters, with every vocabulary axis padded with zeros, or cut, to `rows`."""

    def resized(path: tuple, leaf: Array) -> Array:
        axes = kinds.axes(path, leaf.ndim)
        if "vocabulary" not in axes:
            return leaf
        axis = axes.index("vocabulary")
        if leaf.shape[axis] >= rows:
            return jax.lax.slice_in_dim(leaf, 0, rows, axis=axis)
        return jnp.pad(leaf, [(0, rows - size if i == axis else 0) for i, size in enumerate(leaf.shape)])

    return jax.tree.map_with_path(resized, tree)


def state_shardings(mesh: Mesh | AbstractMesh, state: Any, kinds: ParameterKinds) -> Any:
    """The NamedSharding of every leaf of a training state (or of its parameters alone); moments follow parameters."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(*kinds.axes(path, leaf.ndim))), state
    )


def check_divisible(sizes: dict[str, int], params: Any, kinds: ParameterKinds) -> None:
    """Checks that every split dimension of every parameter divides by its mesh axes.

    Args:
        sizes: devices along each mesh axis.
        params: arrays or shapes, vocabulary padded.
        kinds: what they are.

    Raises:
        ValueError: naming parameter, axis and sizes.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        for axis, size in zip(kinds.axes(path, leaf.ndim), leaf.shape, strict=True):
            for mesh_axis in RULES[axis] if axis is not None else ():
                if size % sizes[mesh_axis]:
                    field = f" ({FIELDS[axis]})" if axis in FIELDS else ""
                    raise ValueError(
                        f"mesh.{mesh_axis}={sizes[mesh_axis]}: does not divide axis {axis}{field} of size {size} of "
                        f"parameter {'.'.join(str(key.key) for key in path)}, shape {tuple(leaf.shape)}"
                    )


@dataclasses.dataclass(frozen=True)
class LayerGather:
    """One layer's parameters, whole over fsdp; as they are where there is no mesh. The gradient comes back split.

    Attributes:
        kinds: what they are.
    """

    kinds: ParameterKinds

    def __call__(self, params: Any) -> Any:
        """The same pytree."""
        mesh = current_mesh()
        return params if mesh is None or mesh.shape["fsdp"] == 1 else self.kinds.map(_gathered, params)


def _gathered(kind: ParameterKind, array: Array) -> Array:
    split = partition_spec(*kind.stacked_axes(array.ndim))
    whole = PartitionSpec(*(None if part == "fsdp" else part for part in split))
    return array if split == whole else _gather(array, split, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, split: PartitionSpec, whole: PartitionSpec) -> Array:
    # Pinned before and after: else the partitioner may move the gather out of the loop, to all layers at once.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


def _gather_fwd(x, split, whole):
    return _gather(x, split, whole), None


def _gather_bwd(split, whole, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_fwd, _gather_bwd)
