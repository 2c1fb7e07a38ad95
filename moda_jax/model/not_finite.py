"""A walk over the layers that counts, in each one's result, the values that are not finite."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.stack import Stack, Step

Array = jax.Array


class _Counts(Step):
    """Leaves behind how many values of each layer's result are not finite."""

    def leave(self, left: Any, carry: Any) -> Array:
        return sum(jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(carry))


def counted_layers(module: Stack, x: Array, positions: Array, segment_ids: Array) -> tuple[Array, Array, int]:
    """Runs all layers.

    Args:
        module: the model.
        x, positions, segment_ids: as in `Stack.walk`.

    Returns:
        The final norm's output; the layers' counts, int32 [L]; how many values a layer's result has.
    """
    graph, params = nnx.split(module)
    hidden, counts = _walk(graph, params, x, positions, segment_ids)
    last = module.last_layer.depth
    carry = jax.eval_shape(lambda x: last.begin(module.config, x)[0], x)
    return hidden, counts, sum(leaf.size for leaf in jax.tree.leaves(carry))


@functools.partial(jax.jit, static_argnums=0)
def _walk(graph: nnx.GraphDef, params: Any, x: Array, positions: Array, segment_ids: Array) -> tuple[Array, Array]:
    hidden, counts, _ = nnx.merge(graph, params).walk(x, positions, segment_ids, _Counts())
    return hidden, counts
