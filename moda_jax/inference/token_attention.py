"""One token's attention: parts of its softmax over the cache, over depth slots, and over itself.

Axes: B rows, C places of the cache, R tokens whose slots are kept, N query heads, K key/value heads, G = N / K, H
head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import block, dispatch
from pallas_kernels.operands import Call, DepthKV, Mask
from pallas_kernels.parts import Part, merge, merge_axis

Array = jax.Array


# Unrolled layers share one kernel, compiled once.
@functools.partial(jax.jit, static_argnames=("implementation", "parts"))
def over_cache(
    query: Array,
    cached: tuple[Array, Array],
    start: Array | None,
    length: Array,
    implementation: str | None,
    parts: int = 1,
) -> Part:
    """The current token's attention over the cache.

    Rows and KV heads are the op's batch, a KV head's G queries its tokens, all of one head: reshapes alone, the cache
    is not copied.

    Args:
        query: [B, 1, N, H].
        cached: key and value [B, K, C, H].
        start: [B] or None, length: scalar: the places from `start` up to `length` count.
        implementation: of the op.
        parts: P, a divisor of C: so many stretches of places that are each normalised by themselves.

    Returns:
        P parts [B, P, N, ...] of the token's softmax.
    """
    batch, kv_heads, capacity, head_dim = cached[0].shape
    group, places = query.shape[2] // kv_heads, capacity // parts
    rows = batch * kv_heads * parts
    if start is None:  # a length costs a kernel nothing, and it reads no more places than that
        left = jnp.clip(length - jnp.arange(parts, dtype=jnp.int32) * places, 0, places)
        mask = Mask(key_length=jnp.broadcast_to(left, (batch * kv_heads, parts)).reshape(-1), finite_beyond=True)
    else:
        place = jnp.arange(capacity, dtype=jnp.int32)[None]
        visible = ((place < length) & (place >= start[:, None]))[:, None]  # [B, 1, C]
        visible = jnp.broadcast_to(visible, (batch, kv_heads, capacity)).reshape(rows, places)
        mask = Mask(query_segment_ids=jnp.ones((rows, group), jnp.int32), key_segment_ids=visible.astype(jnp.int32))
    key, value = (x.reshape(rows, places, 1, head_dim) for x in cached)
    query = jnp.broadcast_to(
        query.reshape(batch, kv_heads, 1, group, head_dim), (batch, kv_heads, parts, group, head_dim)
    )
    call = Call(query.reshape(rows, group, 1, head_dim), key, value, mask, scale=head_dim**-0.5)
    part = block.forward(call, implementation=implementation)

    def by_parts(x: Array) -> Array:
        x = x.reshape(batch, kv_heads, parts, group, *x.shape[3:])
        return jnp.swapaxes(x, 1, 2).reshape(batch, parts, kv_heads * group, *x.shape[4:])

    return jax.tree.map(by_parts, part)


def cache_parts(query: Array, cached: tuple[Array, Array], implementation: str | None) -> int:
    """Into how many parts `over_cache` had better be cut, if they are merged with others anyway.

    Args:
        query, cached, implementation: as there.
    """
    batch, kv_heads, capacity, head_dim = cached[0].shape
    rows = batch * kv_heads
    shape = jax.eval_shape(lambda q: q.reshape(rows, -1, 1, head_dim), query)
    keys = jax.ShapeDtypeStruct((rows, capacity, 1, head_dim), cached[0].dtype)
    module = dispatch.load(dispatch.resolve(implementation, Call(shape, keys, keys, Mask())))
    return module.num_parts(rows, capacity) if hasattr(module, "num_parts") else 1


def merge_all(parts: Part, *others: Part) -> tuple[Array, Array]:
    """What the one softmax over P parts [B, P, N, ...] and others [B, 1, N, ...] comes to, if some part sees something:
    out [B, 1, N, H] and lse [B, 1, N], float32."""
    found = [parts, *others]
    lse = jnp.concatenate([part.lse for part in found], axis=1)
    out = jnp.concatenate([part.wide for part in found], axis=1)
    top = jnp.max(lse, axis=1, keepdims=True)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return jnp.sum(weights[..., None] * out, axis=1, keepdims=True) / total[..., None], top + jnp.log(total)


@functools.partial(jax.jit, static_argnames="implementation")
def over_slots(query: Array, depth: DepthKV, implementation: str | None) -> Part:
    """The current token's attention over its depth slots, its own KV among them."""
    return block.forward(Call(query, depth=depth, scale=query.shape[-1] ** -0.5), implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def over_chunk(query: Array, depth: DepthKV, seen: Array, implementation: str | None) -> Part:
    """The current token's attention over the slots of R earlier ones: each token's for itself, and merged.

    Args:
        query: [B, 1, N, H].
        depth: of the R tokens.
        seen: [B or 1, R] bool, of which of them.
        implementation: of the op.
    """
    queries = jnp.broadcast_to(query, (query.shape[0], seen.shape[1], *query.shape[2:]))
    part = block.forward(Call(queries, depth=depth, scale=query.shape[-1] ** -0.5), implementation=implementation)
    out = jnp.where(seen[..., None, None], part.out, 0)
    lse = jnp.where(seen[..., None], part.lse, -jnp.inf)
    merged = merge_axis(Part(out, lse), axis=1)
    return jax.tree.map(lambda x: x[:, None], merged)


def of_itself(query: Array, key: Array, value: Array) -> Part:
    """The current token's attention to itself alone: its value, whatever its logit is.

    Args:
        query: [B, 1, N, H].
        key, value: [B, 1, K, H].
    """
    grouped = query.reshape(*key.shape[:3], -1, key.shape[3]).astype(jnp.float32)  # [B, 1, K, G, H]
    logits = jnp.sum(grouped * key[:, :, :, None].astype(jnp.float32), axis=-1) * key.shape[-1] ** -0.5
    out = jnp.broadcast_to(value[:, :, :, None], grouped.shape)
    return Part(out.reshape(query.shape), logits.reshape(query.shape[:3]))


def merged(over_cache: Part, beside: Part) -> tuple[Array, Array]:
    """Of the one softmax that the two are parts of: out [B, 1, N, H] in the compute dtype, lse [B, 1, N] float32."""
    part = merge(over_cache, beside)
    return part.out.astype(beside.out.dtype), part.lse
