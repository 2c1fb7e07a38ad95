"""The op written for reading: dense, plain jax.numpy in float32, every mask spelled out. Needs O(T^2) memory.

The public op differentiates this forward with JAX's own autodiff instead of calling the backward below, so that it is
an independent check of every hand-written gradient. The backward stands here for `pallas_kernels.block`, whose callers
bring a merged lse and delta.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.depth_chunks import reach
from pallas_kernels.operands import Call, DepthKV, Gradients, Upstream
from pallas_kernels.parts import Part

HIGHEST = lax.Precision.HIGHEST


def check_supported(call: Call) -> None:
    """Everything that the contract allows is supported."""


def forward(call: Call, *, with_rest: bool = False) -> Part:
    """One softmax over the keys and the slots that each query sees."""
    q = _grouped(call.query, call.num_kv_heads)
    logits, values = [], []  # of each part; the logits with what is visible
    if call.key is not None:
        k, v = (_without_unfilled_keys(array, call) for array in (call.key, call.value))
        logits.append((_sequence_logits(q, k, call.scale), _visible(call)))
        values.append(("btkgu,bukh->btkgh", v))
    if call.depth is not None:
        seen = _seen_slots(call)
        dk, dv = (_without_unseen(_of_chunk(array, call.depth.chunk), seen) for array in _slots(call.depth))
        logits.append((_depth_logits(q, dk, call.scale), _beside_logits(seen)))
        values.append(("btkgs,btskh->btkgh", dv))
    weights, lse = _softmax(*logits)
    products = [
        jnp.einsum(spec, weight, value, precision=HIGHEST)
        for weight, (spec, value) in zip(weights, values, strict=True)
    ]
    out = functools.reduce(jnp.add, products).reshape(call.query.shape)
    return Part(out, lse.reshape(out.shape[:3])).rounded(call.query.dtype, with_rest=with_rest)


def gradient_group(call: Call) -> int:
    """See `pallas_kernels.dispatch`: nothing is gained by more than one."""
    del call
    return 1


def backward(call: Call, upstream: Upstream, buffers: tuple[Array, Array] | None = None) -> Gradients:
    """From the merged lse and delta."""
    dquery, gradients = jnp.zeros(call.query.shape, jnp.float32), Gradients(call.query)
    if call.key is not None:
        dquery, dkey, dvalue = _sequence_backward(call, upstream)
        gradients = Gradients(call.query, dkey.astype(call.key.dtype), dvalue.astype(call.value.dtype))
    if call.depth is not None:
        depth_dquery, *depth = _depth_backward(call, call.depth, upstream, buffers or (None, None))
        dquery += depth_dquery
        gradients = Gradients(*gradients[:3], *depth)
    return gradients._replace(query=dquery.astype(call.query.dtype) if call.query_gradient else None)


def _sequence_backward(call: Call, upstream: Upstream) -> tuple[Array, Array, Array]:
    """(dquery, dkey, dvalue), float32."""
    q, do, lse, delta = (_grouped(array, call.num_kv_heads) for array in (call.query, *upstream))
    k, v = (_without_unfilled_keys(array, call) for array in (call.key, call.value))
    weights = _weights(_sequence_logits(q, k, call.scale), _visible(call), lse)  # [B, T, K, G, U]
    dlogits = _dlogits(weights, jnp.einsum("btkgh,bukh->btkgu", do, v, precision=HIGHEST), delta) * call.scale
    dquery = jnp.einsum("btkgu,bukh->btkgh", dlogits, k, precision=HIGHEST).reshape(call.query.shape)
    dkey = jnp.einsum("btkgu,btkgh->bukh", dlogits, q, precision=HIGHEST)
    return dquery, dkey, jnp.einsum("btkgu,btkgh->bukh", weights, do, precision=HIGHEST)


def _depth_backward(
    call: Call, depth: DepthKV, upstream: Upstream, buffers: tuple[Array | None, Array | None]
) -> tuple[Array, Array, Array]:
    """(dquery float32, ddepth_key, ddepth_value)."""
    q, do, lse, delta = (_grouped(array, call.num_kv_heads) for array in (call.query, *upstream))
    seen = _seen_slots(call)
    dk, dv = (_without_unseen(_of_chunk(array, depth.chunk), seen) for array in _slots(depth))
    weights = _weights(_depth_logits(q, dk, call.scale), _beside_logits(seen), lse)  # [B, T, K, G, C S]
    dlogits = _dlogits(weights, jnp.einsum("btkgh,btskh->btkgs", do, dv, precision=HIGHEST), delta) * call.scale
    dquery = jnp.einsum("btkgs,btskh->btkgh", dlogits, dk, precision=HIGHEST).reshape(call.query.shape)
    ddepth_key = _from_chunk(jnp.einsum("btkgs,btkgh->btskh", dlogits, q, precision=HIGHEST), depth.chunk)
    ddepth_value = _from_chunk(jnp.einsum("btkgs,btkgh->btskh", weights, do, precision=HIGHEST), depth.chunk)
    added = jnp.broadcast_to(depth.gets_gradient(jnp.arange(depth.slots, dtype=jnp.int32)), (depth.slots,))
    return (
        dquery,
        _added(buffers[0], ddepth_key, added, call.query.dtype),
        _added(buffers[1], ddepth_value, added, call.query.dtype),
    )


def _visible(call: Call) -> Array:
    """[B, T, 1, 1, U] bool: which keys of the sequence a query sees."""
    (batch, tokens), keys, mask = call.query.shape[:2], call.key.shape[1], call.mask
    visible = jnp.ones((batch, tokens, keys), bool)
    key_index = jnp.arange(keys, dtype=jnp.int32)[None]
    if mask.causal:
        default = jnp.arange(tokens, dtype=jnp.int32)[None]
        query_positions = default if mask.query_positions is None else mask.query_positions
        key_positions = key_index if mask.key_positions is None else mask.key_positions
        visible &= key_positions[:, None, :] <= query_positions[:, :, None]
    if mask.query_segment_ids is not None:
        visible &= mask.query_segment_ids[:, :, None] == mask.key_segment_ids[:, None, :]
    if mask.key_length is not None:
        visible &= (key_index < mask.key_length[:, None])[:, None, :]
    return visible[:, :, None, None, :]


def _slots(depth: DepthKV) -> tuple[Array, Array]:
    return depth.key, depth.value


def _seen_slots(call: Call) -> Array:
    """Which slots a query sees: [S] bool, or of a chunk of C tokens [B or 1, T, C S], its own token's first."""
    depth, tokens = call.depth, call.query.shape[1]
    if depth.chunk == 1:
        return depth.is_seen()
    before = jnp.arange(depth.chunk, dtype=jnp.int32)[None, None]
    seen = before < reach(depth.chunk, tokens, call.mask.query_segment_ids)[..., None]  # [B, T, C]
    return (seen[..., None] & depth.is_seen()[None, None, None]).reshape(*seen.shape[:2], -1)


