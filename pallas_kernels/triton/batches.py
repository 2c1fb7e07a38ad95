"""`jax.vmap` of the kernels: jax-triton has no rule for it, so a mapped axis is folded into the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax


def folding(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`function(arrays, depth_length)`, every array of which, in and out, has the batch as its first axis, under vmap.

    A mapped axis becomes part of the batch. A mapped depth_length is the exception, as the kernels take one for all
    rows: they then run once for each.
    """

    def call(arrays: Any, depth_length: Any) -> Any:
        if depth_length is None or isinstance(depth_length, int):
            return _folding(lambda arrays, _: function(arrays, depth_length))(arrays, None)
        return _folding(function)(arrays, depth_length)

    return call


def _folding(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    mapped = custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_mapped: list[Any], arrays: Any, depth_length: Any) -> tuple[Any, Any]:
        arrays_mapped, length_mapped = is_mapped
        arrays = jax.tree.map(
            lambda x, has: x if has else jnp.broadcast_to(x, (size, *x.shape)), arrays, arrays_mapped
        )
        if depth_length is not None and length_mapped:
            results = lax.map(lambda pair: mapped(*pair), (arrays, depth_length))
        else:
            folded = jax.tree.map(lambda x: x.reshape(size * x.shape[1], *x.shape[2:]), arrays)
            results = jax.tree.map(
                lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), mapped(folded, depth_length)
            )
        return results, jax.tree.map(lambda _: True, results)

    return mapped
