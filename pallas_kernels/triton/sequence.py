"""The sequence kernels' launches: operands, grids and tiles of forward, dq and dkv."""

from __future__ import annotations

import math
from typing import Any

import jax

from pallas_kernels.mosaic_gpu import masks as masks_lib
from pallas_kernels.triton import call, tiles
from pallas_kernels.triton.sequence_dkv import moda_sequence_dkv
from pallas_kernels.triton.sequence_dq import moda_sequence_dq
from pallas_kernels.triton.sequence_forward import moda_sequence_forward


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    other_out: jax.Array | None,
    other_lse: jax.Array | None,
    other_rest: jax.Array | None,
    *,
    scale: float,
    masks: masks_lib.Masks,
    with_rest: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """softmax(scale * query key^T) value over the visible keys, merged with another block if one is given.

    Args:
        query: [B, T, N, H], bfloat16 or float16.
        key, value: [B, U, K, H], K divides N.
        other_out, other_lse, other_rest: [B, T, N, H], float32 [B, T, N] (natural log) and, where `with_rest`,
            [B, T, N, H] of another block of the same softmax; all None: no merge.
        scale: factor of the logits.
        masks: from `masks.prepare`.
        with_rest: also return what rounding took from out.

    Returns:
        (out [B, T, N, H], lse float32 [B, T, N], natural log, -inf where nothing is visible, rest [B, T, N, H] or None)
    """
    chosen = _tiles("forward", query, key)
    merge = other_out is not None
    absent = query  # an operand that no instruction reads
    outputs = [_like(query), jax.ShapeDtypeStruct(query.shape[:3], "float32")]
    outputs += [_like(query)] if with_rest else []
    results = call.launch(
        moda_sequence_forward,
        [
            query, key, value,
            other_out if merge else absent, other_lse if merge else absent,
            other_rest if merge and with_rest else absent,
            *_mask_operands(masks, query, key, chosen, per="query"),
        ],
        outputs,
        lengths=(query.shape[1], key.shape[1]),
        programs=_query_programs(query, key, chosen), warps=chosen.warps, stages=chosen.stages, MERGE=merge,
        **_constants(query, key, chosen, scale, masks.spec), **({} if with_rest else {"rest": None}),
    )  # fmt: skip
    return results[0], results[1], results[2] if with_rest else None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    masks: masks_lib.Masks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, dkey, dvalue) in the inputs' dtype, given the (merged) lse and delta, float32 [B, T, N]."""
    operands = [query, key, value, dout, lse, delta]
    lengths = query.shape[1], key.shape[1]
    chosen = _tiles("dq", query, key)
    [dquery] = call.launch(
        moda_sequence_dq, operands + _mask_operands(masks, query, key, chosen, per="query"), [_like(query)],
        lengths=lengths, programs=_query_programs(query, key, chosen), warps=chosen.warps, stages=chosen.stages,
        **_constants(query, key, chosen, scale, masks.spec),
    )  # fmt: skip
    chosen = _tiles("dkv", query, key)
    dkey, dvalue = call.launch(
        moda_sequence_dkv, operands + _mask_operands(masks, query, key, chosen, per="key"), [_like(key), _like(value)],
        lengths=lengths, programs=key.shape[0] * key.shape[2] * math.ceil(key.shape[1] / chosen.keys),
        warps=chosen.warps, stages=chosen.stages,
        **_constants(query, key, chosen, scale, masks.spec),
    )  # fmt: skip
    return dquery, dkey, dvalue


def _tiles(kernel: str, query: jax.Array, key: jax.Array) -> tiles.SequenceTiles:
    group = query.shape[2] // key.shape[2]
    return tiles.sequence_tiles(kernel, query.shape[3], query.shape[1], group, call.capability())


def _query_programs(query: jax.Array, key: jax.Array, chosen: tiles.SequenceTiles) -> int:
    batch, tokens, heads, _ = query.shape
    parts = math.ceil(heads // key.shape[2] / chosen.heads)
    return batch * key.shape[2] * parts * math.ceil(tokens / chosen.tokens)


def _mask_operands(
    masks: masks_lib.Masks, query: jax.Array, key: jax.Array, chosen: tiles.SequenceTiles, per: str
) -> list[jax.Array]:
    """query_marks, key_marks, bounds, limit; where they do not apply some array that no instruction reads."""
    bounds = masks_lib.block_bounds(
        masks, query.shape[0], query.shape[1], key.shape[1], chosen.tokens, chosen.keys, per=per
    )
    return [query if x is None else x for x in (masks.query_rows, masks.key_rows, bounds, masks.limit)]


def _constants(
    query: jax.Array, key: jax.Array, chosen: tiles.SequenceTiles, scale: float, spec: masks_lib.MaskSpec
) -> dict[str, Any]:
    """The constants that all three kernels have."""
    head_dim, kv_heads = query.shape[3], key.shape[2]
    return {
        "SCALE": float(scale), "KV_HEADS": kv_heads, "GROUP": query.shape[2] // kv_heads, "H": head_dim,
        "COLUMNS": tiles.columns(head_dim), "ROWS": chosen.rows, "TOKENS": chosen.tokens, "HEADS": chosen.heads,
        "KEYS": chosen.keys, "WHOLE": query.shape[1] % chosen.tokens == 0 and key.shape[1] % chosen.keys == 0,
        "CAUSAL": spec.causal, "POSITIONS": spec.positions, "SEGMENTS": spec.segments, "LIMIT": spec.limit,
    }  # fmt: skip


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
