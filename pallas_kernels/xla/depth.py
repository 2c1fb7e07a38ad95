"""The depth part: every query over the seen slots of its own token, forward and backward."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from pallas_kernels.operands import DepthKV, Upstream
from pallas_kernels.parts import Part
from pallas_kernels.xla.blocks import MASKED, Blocks, TokenBlocks, depth_blocks, dot, loop, loop_between


def forward(query: Array, depth: DepthKV, scale: float) -> Part:
    """The depth part, in float32."""
    tokens, chunks = depth_blocks(depth.key)
    grouped = tokens.view(_token_group(query, depth.key))  # the view of [B, T, K, G, H] float32

    def token_block(i: Array | int, results: tuple[Array, Array]) -> tuple[Array, Array]:
        block = tokens.cut(grouped, i)

        def chunk(j: Array | int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, acc = state
            fresh = _fresh_slots(chunks, depth, j)
            key, value = (_slots(array, tokens, i, chunks, j, fresh) for array in (depth.key, depth.value))
            logits = _slot_logits(block, key, fresh, scale)
            new_top = jnp.maximum(top, jnp.max(logits, axis=2))
            weights = jnp.exp(logits - new_top[:, :, None])
            weights = weights if fresh is None else jnp.where(fresh, weights, 0.0)
            decay = jnp.exp(top - new_top)
            acc = acc * decay[..., None] + _over_slots(weights, value)
            return new_top, total * decay + jnp.sum(weights, axis=2), acc

        row = block[..., 0]
        state = jnp.full_like(row, MASKED), jnp.zeros_like(row), jnp.zeros_like(block)
        top, total, acc = loop_between(*_chunks_seen(chunks, depth), chunk, state)
        empty = total == 0
        out = acc / jnp.where(empty, 1.0, total)[..., None]  # acc is 0 where no chunk was visited
        lse = jnp.where(empty, 0.0, top) + jnp.log(total)  # -inf where empty
        return tokens.put(results[0], out, i), tokens.put(results[1], lse, i)

    out, lse = loop(tokens.count, token_block, (jnp.zeros_like(grouped), jnp.zeros_like(grouped[..., 0])))
    return Part(tokens.flat(out).reshape(query.shape), tokens.flat(lse).reshape(query.shape[:-1]))


def backward(
    query: Array, depth: DepthKV, upstream: Upstream, scale: float, buffers: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """(dquery float32, and the two buffers with the gradients of key and value added where they are not deferred)."""
    dout, lse, delta = upstream
    tokens, chunks = depth_blocks(depth.key)
    grouped, dgrouped, lse, delta = (tokens.view(_token_group(array, depth.key)) for array in (query, dout, lse, delta))
    buffers = tuple(map(tokens.view, buffers))

    def token_block(i: Array | int, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, dout_block, lse_block, delta_block = (tokens.cut(x, i) for x in (grouped, dgrouped, lse, delta))
        if tokens.ragged:  # tokens that the block before has done: no probability, no gradient
            lse_block = jnp.where(tokens.fresh(i)[:, None, None], lse_block, -MASKED)

        def chunk(j: Array | int, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dquery, key_gradient, value_gradient = sums
            fresh = _fresh_slots(chunks, depth, j)
            key, value = (_slots(array, tokens, i, chunks, j, fresh) for array in (depth.key, depth.value))
            weights = jnp.exp(_slot_logits(block, key, fresh, scale) - lse_block[:, :, None])  # [B, T, chunk, K, G]
            dlogits = weights * (_slot_logits(dout_block, value) - delta_block[:, :, None]) * scale
            added = fresh
            if depth.deferred is not None:
                now = (chunks.elements(j) >= depth.deferred)[:, None, None]
                added = now if fresh is None else fresh & now
            return (
                dquery + _over_slots(dlogits, key),
                _add_slots(key_gradient, _over_group(dlogits, block), tokens, i, chunks, j, added),
                _add_slots(value_gradient, _over_group(weights, dout_block), tokens, i, chunks, j, added),
            )

        dquery, *buffers = gradients
        sums = jnp.zeros_like(block), *buffers
        added, *buffers = loop_between(*_chunks_seen(chunks, depth), chunk, sums)
        return tokens.put(dquery, tokens.cut(dquery, i) + added, i), *buffers

    gradients = jnp.zeros_like(grouped), *buffers
    dquery, key_gradient, value_gradient = loop(tokens.count, token_block, gradients)
    return tokens.flat(dquery).reshape(query.shape), tokens.flat(key_gradient), tokens.flat(value_gradient)


def _token_group(array: Array, depth_key: Array) -> Array:
    """[B, T, N, ...] -> [B, T, K, G, ...] float32."""
    batch, tokens, heads, *rest = array.shape
    kv_heads = depth_key.shape[3]
    return array.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest).astype(jnp.float32)


def _chunks_seen(chunks: Blocks, depth: DepthKV) -> tuple[Array | int, Array | int]:
    """(first, last): the chunks [first, last) hold all slots that are seen."""
    if chunks.count == 1:
        return 0, 1
    first = 0 if depth.start is None else depth.start // chunks.size
    return first, chunks.count if depth.length is None else (depth.length + chunks.size - 1) // chunks.size


def _fresh_slots(chunks: Blocks, depth: DepthKV, index: Array | int) -> Array | None:
    """[chunk, 1, 1] bool: seen and not covered by the chunk before; None if that holds for all."""
    fresh = chunks.fresh(index) if chunks.ragged else True
    fresh &= depth.seen(chunks.elements(index))
    return None if fresh is True else fresh[:, None, None]


def _slots(
    array: Array, tokens: TokenBlocks, i: Array | int, chunks: Blocks, j: Array | int, fresh: Array | None
) -> Array:
    """[B, token block, chunk, K, H] float32, zero where not fresh: a slot that is not seen may hold NaN.

    The view is taken here, inside of the loops: before them XLA would write the layer's slot once more, into the view.
    """
    part = tokens.cut(tokens.view(array), i, chunks.start(j), chunks.size).astype(jnp.float32)
    return part if fresh is None else jnp.where(fresh, part, 0.0)


# The three products of the depth part, tiny for each token. These forms were the fastest of several on a CPU: multiply
# and reduce instead of the first two takes up to 2.3 times as long, a dot instead of the third up to 2 times.


def _slot_logits(grouped: Array, key: Array, fresh: Array | None = None, scale: float = 1.0) -> Array:
    """[B, T, chunk, K, G] float32: query . key * scale, MASKED where not fresh."""
    logits = dot("btkgh,btskh->btskg", grouped, key) * scale
    return logits if fresh is None else jnp.where(fresh, logits, MASKED)


def _over_slots(weights: Array, value: Array) -> Array:
    """[B, T, K, G, H] float32: values summed over the slots of the chunk."""
    return dot("btskg,btskh->btkgh", weights, value)


def _over_group(weights: Array, grouped: Array) -> Array:
    """[B, T, chunk, K, H] float32: queries summed over the heads that share a key."""
    parts = [weights[..., g, None] * grouped[:, :, None, :, g] for g in range(weights.shape[-1])]
    return functools.reduce(jnp.add, parts)


def _add_slots(
    view: Array, part: Array, tokens: TokenBlocks, i: Array | int, chunks: Blocks, j: Array | int, fresh: Array | None
) -> Array:
    """A buffer's view with `part` added to one chunk of its slots, in place; the others keep their bits."""
    old = tokens.cut(view, i, chunks.start(j), chunks.size)
    new = (old.astype(jnp.float32) + part).astype(view.dtype)
    new = new if fresh is None else jnp.where(fresh, new, old)
    return tokens.put(view, new, i, chunks.start(j))
