"""`jax.vmap` of the kernels: jax-triton has no rule for it, so a mapped axis is folded into the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax


def folding(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`function(arrays, window)`, all whose arrays, in and out, have the batch as their first axis, under vmap.

    A mapped axis becomes part of the batch. A mapped window (of slots, or None) is the exception, as a kernel takes one
    for all rows: it then runs once for each.
    """
    mapped = custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_mapped: list[Any], arrays: Any, window: Any) -> tuple[Any, Any]:
        arrays_mapped, window_mapped = is_mapped
        arrays = jax.tree.map(lambda x, has: x if has else jnp.broadcast_to(x, (size, *x.shape)), arrays, arrays_mapped)
        if window is not None and window_mapped:
            results = lax.map(lambda pair: mapped(*pair), (arrays, window))
        else:
            folded = jax.tree.map(lambda x: x.reshape(size * x.shape[1], *x.shape[2:]), arrays)
            results = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), mapped(folded, window))
        return results, jax.tree.map(lambda _: True, results)

    return mapped
