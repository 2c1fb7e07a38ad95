"""The sequence part: blockwise attention of queries over keys, forward and backward."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.operands import Call, Mask, Upstream
from pallas_kernels.parts import Part
from pallas_kernels.xla.blocks import MASKED, Blocks, dot, loop, sequence_blocks


def _key_blocks_seen(mask: Mask, queries: Blocks, keys: Blocks, index: Array | int) -> Array | int:
    """How many leading key blocks the queries of a block can see at most."""
    count = keys.count
    if count == 1:
        return 1
    if mask.causal and mask.key_positions is None:  # a key's position is its index
        if mask.query_positions is None:
            last = queries.start(index) + queries.size - 1
        else:
            last = jnp.max(queries.slice(mask.query_positions, index, 1))
        count = jnp.minimum(count, last // keys.size + 1)
    if mask.key_length is not None:
        count = jnp.minimum(count, (jnp.max(mask.key_length) + keys.size - 1) // keys.size)
    return count


def _visible(mask: Mask, queries: Blocks, keys: Blocks, i: Array | int, j: Array | int) -> Array | None:
    """Bool, broadcastable to [B, 1, 1, query block, key block]; None if every query sees every key."""
    conditions = []
    if mask.causal:
        query_positions = _positions(mask.query_positions, queries, i)
        key_positions = _positions(mask.key_positions, keys, j)
        conditions.append(key_positions[:, None, :] <= query_positions[:, :, None])
    if mask.query_segment_ids is not None:
        query_segments = queries.slice(mask.query_segment_ids, i, 1)
        key_segments = keys.slice(mask.key_segment_ids, j, 1)
        conditions.append(query_segments[:, :, None] == key_segments[:, None, :])
    if mask.key_length is not None:
        conditions.append((_positions(None, keys, j) < mask.key_length[:, None])[:, None, :])
    if keys.ragged:
        conditions.append(keys.fresh(j)[None, None, :])
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible[:, None, None]


def _positions(positions: Array | None, blocks: Blocks, index: Array | int) -> Array:
    """[B or 1, block] positions of one block."""
    if positions is None:
        return blocks.elements(index)[None]
    return blocks.slice(positions, index, 1)


def _filled_keys(block: Array, mask: Mask, keys: Blocks, index: Array | int) -> Array:
    """A block [B, K, key block, H] of keys or values with zeros at or beyond the key length: NaN may stand there."""
    if mask.key_length is None or mask.finite_beyond:
        return block
    filled = _positions(None, keys, index) < mask.key_length[:, None]  # [B, key block]
    return jnp.where(filled[:, None, :, None], block, jnp.zeros_like(block))


def _logits(query: Array, key: Array, scale: float, visible: Array | None) -> Array:
    """[B, K, G, query block, key block] float32."""
    logits = _over_head_dim(query, key) * scale
    return logits if visible is None else jnp.where(visible, logits, MASKED)


def _over_head_dim(query: Array, key: Array) -> Array:
    """query [B, K, G, T, H] . key [B, K, U, H] -> [B, K, G, T, U] float32.

    Where G or T is 1 the product has no second axis of rows: on a CPU XLA would make a transposed copy of the keys.
    """
    *_, group, tokens, head_dim = query.shape
    if 1 not in (group, tokens):
        return dot("bkgth,bkuh->bkgtu", query, key)
    rows = query.reshape(*query.shape[:2], group * tokens, head_dim)
    return dot("bkrh,bkuh->bkru", rows, key).reshape(*query.shape[:4], key.shape[2])


def _group(array: Array, num_kv_heads: int) -> Array:
    """[B, T, N, ...] -> [B, K, G, T, ...]: heads lead, so that block dots are plain batched matrix products."""
    batch, tokens, heads, *rest = array.shape
    return jnp.moveaxis(array.reshape(batch, tokens, num_kv_heads, heads // num_kv_heads, *rest), 1, 3)


def _ungroup(array: Array) -> Array:
    """[B, K, G, T, ...] -> [B, T, N, ...]."""
    batch, kv_heads, group, tokens, *rest = array.shape
    return jnp.moveaxis(array, 3, 1).reshape(batch, tokens, kv_heads * group, *rest)


def forward(call: Call) -> Part:
    """The sequence part of a call, in float32."""
    mask, scale = call.mask, call.scale
    query = _group(call.query, call.num_kv_heads)  # [B, K, G, T, H]
    key, value = (jnp.moveaxis(array, 1, 2) for array in (call.key, call.value))  # [B, K, U, H]
    queries, keys = sequence_blocks(query, key)

    def query_block(i: Array | int, results: tuple[Array, Array]) -> tuple[Array, Array]:
        block = queries.slice(query, i, 3)

        def key_block(j: Array | int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, acc = state
            k, v = (_filled_keys(keys.slice(x, j, 2), mask, keys, j) for x in (key, value))
            visible = _visible(mask, queries, keys, i, j)
            logits = _logits(block, k, scale, visible)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - new_top[..., None])
            if visible is not None:  # a row that has seen nothing yet has exp(MASKED - MASKED) = 1 here
                weights = jnp.where(visible, weights, 0.0)
            decay = jnp.exp(top - new_top)
            added = dot("bkgtu,bkuh->bkgth", weights.astype(v.dtype), v)
            return new_top, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + added

        row = block[..., 0]
        state = (
            jnp.full_like(row, MASKED, dtype=jnp.float32),
            jnp.zeros_like(row, dtype=jnp.float32),
            jnp.zeros_like(block, dtype=jnp.float32),
        )
        top, total, acc = loop(_key_blocks_seen(mask, queries, keys, i), key_block, state)
        empty = total == 0  # the largest logit that was seen weighs 1
        out = jnp.where(empty[..., None], 0.0, acc / jnp.where(empty, 1.0, total)[..., None])
        lse = jnp.where(empty, 0.0, top) + jnp.log(total)  # -inf where empty
        return queries.update(results[0], out, i, 3), queries.update(results[1], lse, i, 3)

    results = jnp.zeros_like(query, dtype=jnp.float32), jnp.zeros_like(query[..., 0], dtype=jnp.float32)
    out, lse = loop(queries.count, query_block, results)
    return Part(_ungroup(out), _ungroup(lse))


def backward(call: Call, upstream: Upstream) -> tuple[Array, Array, Array]:
    """(dquery float32, dkey, dvalue). One pass over the blocks; dkey and dvalue accumulate in float32."""
    mask, scale = call.mask, call.scale
    query, dout, lse, delta = (_group(array, call.num_kv_heads) for array in (call.query, *upstream))
    key, value = (jnp.moveaxis(array, 1, 2) for array in (call.key, call.value))  # [B, K, U, H]
    queries, keys = sequence_blocks(query, key)

    def query_block(i: Array | int, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, dout_block, lse_block, delta_block = (queries.slice(x, i, 3) for x in (query, dout, lse, delta))
        if queries.ragged:  # rows that the block before has done: no probability, no gradient
            lse_block = jnp.where(queries.fresh(i), lse_block, -MASKED)

        def key_block(j: Array | int, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dquery, dkey, dvalue = sums
            k, v = (_filled_keys(keys.slice(x, j, 2), mask, keys, j) for x in (key, value))
            logits = _logits(block, k, scale, _visible(mask, queries, keys, i, j))
            weights = jnp.exp(logits - lse_block[..., None])
            dweights = _over_head_dim(dout_block, v)
            dlogits = (weights * (dweights - delta_block[..., None])).astype(k.dtype)
            dv = dot("bkgtu,bkgth->bkuh", weights.astype(v.dtype), dout_block)
            dk = dot("bkgtu,bkgth->bkuh", dlogits, block)
            return (
                dquery + dot("bkgtu,bkuh->bkgth", dlogits, k),
                keys.update(dkey, keys.slice(dkey, j, 2) + dk, j, 2),
                keys.update(dvalue, keys.slice(dvalue, j, 2) + dv, j, 2),
            )

        dquery, dkey, dvalue = gradients
        zeros = jnp.zeros_like(block, dtype=jnp.float32)
        added, dkey, dvalue = loop(_key_blocks_seen(mask, queries, keys, i), key_block, (zeros, dkey, dvalue))
        return queries.update(dquery, queries.slice(dquery, i, 3) + added, i, 3), dkey, dvalue

    zeros = (jnp.zeros_like(array, dtype=jnp.float32) for array in (query, key, value))
    dquery, dkey, dvalue = loop(queries.count, query_block, tuple(zeros))
    dkey, dvalue = (jnp.moveaxis(array, 2, 1) for array in (dkey * scale, dvalue))
    return _ungroup(dquery * scale), dkey.astype(key.dtype), dvalue.astype(value.dtype)