def _beside_logits(seen: Array) -> Array:
    """What a query sees, as it is broadcast to logits [B, T, K, G, C S]."""
    return seen if seen.ndim == 1 else seen[:, :, None, None]


def _of_chunk(array: Array, chunk: int) -> Array:
    """[B, T, S, K, H] to [B, T, C S, K, H]: a token's slots, then those of the tokens before it; 0 before the first."""
    if chunk == 1:
        return array
    tokens = array.shape[1]
    padded = jnp.pad(array, ((0, 0), (chunk - 1, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([padded[:, chunk - 1 - j :][:, :tokens] for j in range(chunk)], axis=2)


def _from_chunk(gradient: Array, chunk: int) -> Array:
    """The transpose of `_of_chunk`: what all tokens of a chunk give to the slots of each."""
    if chunk == 1:
        return gradient
    tokens = gradient.shape[1]
    parts = [
        jnp.pad(part[:, j:], ((0, 0), (0, min(j, tokens)), (0, 0), (0, 0), (0, 0)))
        for j, part in enumerate(jnp.split(gradient, chunk, axis=2))
    ]
    return functools.reduce(jnp.add, parts)


def _without_unseen(array: Array, seen: Array) -> Array:
    """[B, T, C S, K, H] float32 with zeros in slots that are not seen, which may hold NaN."""
    return jnp.where(seen[..., None, None], array.astype(jnp.float32), 0.0)


def _without_unfilled_keys(array: Array, call: Call) -> Array:
    """[B, U, K, H] float32 with zeros at or beyond the key length, where NaN may stand."""
    return call.mask.cleared(array.astype(jnp.float32))


def _grouped(array: Array, kv_heads: int) -> Array:
    """[B, T, N, ...] -> [B, T, K, G, ...] float32."""
    batch, tokens, heads, *rest = array.shape
    return array.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest).astype(jnp.float32)


def _sequence_logits(q: Array, k: Array, scale: float) -> Array:
    return jnp.einsum("btkgh,bukh->btkgu", q, k, precision=HIGHEST) * scale


def _depth_logits(q: Array, dk: Array, scale: float) -> Array:
    return jnp.einsum("btkgh,btskh->btkgs", q, dk, precision=HIGHEST) * scale


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


def _added(buffer: Array | None, gradient: Array, added: Array, dtype: jnp.dtype) -> Array:
    """The gradient in `dtype`, zero where it is not to be added, or `buffer` plus the gradient in the slots `added`."""
    if buffer is None:
        return jnp.where(added[:, None, None], gradient, 0.0).astype(dtype)
    total = (buffer.astype(jnp.float32) + gradient).astype(buffer.dtype)
    return jnp.where(added[:, None, None], total, buffer)
