"""The public op: `moda_attention` and `depth_attention`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import block, dispatch, validation


class _Masks(NamedTuple):
    """What else restricts the keys that a query sees, each int32 or None; the names are `pallas_kernels.block`'s."""

    query_positions: Array | None  # [B, Tq]
    query_segment_ids: Array | None  # [B, Tq]
    key_segment_ids: Array | None  # [B, T]
    key_length: Array | None  # [B]


class _Static(NamedTuple):
    """What a call fixes while tracing; hashable."""

    scale: float
    causal: bool
    implementation: str


def moda_attention(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None = None,
    depth_value: Array | None = None,
    *,
    depth_length: int | Array | None = None,
    causal: bool = True,
    segment_ids: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    query_positions: Array | None = None,
    key_length: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Mixture-of-depths attention: each query attends, under one softmax, to the sequence and to its own token's depth.

        logits_t = [ query_t . key_0..t , query_t . depth_key[t, 0..n-1] ] * scale,    n = depth_length
        out_t    = softmax(logits_t) @ [ value_0..t ; depth_value[t, 0..n-1] ],    lse_t = log(sum(exp(logits_t)))

    Query head h reads key/value head h // G, for the sequence and the depth KV alike. Differentiable in query, key,
    value, depth_key and depth_value, through out and lse: once and in reverse mode ("reference": as often as wanted).
    The contents of unfilled slots, NaN included, do not matter and their gradient is exactly 0. Without a filled slot
    this is plain attention, bit for bit.

    With a cache. `query_positions` lets a query [B, Tq, N, H] be shorter than the keys [B, T, K, H], at any indices of
    them, and `key_length` says how many keys of each row are filled; both may be traced, so one compilation serves a
    static cache while it fills. What lies at or beyond key_length does not matter, as with slots; "mosaic_gpu" pays one
    pass over key and value for that. The depth arrays are those of the queries' tokens, [B, Tq, S, K, H]. A query that
    sees no key and no slot: out 0, lse -inf, gradients 0. That is read off the masks, whatever the logits are.

    Numbers. Logits have to be finite in float32, of any size; beyond, out may be NaN or 0. "mosaic_gpu" takes them up
    to 2^30 in size: its exponents are a fused product and sum, which the rounding of a larger maximum takes out of
    range, and then out may be NaN, or a slot's part missing.
    A logit is rounded to 2^-24 of its size, so the relative error of float32 results grows with |lse|: measured against
    float64 (T = 64, S = 8, H = 16, logits shifted by a constant), out and the gradients are off by 0.9 to 1.8 times
    |lse| 2^-24: 3e-7 at |lse| = 5, 9e-6 at 100, 1e-3 at 10^4. lse itself keeps 5e-8.
    A NaN or an infinity in a value of the sequence may reach every query of its row and KV head, also those at earlier
    positions, which do not attend to it: its weight there is 0, and 0 * NaN is NaN. How many of them depends on the
    implementation's blocks ("reference": all); the same holds for the gradients, and there for a key too. It never
    reaches other rows, nor, from a depth array, another token.

    Under a scanned or unrolled stack of layers plain autodiff through this op keeps one copy of the depth arrays per
    layer, O(S^2) in all; `moda_jax.depth_scan` avoids that.

    Args:
        query: [B, T, N, H], float32, bfloat16 or float16; the other arrays share its dtype. With a cache [B, Tq, N, H],
            Tq <= T, and so are out, lse and the depth arrays.
        key, value: [B, T, K, H]; K divides N.
        depth_key, depth_value: [B, T, S, K, H], the entries that preceding layers wrote at each token; both or neither.
        depth_length: filled slots: an int in 0..S, or an int32 scalar array, which is clipped to 0..S; None: all S.
        causal: a query sees the keys at indices up to its own position; else all.
        segment_ids: [B, T] int32, of the keys; a query has the id of the key at its position, the first's or last's if
            that lies outside of 0..T-1, and sees keys of an equal id only. The depth part is not affected.
        scale: a number, finite in float32, that multiplies the logits; None: H ** -0.5.
        implementation: "reference", "xla", "mosaic_gpu" or "triton"; None: the best for this device, logged once.
        query_positions: [B, Tq] int32, the queries' places among the keys; needed if there are fewer queries than keys;
            None: 0..T-1.
        key_length: [B] int32, filled keys, clipped to 0..T; no query sees a key at an index >= key_length. None: all.
        return_lse: also return lse.

    Returns:
        out [B, T, N, H] in the inputs' dtype; with `return_lse` (out, lse), lse [B, T, N] float32, natural logarithm,
        over sequence and depth together.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, type or range; the message names it.
        NotImplementedError: the named implementation cannot serve the call; the message says what it lacks.

    Source: arXiv 2603.15619, Algorithm 1.
    """
    validation.check_attention(
        query, key, value, depth_key, depth_value, segment_ids, query_positions, key_length, causal, return_lse
    )
    slots = 0 if depth_key is None else depth_key.shape[2]
    depth_length = validation.checked_depth_length(depth_length, slots)
    scale = validation.checked_scale(scale, query.shape[-1])
    if slots == 0 or (isinstance(depth_length, int) and depth_length == 0):
        depth_key = depth_value = depth_length = None  # plain attention; what is not read has gradient 0
    key_length = validation.checked_key_length(key_length, key.shape[1])
    masks = _Masks(query_positions, _query_segment_ids(segment_ids, query_positions), segment_ids, key_length)
    facts = block.attention_facts(query, key, depth_key, bool(causal), scale, **masks._asdict())
    static = _Static(scale, bool(causal), dispatch.resolve(implementation, **facts))
    if key_length is not None and static.implementation == "mosaic_gpu":  # its blocks multiply what is hidden by 0
        key, value = (_without_unfilled(array, key_length) for array in (key, value))
    arrays = query, key, value, depth_key, depth_value, _as_array(depth_length), masks
    function = _attention_forward if static.implementation == "reference" else _attention
    out, lse = function(static, *arrays)
    return (out, lse) if return_lse else out


def depth_attention(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    *,
    depth_length: int | Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """The depth part alone: every query attends to the filled depth slots of its own token.

        out_t = softmax(query_t . depth_key[t, 0..n-1] * scale) @ depth_value[t, 0..n-1],    n = depth_length

    Args:
        query: [B, T, N, H], float32, bfloat16 or float16.
        depth_key, depth_value: [B, T, S, K, H], the query's dtype; K divides N.
        depth_length, scale, implementation, return_lse: as in `moda_attention`.

    Returns:
        As `moda_attention`. Without a filled slot out is 0, lse is -inf and the gradients are 0.

    Raises:
        ValueError, NotImplementedError: as `moda_attention`.
    """
    validation.check_depth(query, depth_key, depth_value, return_lse)
    depth_length = validation.checked_depth_length(depth_length, depth_key.shape[2])
    scale = validation.checked_scale(scale, query.shape[-1])
    static = _Static(scale, False, dispatch.resolve(implementation, **block.depth_facts(query, depth_key, scale)))
    function = _depth_forward if static.implementation == "reference" else _depth
    out, lse = function(static, query, depth_key, depth_value, _as_array(depth_length))
    return (out, lse) if return_lse else out


def _query_segment_ids(segment_ids: Array | None, query_positions: Array | None) -> Array | None:
    """[B, Tq]: the ids of the keys at the queries' positions."""
    if segment_ids is None or query_positions is None:
        return segment_ids
    segment_ids, query_positions = jnp.asarray(segment_ids), jnp.asarray(query_positions)
    return jnp.take_along_axis(segment_ids, jnp.clip(query_positions, 0, segment_ids.shape[1] - 1), axis=1)


def _without_unfilled(array: Array, key_length: Array) -> Array:
    """[B, T, K, H] with zeros at indices >= key_length, and so no gradient there."""
    array = jnp.asarray(array)
    filled = jnp.arange(array.shape[1], dtype=jnp.int32)[None] < key_length[:, None]  # [B, T]
    return jnp.where(filled[:, :, None, None], array, jnp.zeros_like(array))


def _as_array(depth_length: int | Array | None) -> Array | None:
    return None if depth_length is None else jnp.asarray(depth_length, jnp.int32)


# One compilation for all calls of a kind outside of jit; inside of one, just the operations themselves.
_compiled = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(_compiled, static_argnames="with_rest")
def _attention_forward(static: _Static, *arrays: Array | None, with_rest: bool = False) -> tuple[Array, ...]:
    *arrays, masks = arrays
    return block.attention_forward(
        *arrays, scale=static.scale, causal=static.causal, **masks._asdict(),
        with_rest=with_rest, implementation=static.implementation,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, *arrays: Array | None) -> tuple[Array, Array]:
    """(out, lse) of query, key, value, depth_key, depth_value, depth_length, masks."""
    return _attention_forward(static, *arrays)


def _attention_fwd(static: _Static, *arrays: Array | None) -> tuple[tuple[Array, Array], tuple]:
    out, lse, rest = _attention_forward(static, *arrays, with_rest=True)
    return (out, lse), (arrays, out, lse, rest)


@_compiled
def _attention_bwd(static: _Static, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    (*arrays, masks), out, lse, rest = residuals
    dout, dlse = gradients
    gradients = block.attention_backward(
        *arrays, dout, lse, _delta(dout, out, rest, dlse), scale=static.scale, causal=static.causal,
        **masks._asdict(), implementation=static.implementation,
    )  # fmt: skip
    return *gradients, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(_compiled, static_argnames="with_rest")
def _depth_forward(static: _Static, *arrays: Array | None, with_rest: bool = False) -> tuple[Array, ...]:
    return block.depth_forward(*arrays, scale=static.scale, with_rest=with_rest, implementation=static.implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depth(static: _Static, *arrays: Array | None) -> tuple[Array, Array]:
    """(out, lse) of query, depth_key, depth_value, depth_length."""
    return _depth_forward(static, *arrays)


def _depth_fwd(static: _Static, *arrays: Array | None) -> tuple[tuple[Array, Array], tuple]:
    out, lse, rest = _depth_forward(static, *arrays, with_rest=True)
    return (out, lse), (arrays, out, lse, rest)


@_compiled
def _depth_bwd(static: _Static, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    arrays, out, lse, rest = residuals
    dout, dlse = gradients
    gradients = block.depth_backward(
        *arrays, dout, lse, _delta(dout, out, rest, dlse), scale=static.scale, implementation=static.implementation
    )
    return *gradients, None


_depth.defvjp(_depth_fwd, _depth_bwd)


def _delta(dout: Array, out: Array, rest: Array | None, dlse: Array) -> Array:
    """[B, T, N] float32: rowsum(dout * (out + rest)) - dlse, what the softmax's gradient subtracts from dP.

    In a row whose softmax is peaked dP - delta is small beside both. A delta from out alone in a narrow dtype, as
    FlashAttention takes it, then costs more than all the rest of the backward: 10 times the dense error and more was
    seen at T = 3.
    """
    wide = out.astype(jnp.float32)
    if rest is not None:
        wide += rest.astype(jnp.float32)
    return jnp.sum(dout.astype(jnp.float32) * wide, axis=-1) - dlse
