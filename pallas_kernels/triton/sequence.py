"""The sequence kernels' launches: operands, grids and tiles of forward, dq and dkv."""

from __future__ import annotations

import math
from typing import Any

import jax

from pallas_kernels.block_masks import MaskRows, MaskSpec
from pallas_kernels.operands import Call, Upstream
from pallas_kernels.parts import Part
from pallas_kernels.triton import call as calls
from pallas_kernels.triton import tiles
from pallas_kernels.triton.sequence_dkv import moda_sequence_dkv
from pallas_kernels.triton.sequence_dq import moda_sequence_dq
from pallas_kernels.triton.sequence_forward import moda_sequence_forward


def forward(call: Call, other: Part | None, *, with_rest: bool) -> Part:
    """The sequence part of a call, merged with another part of the same softmax if one is given.

    Args:
        call: bfloat16 or float16, with key and value; its depth part is not looked at.
        other: in the call's dtype; with its rest where `with_rest`.
        with_rest: also return what rounding took from out.
    """
    chosen, masks = _tiles("forward", call), _rows(call)
    absent = call.query  # an operand that no instruction reads
    others = [absent] * 3
    if other is not None:
        others = [other.out, other.lse, other.rest if with_rest else absent]
    outputs = [_like(call.query), jax.ShapeDtypeStruct(call.query.shape[:3], "float32")]
    outputs += [_like(call.query)] if with_rest else []
    results = calls.launch(
        moda_sequence_forward,
        [call.query, call.key, call.value, *others, *_mask_operands(masks, call, chosen, per="query")],
        outputs,
        lengths=_lengths(call), programs=_query_programs(call, chosen), warps=chosen.warps, stages=chosen.stages,
        MERGE=other is not None, **_constants(call, chosen, masks.spec), **({} if with_rest else {"rest": None}),
    )  # fmt: skip
    # XLA would run the kernel a second time to write a stacked copy of `out` (what a scan keeps for its backward) in
    # place: its dynamic-slice fusion clones a custom call whose result has other users too. Not through a barrier.
    return Part(*jax.lax.optimization_barrier(results))


def backward(call: Call, upstream: Upstream) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, dkey, dvalue) of the sequence part, in the inputs' dtype."""
    masks = _rows(call)
    operands = [call.query, call.key, call.value, *upstream]
    chosen = _tiles("dq", call)
    [dquery] = calls.launch(
        moda_sequence_dq, operands + _mask_operands(masks, call, chosen, per="query"), [_like(call.query)],
        lengths=_lengths(call), programs=_query_programs(call, chosen), warps=chosen.warps, stages=chosen.stages,
        **_constants(call, chosen, masks.spec),
    )  # fmt: skip
    chosen = _tiles("dkv", call)
    batch, keys, kv_heads, _ = call.key.shape
    dkey, dvalue = calls.launch(
        moda_sequence_dkv, operands + _mask_operands(masks, call, chosen, per="key"),
        [_like(call.key), _like(call.value)],
        lengths=_lengths(call), programs=batch * kv_heads * math.ceil(keys / chosen.keys),
        warps=chosen.warps, stages=chosen.stages, **_constants(call, chosen, masks.spec),
    )  # fmt: skip
    return dquery, dkey, dvalue


def _tiles(kernel: str, call: Call) -> tiles.SequenceTiles:
    _, tokens, heads, head_dim = call.query.shape
    return tiles.sequence_tiles(kernel, head_dim, tokens, heads // call.num_kv_heads, calls.capability())


def _rows(call: Call) -> MaskRows:
    return MaskRows.of(call.mask, *call.query.shape[:2], call.key.shape[1])


def _lengths(call: Call) -> tuple[int, int]:
    """T and U."""
    return call.query.shape[1], call.key.shape[1]


def _query_programs(call: Call, chosen: tiles.SequenceTiles) -> int:
    batch, tokens, heads, _ = call.query.shape
    parts = math.ceil(heads // call.num_kv_heads / chosen.heads)
    return batch * call.num_kv_heads * parts * math.ceil(tokens / chosen.tokens)


def _mask_operands(masks: MaskRows, call: Call, chosen: tiles.SequenceTiles, per: str) -> list[jax.Array]:
    """query_marks, key_marks, bounds, limit; where they do not apply some array that no instruction reads."""
    bounds = masks.block_bounds(chosen.tokens, chosen.keys, per=per)
    return [call.query if x is None else x for x in (masks.query_rows, masks.key_rows, bounds, masks.limit)]


def _constants(call: Call, chosen: tiles.SequenceTiles, spec: MaskSpec) -> dict[str, Any]:
    """The constants that all three kernels have."""
    heads, head_dim = call.query.shape[2:]
    tokens, keys = _lengths(call)
    return {
        "SCALE": float(call.scale), "KV_HEADS": call.num_kv_heads, "GROUP": heads // call.num_kv_heads, "H": head_dim,
        "COLUMNS": tiles.columns(head_dim), "ROWS": chosen.rows, "TOKENS": chosen.tokens, "HEADS": chosen.heads,
        "KEYS": chosen.keys, "WHOLE": tokens % chosen.tokens == 0 and keys % chosen.keys == 0,
        "CAUSAL": spec.causal, "POSITIONS": spec.positions, "SEGMENTS": spec.segments, "LIMIT": spec.limit,
    }  # fmt: skip


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
