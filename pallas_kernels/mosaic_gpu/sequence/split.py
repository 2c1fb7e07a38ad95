"""Few queries over many keys, as in decoding: the keys are cut into parts, so that every multiprocessor has some.

The sequence forward gives a CTA to every 64 queries of a head, which walks over all keys. With few queries and few rows
most multiprocessors would have none. Here the parts of a row stand as rows of their own, by a reshape: the keys are not
copied. Each part is normalised by itself; XLA merges them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.sequence.forward import sequence_forward
from pallas_kernels.operands import Call, Mask
from pallas_kernels.parts import Part, merge_axis

MOST_QUERIES = 64  # of a CTA with one consumer warpgroup
# Two CTAs for each multiprocessor of an H100, of no fewer keys than two of the kernel's blocks have.
CTAS = 2 * 132
FEWEST_KEYS = 128


def splits(call: Call) -> bool:
    """Whether a call is of this form: few queries, each with KV of its own head, that see keys by length or segment."""
    few = call.query.shape[1] <= MOST_QUERIES and call.query.shape[2] == call.key.shape[2]
    return few and call.depth is None and not call.mask.causal


def split_forward(call: Call, *, with_rest: bool = False, interpret: bool | None = None) -> Part:
    """`sequence_forward` of such a call."""
    batch, tokens, heads, head_dim = call.query.shape
    parts = num_parts(batch * heads, call.key.shape[1])
    if parts == 1:
        return sequence_forward(call, with_rest=with_rest, interpret=interpret)
    rows, keys = batch * parts, call.key.shape[1] // parts
    queries = jnp.broadcast_to(call.query[:, None], (batch, parts, tokens, heads, head_dim))
    key, value = (x.reshape(rows, keys, *x.shape[2:]) for x in (call.key, call.value))
    split = Call(queries.reshape(rows, tokens, heads, head_dim), key, value, _mask(call.mask, parts, keys))
    part = sequence_forward(dataclasses.replace(split, scale=call.scale), interpret=interpret)
    part = jax.tree.map(lambda x: x.reshape(batch, parts, *x.shape[1:]), part)
    # What rounding takes from the merged out is kept in any case: it may be merged once more.
    return merge_axis(part, 1).rounded(call.query.dtype, with_rest=True)


def num_parts(rows: int, keys: int) -> int:
    """P, a divisor of the keys: of those with parts not too small the first that fills the GPU, or the last."""
    fitting = [p for p in range(1, keys + 1) if keys % p == 0 and (p == 1 or keys // p >= FEWEST_KEYS)]
    return next((p for p in fitting if rows * p >= CTAS), fitting[-1])


def _mask(mask: Mask, parts: int, keys: int) -> Mask:
    """Of all parts as rows, each of `keys` keys."""
    length = query_ids = key_ids = None
    if mask.key_length is not None:
        length = jnp.clip(mask.key_length[:, None] - jnp.arange(parts, dtype=jnp.int32) * keys, 0, keys).reshape(-1)
    if mask.query_segment_ids is not None:
        query_ids = jnp.repeat(mask.query_segment_ids, parts, axis=0)
        key_ids = mask.key_segment_ids.reshape(-1, keys)
    return Mask(False, None, None, query_ids, key_ids, length, mask.finite_beyond)
