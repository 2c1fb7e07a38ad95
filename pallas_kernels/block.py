"""The internal block beneath the public op: forward and backward as separate pure functions, for one block of keys.

Distribution, decoding and the layer loop build on it: queries and keys may differ in length, positions and segment ids
are explicit, a row of keys may be filled only in part, and the backward takes lse and delta from outside, *merged* over
all the blocks that one softmax spans. Each block then recomputes its own probabilities exactly:

    P = exp(query . key * scale - lse),  dP = dout . value,  dS = P * (dP - delta),  delta = rowsum(dout * out) - dlse

Axes: B batch, T queries, U keys, S depth slots, N query heads, K key/value heads, G = N / K, H head_dim. Query head n
reads key/value head n // G. Nothing here is validated beyond what an implementation supports: callers pass what
`pallas_kernels.api` has checked or what they built themselves.
"""

from __future__ import annotations

from jax import Array

from pallas_kernels import dispatch


def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None = None,
    depth_value: Array | None = None,
    depth_length: int | Array | None = None,
    *,
    scale: float,
    causal: bool,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    key_length: Array | None = None,
    with_rest: bool = False,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """Attention of T queries over U keys of the sequence and the filled depth slots of each query's own token.

    Args:
        query: [B, T, N, H].
        key, value: [B, U, K, H], the query's dtype.
        depth_key, depth_value: [B, T, S, K, H], or None for no depth part.
        depth_length: filled slots, an int or an int32 scalar within 0..S; None: all S.
        scale: multiplies the logits.
        causal: a query sees keys with key_position <= query_position.
        query_positions, key_positions: int32 [B, T] and [B, U]; None: 0..T-1 and 0..U-1.
        query_segment_ids, key_segment_ids: int32 [B, T] and [B, U], both or neither; equal ids see each other.
        key_length: int32 [B]; keys at an index >= key_length are invisible, but for "mosaic_gpu" they have to be
            finite, and their values too.
        with_rest: also return `rest`, what rounding took from out. out + rest, in float32, is what parts are best
            merged from, and what delta needs where a softmax is peaked.
        implementation: a name, or None for the best on this device.

    Returns:
        out [B, T, N, H], lse [B, T, N] float32, and with `with_rest` rest [B, T, N, H] in the query's dtype, or None if
        that is float32. A query that sees nothing: out 0, lse -inf.

    Raises:
        ValueError: no implementation of that name.
        NotImplementedError: the named implementation cannot serve the call.
    """
    masks = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_segment_ids": query_segment_ids,
        "key_segment_ids": key_segment_ids,
        "key_length": key_length,
    }
    name = dispatch.resolve(implementation, **attention_facts(query, key, depth_key, causal, scale, **masks))
    results = dispatch.load(name).attention_forward(
        query, key, value, depth_key, depth_value, depth_length, scale=scale, causal=causal, **masks,
        with_rest=with_rest,
    )  # fmt: skip
    return results if with_rest else results[:2]


def attention_backward(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None,
    depth_value: Array | None,
    depth_length: int | Array | None,
    dout: Array,
    lse: Array,
    delta: Array,
    *,
    scale: float,
    causal: bool,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    key_length: Array | None = None,
    depth_key_gradient: Array | None = None,
    depth_value_gradient: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of one block, given lse and delta of the whole softmax.

    Args:
        query ... key_length, implementation: as in `attention_forward`.
        dout: [B, T, N, H], gradient of the merged output.
        lse, delta: [B, T, N] float32, merged over all blocks; delta = rowsum(dout * out) - dlse.
        depth_key_gradient, depth_value_gradient: buffers [B, T, S, K, H] of any float dtype, both or neither. The depth
            gradients are added to their first `depth_length` slots, in place when the caller donates or carries them
            through a loop; the other slots are not touched.

    Returns:
        dquery, dkey, dvalue in the inputs' dtype, and ddepth_key, ddepth_value: the sums if buffers were given, else
        fresh arrays in the inputs' dtype, zero in unfilled slots; None without a depth part.

    Raises:
        ValueError, NotImplementedError: as `attention_forward`.
    """
    masks = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_segment_ids": query_segment_ids,
        "key_segment_ids": key_segment_ids,
        "key_length": key_length,
    }
    name = dispatch.resolve(implementation, **attention_facts(query, key, depth_key, causal, scale, **masks))
    return dispatch.load(name).attention_backward(
        query, key, value, depth_key, depth_value, depth_length, dout, lse, delta, scale=scale, causal=causal, **masks,
        depth_key_gradient=depth_key_gradient, depth_value_gradient=depth_value_gradient,
    )  # fmt: skip


def depth_forward(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    depth_length: int | Array | None = None,
    *,
    scale: float,
    with_rest: bool = False,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """The depth part alone: (out, lse[, rest]) as in `attention_forward`. No filled slot: out 0, lse -inf."""
    name = dispatch.resolve(implementation, **depth_facts(query, depth_key, scale))
    results = dispatch.load(name).depth_forward(
        query, depth_key, depth_value, depth_length, scale=scale, with_rest=with_rest
    )
    return results if with_rest else results[:2]


def depth_backward(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    depth_length: int | Array | None,
    dout: Array,
    lse: Array,
    delta: Array,
    *,
    scale: float,
    depth_key_gradient: Array | None = None,
    depth_value_gradient: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, Array]:
    """The depth part's gradients alone: (dquery, ddepth_key, ddepth_value) as in `attention_backward`."""
    name = dispatch.resolve(implementation, **depth_facts(query, depth_key, scale))
    return dispatch.load(name).depth_backward(
        query, depth_key, depth_value, depth_length, dout, lse, delta, scale=scale,
        depth_key_gradient=depth_key_gradient, depth_value_gradient=depth_value_gradient,
    )  # fmt: skip


def attention_facts(
    query: Array,
    key: Array,
    depth_key: Array | None,
    causal: bool,
    scale: float,
    *,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    key_length: Array | None = None,
) -> dict[str, object]:
    """What `dispatch.resolve` has to know about a call of the attention operations."""
    return {
        "operation": "attention",
        "dtype": query.dtype,
        "batch": query.shape[0],
        "query_tokens": query.shape[1],
        "key_tokens": key.shape[1],
        "slots": 0 if depth_key is None else depth_key.shape[2],
        "num_heads": query.shape[2],
        "num_kv_heads": key.shape[2],
        "head_dim": query.shape[3],
        "causal": causal,
        "scale": scale,
        "segments": query_segment_ids is not None or key_segment_ids is not None,
        "positions": query_positions is not None or key_positions is not None,
        "key_length": key_length is not None,
    }


def depth_facts(query: Array, depth_key: Array, scale: float) -> dict[str, object]:
    """What `dispatch.resolve` has to know about a call of the depth operations."""
    return {
        "operation": "depth",
        "dtype": query.dtype,
        "batch": query.shape[0],
        "query_tokens": query.shape[1],
        "key_tokens": 0,
        "slots": depth_key.shape[2],
        "num_heads": query.shape[2],
        "num_kv_heads": depth_key.shape[3],
        "head_dim": query.shape[3],
        "causal": False,
        "scale": scale,
        "segments": False,
        "positions": False,
        "key_length": False,
    }
