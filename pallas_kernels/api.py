"""The public op: `moda_attention` and `depth_attention`."""

from __future__ import annotations

from jax import Array

from pallas_kernels import block, validation
from pallas_kernels.operands import Call, DepthKV, Mask


def moda_attention(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None = None,
    depth_value: Array | None = None,
    *,
    depth_length: int | Array | None = None,
    depth_start: int | Array | None = None,
    depth_chunk: int = 1,
    causal: bool = True,
    segment_ids: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    query_positions: Array | None = None,
    key_length: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Mixture-of-depths attention: each query attends, under one softmax, to the sequence and to its own token's depth.

        logits_t = [ query_t . key_0..t , query_t . depth_key[t, m..n-1] ] * scale,    n = depth_length, m = depth_start
        out_t    = softmax(logits_t) @ [ value_0..t ; depth_value[t, m..n-1] ],    lse_t = log(sum(exp(logits_t)))

    Query head h reads key/value head h // G, for the sequence and the depth KV alike. Differentiable in query, key,
    value, depth_key and depth_value, through out and lse: once and in reverse mode ("reference": as often as wanted).
    The contents of slots outside of the window m..n-1, NaN included, do not matter and their gradient is exactly 0.
    Without a slot in it this is plain attention, bit for bit.

    With a chunk. `depth_chunk` = C > 1 shows a query also the slots of the earlier tokens of its chunk of C tokens,
    under the same softmax: in the equations depth_key[t, m..n-1] becomes depth_key[t - p % C..t, m..n-1], depth_value
    alike, where p is the place of t in its document. Chunks are counted from every document's first token; a document
    is a run of one segment id, or the row. `causal` has no part in that. "reference" and "xla" serve it.

    With a cache. `query_positions` lets a query [B, Tq, N, H] be shorter than the keys [B, T, K, H], at any indices of
    them, and `key_length` says how many keys of each row are filled; both may be traced, so one compilation serves a
    static cache while it fills. What lies at or beyond key_length does not matter, as with slots; "mosaic_gpu" pays one
    pass over key and value for that. The depth arrays are those of the queries' tokens, [B, Tq, S, K, H]. A query that
    sees no key and no slot: out 0, lse -inf, gradients 0. That is read off the masks, whatever the logits are.

    Numbers. Logits have to be finite in float32, of any size; beyond, out may be NaN or 0. "mosaic_gpu" and
    "triton" take them up to 2^30 in size: their exponents are a fused product and sum, which the rounding of a larger
    maximum takes out of range, and then out may be NaN, or a slot's part missing.
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
        depth_start: the first of them that is seen, in the same forms; None: 0. Not below depth_length: none is.
        depth_chunk: C, an int of at least 1; 1: a query sees its own token's slots. Not more with `query_positions`:
            the depth arrays then lack the slots of tokens before the queries.
        causal: a query sees the keys at indices up to its own position; else all.
        segment_ids: [B, T] int32, of the keys; a query has the id of the key at its position, the first's or last's if
            that lies outside of 0..T-1, and sees keys of an equal id only. The depth part is not affected, but for
            where chunks begin.
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
    call = Call(
        query, key, value,
        Mask(causal, query_positions, key_segment_ids=segment_ids, key_length=key_length),
        _depth(depth_key, depth_value, depth_start, depth_length, depth_chunk), scale,
    )  # fmt: skip
    return _result(validation.checked_attention(call), implementation, return_lse)


def depth_attention(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    *,
    depth_length: int | Array | None = None,
    depth_start: int | Array | None = None,
    depth_chunk: int = 1,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """The depth part alone: every query attends to the filled depth slots of its own token.

        out_t = softmax(query_t . depth_key[t, m..n-1] * scale) @ depth_value[t, m..n-1],    n = depth_length,
                                                                                            m = depth_start

    Args:
        query: [B, T, N, H], float32, bfloat16 or float16.
        depth_key, depth_value: [B, T, S, K, H], the query's dtype; K divides N.
        depth_length, depth_start, depth_chunk, scale, implementation, return_lse: as in `moda_attention`; a row is one
            document.

    Returns:
        As `moda_attention`. Without a slot in the window out is 0, lse is -inf and the gradients are 0.

    Raises:
        ValueError, NotImplementedError: as `moda_attention`.
    """
    depth = DepthKV(depth_key, depth_value, depth_start, depth_length, chunk=validation.checked_chunk(depth_chunk))
    call = Call(query, depth=depth, scale=scale)
    return _result(validation.checked_depth(call), implementation, return_lse)


def _depth(key: Array | None, value: Array | None, start: object, length: object, chunk: object) -> DepthKV | None:
    """The depth part as it was given; None without any array or bound."""
    given, chunk = (key, value, start, length), validation.checked_chunk(chunk)
    return None if all(x is None for x in given) else DepthKV(*given, chunk=chunk)


def _result(call: Call, implementation: str | None, return_lse: bool) -> Array | tuple[Array, Array]:
    validation.check_bool("return_lse", return_lse)
    part = block.attend(call, implementation=implementation)
    return (part.out, part.lse) if return_lse else part.out
