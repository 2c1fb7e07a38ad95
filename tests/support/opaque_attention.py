"""An implementation of the op that XLA's partitioner cannot look into: as a kernel, on every device.

What it computes is the blockwise implementation's. Where XLA has to split it, every device gets all of it.
"""

from __future__ import annotations

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.xla import implementation


def check_supported(call):
    del call


def forward(call, *, with_rest=False):
    return _opaque(lambda call: implementation.forward(call, with_rest=with_rest), call)


def backward(call, upstream, buffers=None):
    return _opaque(implementation.backward, call, upstream, buffers)


def _opaque(function, *trees):
    leaves, tree = jax.tree.flatten(trees)
    shapes, results = jax.tree.flatten(jax.eval_shape(function, *trees))

    def flat(*leaves):
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    def partition(mesh, arguments, results):
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, flat, (whole,) * len(results), (whole,) * len(arguments)

    names = iter(range(1000))
    rule = " -> ".join(
        ", ".join(" ".join(f"d{next(names)}" for _ in array.shape) for array in arrays) for arrays in (leaves, shapes)
    )
    operation = custom_partitioning(flat)
    operation.def_partition(partition, sharding_rule=rule)
    mapped = custom_vmap(lambda *leaves: operation(*leaves))
    mapped.def_vmap(
        lambda size, is_mapped, *leaves: (
            jax.vmap(flat, tuple(0 if x else None for x in is_mapped))(*leaves), (True,) * len(shapes),
        )
    )  # fmt: skip
    return jax.tree.unflatten(results, mapped(*leaves))
