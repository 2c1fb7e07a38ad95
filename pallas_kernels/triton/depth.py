"""The depth kernels' launches: operands, grids and tiles of forward and backward."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.triton import call, tiles
from pallas_kernels.triton.depth_backward import moda_depth_backward
from pallas_kernels.triton.depth_forward import moda_depth_forward


def forward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    depth_length: int | jax.Array | None,
    *,
    scale: float,
    with_rest: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """softmax(scale * q . K_depth) @ V_depth over the first `depth_length` slots of each token.

    Args:
        query: [B, T, N, H], bfloat16 or float16.
        depth_key, depth_value: [B, T, S, K, H], S at least 1. Slots from `depth_length` on are never read.
        depth_length: filled slots, int or int32 scalar in 0..S; None: all.
        scale: factor of the logits.
        with_rest: also return what rounding took from out.

    Returns:
        (out [B, T, N, H], lse float32 [B, T, N], rest [B, T, N, H] or None); no filled slot: out 0, lse -inf.
    """
    chosen = _tiles("forward", query, depth_key)
    kv_heads = depth_key.shape[3]
    parts = math.ceil(query.shape[2] // kv_heads / chosen.rows)
    like_query = jax.ShapeDtypeStruct(query.shape, query.dtype)
    out, lse, *rest = call.launch(
        moda_depth_forward,
        [query, depth_key, depth_value, _filled(depth_key, depth_length)],
        [like_query, jax.ShapeDtypeStruct(query.shape[:3], "float32"), *([like_query] if with_rest else [])],
        programs=query.shape[0] * query.shape[1] * kv_heads * parts, warps=chosen.warps, stages=chosen.stages,
        **_constants(query, depth_key, chosen, scale), **({} if with_rest else {"rest": None}),
    )  # fmt: skip
    return out, lse, rest[0] if with_rest else None


def backward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    depth_length: int | jax.Array | None,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    dquery: jax.Array | None = None,
    depth_key_gradient: jax.Array | None = None,
    depth_value_gradient: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the depth part, given the (merged) lse and delta.

    Args:
        query, dout: [B, T, N, H]; depth_key, depth_value: [B, T, S, K, H], S at least 1; bfloat16 or float16.
        depth_length, scale: as in the forward.
        lse, delta: float32 [B, T, N]; lse natural log, -inf where a query saw nothing.
        dquery: [B, T, N, H], an array to which the query's gradient is added (the sequence part's), or None.
        depth_key_gradient, depth_value_gradient: [B, T, S, K, H] of any float dtype: the gradients are added to their
            first `depth_length` slots, in place where the caller's value is not needed any more.

    Returns:
        (dquery [B, T, N, H], ddepth_key, ddepth_value [B, T, S, K, H]): fresh arrays, in the inputs' dtype, have zeros
        in unfilled slots; given buffers come back with their dtype.
    """
    chosen = _tiles("backward", query, depth_key)
    absent = query  # an operand that no instruction reads
    added, adds = dquery is not None, depth_key_gradient is not None
    buffers = [depth_key_gradient, depth_value_gradient] if adds else [absent, absent]
    gradients = buffers if adds else [depth_key, depth_value]
    aliases = {7: 0} if added else {}
    if adds:
        aliases |= {8: 1, 9: 2}
    return tuple(
        call.launch(
            moda_depth_backward,
            [
                query, depth_key, depth_value, dout, lse, delta, _filled(depth_key, depth_length),
                dquery if added else absent, *buffers,
            ],
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, *gradients)],
            programs=query.shape[0] * query.shape[1] * depth_key.shape[3], warps=chosen.warps, stages=chosen.stages,
            aliases=aliases, ADDED=added, ADDS=adds, **_constants(query, depth_key, chosen, scale),
        )
    )  # fmt: skip


def _tiles(kernel: str, query: jax.Array, depth_key: jax.Array) -> tiles.DepthTiles:
    return tiles.depth_tiles(kernel, query.shape[3], depth_key.shape[2], query.shape[2] // depth_key.shape[3])


def _filled(depth_key: jax.Array, depth_length: int | jax.Array | None) -> jax.Array:
    """int32 [1]."""
    return jnp.asarray(depth_key.shape[2] if depth_length is None else depth_length, jnp.int32).reshape(1)


def _constants(query: jax.Array, depth_key: jax.Array, chosen: tiles.DepthTiles, scale: float) -> dict[str, Any]:
    """The constants that both kernels have."""
    slots, kv_heads, head_dim = depth_key.shape[2:]
    return {
        "SCALE": float(scale), "KV_HEADS": kv_heads, "GROUP": query.shape[2] // kv_heads, "ALLOCATED": slots,
        "H": head_dim, "COLUMNS": tiles.columns(head_dim), "ROWS": chosen.rows, "SLOTS": chosen.slots,
    }  # fmt: skip
