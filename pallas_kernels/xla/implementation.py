"""Memory-efficient attention over sequence KV and depth KV in plain JAX, for any device.

    logits = [ query . key[0..U-1] , query . depth_key[t, 0..n-1] ] * scale
    out    = softmax(logits) @ [ value ; depth_value[t] ],   lse = log(sum(exp(logits)))

The sequence part (`sequence.py`) walks over blocks of queries and, inside, blocks of keys with an online softmax; the
backward walks over the same blocks once and recomputes the probabilities from lse. Under the default causal mask the
key blocks above the diagonal are not visited: the inner trip count depends on the query block. No array is larger than
a block of logits plus O(T), whatever T and S are.

The depth part (`depth.py`) is per token: it walks over blocks of tokens and, inside, over chunks of slots, as many as
hold slots that are seen; where queries see the slots of earlier tokens too, several times (`chunk.py`). The two parts
are merged by log-sum-exp; the backward needs only the merged lse and delta, so each part recomputes its own
probabilities exactly.

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

from pallas_kernels.operands import Call, Gradients, Upstream
from pallas_kernels.parts import Part, merge
from pallas_kernels.xla import chunk, depth, sequence
from pallas_kernels.xla.blocks import MASKED


def check_supported(call: Call) -> None:
    """Everything that the contract allows is supported."""


def forward(call: Call, *, with_rest: bool = False) -> Part:
    """See `pallas_kernels.dispatch`."""
    if call.key is None and not call.sees_slots:
        return Part.of_nothing(call.query, with_rest=with_rest)
    parts = []
    if call.key is not None:
        parts.append(sequence.forward(call))
    if call.sees_slots:
        alone = call.depth.chunk == 1
        parts.append(depth.forward(call.query, call.depth, call.scale) if alone else chunk.forward(call))
    part = parts[0] if len(parts) == 1 else merge(*parts)
    return part.rounded(call.query.dtype, with_rest=with_rest)


def gradient_group(call: Call) -> int:
    """See `pallas_kernels.dispatch`: nothing is gained by more than one."""
    del call
    return 1


def backward(call: Call, upstream: Upstream, buffers: tuple[Array, Array] | None = None) -> Gradients:
    """See `pallas_kernels.dispatch`."""
    upstream = _without_empty_rows(upstream)
    dquery, dkey, dvalue = None, None, None
    if call.key is not None:
        dquery, dkey, dvalue = sequence.backward(call, upstream)
    ddepth = (None, None) if call.depth is None else _gradient_buffers(call, buffers)
    if call.sees_slots:
        if call.depth.chunk == 1:
            depth_dquery, *ddepth = depth.backward(call.query, call.depth, upstream, call.scale, tuple(ddepth))
        else:
            depth_dquery, *ddepth = chunk.backward(call, upstream, tuple(ddepth))
            if buffers is None:
                ddepth = (x.astype(call.query.dtype) for x in ddepth)
        if dquery is None:
            dquery = depth_dquery
        else:  # bit for bit where no slot is seen, the sign of a zero included
            dquery = jnp.where(call.depth.any_seen(), dquery + depth_dquery, dquery)
    dquery = jnp.zeros_like(call.query) if dquery is None else dquery.astype(call.query.dtype)
    return Gradients(dquery if call.query_gradient else None, dkey, dvalue, *ddepth)


def _gradient_buffers(call: Call, buffers: tuple[Array, Array] | None) -> tuple[Array, Array]:
    """What the depth gradients are added to: the caller's buffers, or zeros in the query's dtype; where several tokens
    add to a slot, in float32."""
    depth = call.depth
    dtype = call.query.dtype if depth.chunk == 1 or depth.empty else jnp.float32
    return tuple(jnp.zeros_like(x, dtype) for x in (depth.key, depth.value)) if buffers is None else buffers


def _without_empty_rows(upstream: Upstream) -> Upstream:
    """lse and delta such that a query that saw nothing gets exp(logits - lse) = 0 and no gradient."""
    dout, lse, delta = upstream
    empty = lse < MASKED
    return Upstream(dout, jnp.where(empty, -MASKED, lse), jnp.where(empty, 0.0, delta))
