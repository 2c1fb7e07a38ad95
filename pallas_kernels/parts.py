"""A part of a softmax: what attention over some of the keys comes to. Parts over different keys merge exactly:

    lse = log(sum_i exp(lse_i)),    out = sum_i exp(lse_i - lse) out_i

The gradients of a part need of the others only the merged lse and delta = rowsum(dout * out) - dlse:

    P = exp(query . key * scale - lse),  dP = dout . value,  dS = P * (dP - delta)
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.rounding import rounded

LOWEST = float(np.finfo(np.float32).min)


class Part(NamedTuple):
    """Attention over some of the keys, normalised by itself.

    Attributes:
        out: [B, T, N, H]; 0 for a query that sees none of them.
        lse: [B, T, N] float32, natural logarithm; -inf there.
        rest: what rounding took from out, in its dtype; None: it was not kept, or nothing was taken. out + rest, in
            float32, is what parts are best merged from, and what delta needs where a softmax is peaked.
    """

    out: Array
    lse: Array
    rest: Array | None = None

    @property
    def wide(self) -> Array:
        """out in float32, with what rounding took from it."""
        wide = self.out.astype(jnp.float32)
        return wide if self.rest is None else wide + self.rest.astype(jnp.float32)

    def rounded(self, dtype: jnp.dtype, *, with_rest: bool) -> Part:
        """A part in float32, rounded to `dtype`; `with_rest`: and what that takes from it."""
        out, rest = rounded(self.out, dtype, with_rest=with_rest)
        return Part(out, self.lse, rest)

    @classmethod
    def of_nothing(cls, query: Array, *, with_rest: bool = False) -> Part:
        """What queries [B, T, N, H] that see nothing come to."""
        nothing = jnp.zeros_like(query)
        rest = nothing if with_rest and query.dtype != jnp.float32 else None
        return cls(nothing, jnp.full_like(query[..., 0], -jnp.inf, dtype=jnp.float32), rest)


def merge(part: Part, other: Part) -> Part:
    """The part over the keys of both, in float32. Where `other` is empty the first comes back bit for bit."""
    out, other_out = part.wide, other.wide
    top = jnp.maximum(jnp.maximum(part.lse, other.lse), LOWEST)
    weight, other_weight = jnp.exp(part.lse - top), jnp.exp(other.lse - top)
    total = weight + other_weight
    merged = (out * weight[..., None] + other_out * other_weight[..., None]) / jnp.maximum(total, 1e-30)[..., None]
    empty = other.lse < LOWEST
    return Part(jnp.where(empty[..., None], out, merged), jnp.where(empty, part.lse, top + jnp.log(total)))


def merge_axis(part: Part, axis: int) -> Part:
    """Of many parts that stand along an axis of out and lse, the part over the keys of all, in float32."""
    top = jnp.maximum(jnp.max(part.lse, axis=axis, keepdims=True), LOWEST)
    weights = jnp.exp(part.lse - top)
    total = jnp.sum(weights, axis=axis)
    out = jnp.sum(weights[..., None] * part.wide, axis=axis) / jnp.maximum(total, 1e-30)[..., None]
    return Part(out, jnp.squeeze(top, axis) + jnp.log(total))


def delta(dout: Array, part: Part, dlse: Array | None = None) -> Array:
    """[B, T, N] float32: rowsum(dout * out) - dlse, what the softmax's gradient subtracts from dP.

    In a row whose softmax is peaked dP - delta is small beside both. A delta from out alone in a narrow dtype, as
    FlashAttention takes it, then costs more than all the rest of the backward: 10 times the dense error and more was
    seen at T = 3.

    Args:
        dout: [B, T, N, H], gradient of out.
        part: the whole softmax's.
        dlse: [B, T, N], gradient of lse; None: 0.
    """
    sums = jnp.sum(dout.astype(jnp.float32) * part.wide, axis=-1)
    return sums if dlse is None else sums - dlse
