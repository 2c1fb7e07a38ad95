"""The op written for reading: dense, plain jax.numpy in float32, every mask spelled out. Needs O(T^2) memory.

The public op differentiates this forward with JAX's own autodiff instead of calling the backward below, so that it is
an independent check of every hand-written gradient. The backward stands here for `pallas_kernels.block`, whose callers
bring a merged lse and delta.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.rounding import rounded

HIGHEST = lax.Precision.HIGHEST


def check_supported(**facts: object) -> None:
    """Everything that the contract allows is supported."""


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
) -> tuple[Array, Array, Array | None]:
    """(out [B, T, N, H], lse [B, T, N] float32, rest or None); see `pallas_kernels.block`."""
    visible = _visible(
        query, key, causal, query_positions, key_positions, query_segment_ids, key_segment_ids, key_length
    )
    q = _grouped(query, key.shape[2])
    k, v = (_without_unfilled_keys(array, key_length) for array in (key, value))
    logits = _sequence_logits(q, k, scale)  # [B, T, K, G, U]
    if depth_key is None:
        (weights,), lse = _softmax((logits, visible))
        out = _sequence_out(weights, v)
    else:
        filled = _filled(depth_key, depth_length)
        dk, dv = (_without_unfilled(array, filled) for array in (depth_key, depth_value))
        (weights, depth_weights), lse = _softmax((logits, visible), (_depth_logits(q, dk, scale), filled))
        out = _sequence_out(weights, v) + _depth_out(depth_weights, dv)
    out, rest = rounded(out.reshape(query.shape), query.dtype, with_rest=with_rest)
    return out, lse.reshape(query.shape[:3]), rest


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
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """(dquery, dkey, dvalue, ddepth_key, ddepth_value) from the merged lse and delta; see `pallas_kernels.block`."""
    visible = _visible(
        query, key, causal, query_positions, key_positions, query_segment_ids, key_segment_ids, key_length
    )
    q, do, lse_, delta_ = (_grouped(array, key.shape[2]) for array in (query, dout, lse, delta))
    k, v = (_without_unfilled_keys(array, key_length) for array in (key, value))
    weights = _weights(_sequence_logits(q, k, scale), visible, lse_)  # [B, T, K, G, U]
    dlogits = _dlogits(weights, jnp.einsum("btkgh,bukh->btkgu", do, v, precision=HIGHEST), delta_) * scale
    dquery = jnp.einsum("btkgu,bukh->btkgh", dlogits, k, precision=HIGHEST).reshape(query.shape)
    dkey = jnp.einsum("btkgu,btkgh->bukh", dlogits, q, precision=HIGHEST)
    dvalue = jnp.einsum("btkgu,btkgh->bukh", weights, do, precision=HIGHEST)
    depth_gradients = None, None
    if depth_key is not None:
        depth_dquery, *depth_gradients = _depth_backward(
            query, depth_key, depth_value, depth_length, dout, lse, delta, scale,
            depth_key_gradient, depth_value_gradient,
        )  # fmt: skip
        dquery += depth_dquery
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), *depth_gradients


def depth_forward(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    depth_length: int | Array | None = None,
    *,
    scale: float,
    with_rest: bool = False,
) -> tuple[Array, Array, Array | None]:
    """(out, lse, rest or None) of the depth part alone; without a filled slot out is 0 and lse -inf."""
    filled = _filled(depth_key, depth_length)
    dk, dv = (_without_unfilled(array, filled) for array in (depth_key, depth_value))
    (weights,), lse = _softmax((_depth_logits(_grouped(query, depth_key.shape[3]), dk, scale), filled))
    out, rest = rounded(_depth_out(weights, dv).reshape(query.shape), query.dtype, with_rest=with_rest)
    return out, lse.reshape(query.shape[:3]), rest


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
) -> tuple[Array, Array, Array]:
    """(dquery, ddepth_key, ddepth_value) of the depth part alone, from the merged lse and delta."""
    dquery, *gradients = _depth_backward(
        query, depth_key, depth_value, depth_length, dout, lse, delta, scale, depth_key_gradient, depth_value_gradient
    )
    return dquery.astype(query.dtype), *gradients


def _depth_backward(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    depth_length: int | Array | None,
    dout: Array,
    lse: Array,
    delta: Array,
    scale: float,
    key_gradient: Array | None,
    value_gradient: Array | None,
) -> tuple[Array, Array, Array]:
    """(dquery float32, ddepth_key, ddepth_value)."""
    q, do, lse, delta = (_grouped(array, depth_key.shape[3]) for array in (query, dout, lse, delta))
    filled = _filled(depth_key, depth_length)
    dk, dv = (_without_unfilled(array, filled) for array in (depth_key, depth_value))
    weights = _weights(_depth_logits(q, dk, scale), filled, lse)  # [B, T, K, G, S]
    dlogits = _dlogits(weights, jnp.einsum("btkgh,btskh->btkgs", do, dv, precision=HIGHEST), delta) * scale
    dquery = jnp.einsum("btkgs,btskh->btkgh", dlogits, dk, precision=HIGHEST).reshape(query.shape)
    ddepth_key = jnp.einsum("btkgs,btkgh->btskh", dlogits, q, precision=HIGHEST)
    ddepth_value = jnp.einsum("btkgs,btkgh->btskh", weights, do, precision=HIGHEST)
    return (
        dquery,
        _added(key_gradient, ddepth_key, filled, depth_key.dtype),
        _added(value_gradient, ddepth_value, filled, depth_value.dtype),
    )


def _visible(
    query: Array,
    key: Array,
    causal: bool,
    query_positions: Array | None,
    key_positions: Array | None,
    query_segment_ids: Array | None,
    key_segment_ids: Array | None,
    key_length: Array | None,
) -> Array:
    """[B, T, 1, 1, U] bool: which keys of the sequence a query sees."""
    (batch, tokens), keys = query.shape[:2], key.shape[1]
    visible = jnp.ones((batch, tokens, keys), bool)
    if causal:
        query_positions = jnp.arange(tokens, dtype=jnp.int32)[None] if query_positions is None else query_positions
        key_positions = jnp.arange(keys, dtype=jnp.int32)[None] if key_positions is None else key_positions
        visible &= key_positions[:, None, :] <= query_positions[:, :, None]
    if query_segment_ids is not None:
        visible &= query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    if key_length is not None:
        visible &= (jnp.arange(keys, dtype=jnp.int32)[None] < key_length[:, None])[:, None, :]
    return visible[:, :, None, None, :]


def _filled(depth_key: Array, depth_length: int | Array | None) -> Array:
    """[S] bool."""
    slots = depth_key.shape[2]
    return jnp.arange(slots, dtype=jnp.int32) < (slots if depth_length is None else depth_length)


def _without_unfilled(array: Array, filled: Array) -> Array:
    """[B, T, S, K, H] float32 with zeros in unfilled slots, which may hold NaN."""
    return jnp.where(filled[:, None, None], array.astype(jnp.float32), 0.0)


def _without_unfilled_keys(array: Array, key_length: Array | None) -> Array:
    """[B, U, K, H] float32 with zeros at or beyond the key length, where NaN may stand."""
    wide = array.astype(jnp.float32)
    if key_length is None:
        return wide
    filled = jnp.arange(array.shape[1], dtype=jnp.int32)[None] < key_length[:, None]  # [B, U]
    return jnp.where(filled[:, :, None, None], wide, 0.0)


def _grouped(array: Array, kv_heads: int) -> Array:
    """[B, T, N, ...] -> [B, T, K, G, ...] float32."""
    batch, tokens, heads, *rest = array.shape
    return array.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest).astype(jnp.float32)


def _sequence_logits(q: Array, k: Array, scale: float) -> Array:
    return jnp.einsum("btkgh,bukh->btkgu", q, k, precision=HIGHEST) * scale


def _depth_logits(q: Array, dk: Array, scale: float) -> Array:
    return jnp.einsum("btkgh,btskh->btkgs", q, dk, precision=HIGHEST) * scale


def _sequence_out(weights: Array, v: Array) -> Array:
    return jnp.einsum("btkgu,bukh->btkgh", weights, v, precision=HIGHEST)


def _depth_out(weights: Array, dv: Array) -> Array:
    return jnp.einsum("btkgs,btskh->btkgh", weights, dv, precision=HIGHEST)


def _softmax(*parts: tuple[Array, Array]) -> tuple[list[Array], Array]:
    """One softmax over all parts, each (logits, visible): their weights, and the lse of all.

    A row without a visible entry gets weights 0 and lse -inf. The parts are summed one by one, not concatenated, so
    that a part of which nothing is visible leaves the others' bits alone.
    """
    parts = [(logits, jnp.broadcast_to(visible, logits.shape)) for logits, visible in parts]
    # initial: a part may have no entry at all. Finite, so that no difference below is NaN.
    lowest = jnp.finfo(jnp.float32).min
    tops = [jnp.max(logits, axis=-1, keepdims=True, where=visible, initial=lowest) for logits, visible in parts]
    top = lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    exponentials = [
        jnp.where(visible, jnp.exp(jnp.where(visible, logits - top, 0.0)), 0.0) for logits, visible in parts
    ]
    total = sum(jnp.sum(exponential, axis=-1, keepdims=True) for exponential in exponentials)
    some = functools.reduce(
        jnp.logical_or, [jnp.any(visible, axis=-1, keepdims=True) for _, visible in parts]
    )  # by the mask, whatever the logits are
    total = jnp.where(some, total, 1.0)
    # No infinite constant: partial evaluation makes outputs of constants, and `jax_debug_infs` would find it there.
    nothing = jnp.log(some.astype(jnp.float32))  # 0, or -inf
    lse = jnp.where(some, top + jnp.log(total), nothing)
    return [exponential / total for exponential in exponentials], lse[..., 0]


def _weights(logits: Array, visible: Array, lse: Array) -> Array:
    """exp(logits - lse) where visible, of a row that saw anything at all."""
    lse = lse[..., None]
    visible = jnp.broadcast_to(visible, logits.shape) & jnp.logical_not(lse < jnp.finfo(jnp.float32).min)
    return jnp.where(visible, jnp.exp(jnp.where(visible, logits - lse, 0.0)), 0.0)


def _dlogits(weights: Array, dweights: Array, delta: Array) -> Array:
    """weights * (dweights - delta), 0 where the weight is 0 whatever delta is."""
    return jnp.where(weights != 0, weights * (dweights - delta[..., None]), 0.0)


def _added(buffer: Array | None, gradient: Array, filled: Array, dtype: jnp.dtype) -> Array:
    """The gradient in `dtype`, or `buffer` plus the gradient in its filled slots."""
    if buffer is None:
        return gradient.astype(dtype)
    total = (buffer.astype(jnp.float32) + gradient).astype(buffer.dtype)
    return jnp.where(filled[:, None, None], total, buffer)
