"""The depth kernels' launches: operands, grids and tiles of forward and backward."""

from __future__ import annotations

import math
from typing import Any

import jax

from pallas_kernels.operands import Call, Upstream
from pallas_kernels.parts import Part
from pallas_kernels.triton import call as calls
from pallas_kernels.triton import tiles
from pallas_kernels.triton.depth_backward import moda_depth_backward
from pallas_kernels.triton.depth_forward import moda_depth_forward


def forward(call: Call, window: jax.Array, *, with_rest: bool) -> Part:
    """The depth part of a call.

    Args:
        call: bfloat16 or float16, with at least one slot; its sequence part and its window are not looked at.
        window: int32 [2], the slots [begin, end) that are seen; others are never read.
        with_rest: also return what rounding took from out.
    """
    chosen = _tiles("forward", call)
    batch, tokens, heads, _ = call.query.shape
    parts = math.ceil(heads // call.num_kv_heads / chosen.rows)
    like_query = jax.ShapeDtypeStruct(call.query.shape, call.query.dtype)
    results = calls.launch(
        moda_depth_forward,
        [call.query, call.depth.key, call.depth.value, window],
        [like_query, jax.ShapeDtypeStruct(call.query.shape[:3], "float32"), *([like_query] if with_rest else [])],
        programs=batch * tokens * call.num_kv_heads * parts, warps=chosen.warps, stages=chosen.stages,
        **_constants(call, chosen), **({} if with_rest else {"rest": None}),
    )  # fmt: skip
    return Part(*results)


def backward(
    call: Call,
    window: jax.Array,
    upstream: Upstream,
    dquery: jax.Array | None,
    buffers: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, ddepth_key, ddepth_value) of the depth part.

    Args:
        call, window: as in the forward.
        upstream: of the whole softmax.
        dquery: [B, T, N, H], an array to which the query's gradient is added (the sequence part's), or None.
        buffers: as in `pallas_kernels.dispatch`; None: fresh arrays, with zeros in slots that are not seen.
    """
    chosen = _tiles("backward", call)
    absent = call.query  # an operand that no instruction reads
    gradients = (call.depth.key, call.depth.value) if buffers is None else buffers
    aliases = {} if dquery is None else {7: 0}
    aliases |= {} if buffers is None else {8: 1, 9: 2}
    batch, tokens = call.query.shape[:2]
    results = calls.launch(
        moda_depth_backward,
        [
            call.query, call.depth.key, call.depth.value, *upstream, window,
            absent if dquery is None else dquery, *((absent, absent) if buffers is None else buffers),
        ],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (call.query, *gradients)],
        programs=batch * tokens * call.num_kv_heads, warps=chosen.warps, stages=chosen.stages, aliases=aliases,
        ADDED=dquery is not None, ADDS=buffers is not None, **_constants(call, chosen),
    )  # fmt: skip
    return tuple(results)


def _tiles(kernel: str, call: Call) -> tiles.DepthTiles:
    return tiles.depth_tiles(kernel, call.query.shape[3], call.slots, call.query.shape[2] // call.num_kv_heads)


def _constants(call: Call, chosen: tiles.DepthTiles) -> dict[str, Any]:
    """The constants that both kernels have."""
    heads, head_dim = call.query.shape[2:]
    return {
        "SCALE": float(call.scale), "KV_HEADS": call.num_kv_heads, "GROUP": heads // call.num_kv_heads,
        "ALLOCATED": call.slots, "H": head_dim, "COLUMNS": tiles.columns(head_dim), "ROWS": chosen.rows,
        "SLOTS": chosen.slots,
    }  # fmt: skip
