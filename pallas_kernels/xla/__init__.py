"""Memory-efficient attention over sequence KV and depth KV in plain JAX, for any device.

    logits = [ query . key[0..U-1] , query . depth_key[t, 0..n-1] ] * scale
    out    = softmax(logits) @ [ value ; depth_value[t] ],   lse = log(sum(exp(logits)))

The sequence part (`sequence.py`) walks over blocks of queries and, inside, blocks of keys with an online softmax; the
backward walks over the same blocks once and recomputes the probabilities from lse. Under the default causal mask the
key blocks above the diagonal are not visited: the inner trip count depends on the query block. No array is larger than
a block of logits plus O(T), whatever T and S are.

The depth part (`depth.py`) is per token: it walks over blocks of tokens and, inside, over chunks of slots, as many as
`depth_length` fills. The two parts are merged by log-sum-exp; the backward needs only the merged lse and delta, so each
part recomputes its own probabilities exactly.

Dtypes: logits, softmax state and all accumulators are float32. Sequence dots take the inputs' dtype and accumulate in
float32 (`highest` precision for float32 inputs); depth products are taken in float32.

A block at a ragged end starts earlier instead of being padded and overlaps its predecessor; what the predecessor has
covered is masked. So no operand, the big depth buffers least of all, is ever copied to be padded.

The lse of an empty row is -inf, and nothing else is infinite, constants included: partial evaluation (of a remat in a
user's scan) makes outputs of constants, and `jax_debug_infs` would find them there.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.rounding import rounded
from pallas_kernels.xla import depth, sequence
from pallas_kernels.xla.blocks import MASKED


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
    masks = sequence.Masks(causal, query_positions, key_positions, query_segment_ids, key_segment_ids, key_length)
    out, lse = sequence.forward(query, key, value, scale, masks)
    if not _no_slots(depth_key, depth_length):
        depth_out, depth_lse = depth.forward(query, depth_key, depth_value, depth_length, scale)
        out, lse = _merge(out, lse, depth_out, depth_lse)
    out, rest = rounded(out, query.dtype, with_rest=with_rest)
    return out, lse, rest


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
    lse, delta = _without_empty_rows(lse, delta)
    masks = sequence.Masks(causal, query_positions, key_positions, query_segment_ids, key_segment_ids, key_length)
    dquery, dkey, dvalue = sequence.backward(query, key, value, dout, lse, delta, scale, masks)
    depth_gradients = _gradient_buffers(depth_key, depth_value, depth_key_gradient, depth_value_gradient)
    if not _no_slots(depth_key, depth_length):
        depth_dquery, *depth_gradients = depth.backward(
            query, depth_key, depth_value, depth_length, dout, lse, delta, scale, *depth_gradients
        )
        filled = True if depth_length is None else depth_length > 0
        dquery = jnp.where(filled, dquery + depth_dquery, dquery)  # bit for bit, the sign of a zero included
    return dquery.astype(query.dtype), dkey, dvalue, *depth_gradients


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
    if _no_slots(depth_key, depth_length):
        nothing = jnp.zeros_like(query)
        rest = nothing if with_rest and query.dtype != jnp.float32 else None
        return nothing, jnp.full_like(query[..., 0], -jnp.inf, dtype=jnp.float32), rest
    out, lse = depth.forward(query, depth_key, depth_value, depth_length, scale)
    out, rest = rounded(out, query.dtype, with_rest=with_rest)
    return out, lse, rest


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
    lse, delta = _without_empty_rows(lse, delta)
    buffers = _gradient_buffers(depth_key, depth_value, depth_key_gradient, depth_value_gradient)
    if _no_slots(depth_key, depth_length):
        return jnp.zeros_like(query), *buffers
    dquery, *buffers = depth.backward(query, depth_key, depth_value, depth_length, dout, lse, delta, scale, *buffers)
    return dquery.astype(query.dtype), *buffers


def _no_slots(depth_key: Array | None, depth_length: int | Array | None) -> bool:
    """True if it is known while tracing that no slot is filled."""
    return depth_key is None or depth_key.shape[2] == 0 or (isinstance(depth_length, int) and depth_length == 0)


def _gradient_buffers(
    depth_key: Array | None, depth_value: Array | None, key_buffer: Array | None, value_buffer: Array | None
) -> tuple[Array | None, Array | None]:
    """The buffers that the depth gradients are added to: the caller's, or zeros in the inputs' dtype."""
    if depth_key is None:
        return None, None
    key_buffer = jnp.zeros_like(depth_key) if key_buffer is None else key_buffer
    value_buffer = jnp.zeros_like(depth_value) if value_buffer is None else value_buffer
    return key_buffer, value_buffer


def _without_empty_rows(lse: Array, delta: Array) -> tuple[Array, Array]:
    """lse and delta such that a query that saw nothing gets exp(logits - lse) = 0 and no gradient."""
    empty = lse < MASKED
    return jnp.where(empty, -MASKED, lse), jnp.where(empty, 0.0, delta)


def _merge(out: Array, lse: Array, other_out: Array, other_lse: Array) -> tuple[Array, Array]:
    """One softmax from two parts, all float32. Where `other` is empty the first part comes back bit for bit."""
    top = jnp.maximum(jnp.maximum(lse, other_lse), MASKED)
    weight, other_weight = jnp.exp(lse - top), jnp.exp(other_lse - top)
    total = weight + other_weight
    merged = (out * weight[..., None] + other_out * other_weight[..., None]) / jnp.maximum(total, 1e-30)[..., None]
    empty = other_lse < MASKED
    return jnp.where(empty[..., None], out, merged), jnp.where(empty, lse, top + jnp.log(total))
