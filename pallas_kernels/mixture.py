"""A softmax mixture of a token's slots of hidden states, and its backward: the choice between the kernels and XLA.

    l_s = (w . v_s) / sqrt(mean(v_s^2) + epsilon),    out = sum_s softmax(l)_s v_s

Axes: B batch, T tokens, S slots, D columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import partition
from pallas_kernels.hidden_slots import STREAM, TOKENS, WHOLE, added, chosen, filled, is_filled, kernels, rows, takes

MASKED = -1e30  # a masked logit: exp(MASKED - any real logit) is exactly 0


def softmax_mixture(
    hidden: Array, direction: Array, length: Array | np.int32, *, epsilon: float, implementation: str | None = None
) -> tuple[Array, Array]:
    """The mixture and its log-sum-exp.

    Args:
        hidden: [B, T, S, D], any float dtype. What stands in slots from `length` on does not count, and may be NaN.
        direction: [D] float32.
        length: int32 scalar, the filled slots.
        epsilon: added to the mean square.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Returns:
        [B, T, D] in hidden's dtype, and [B, T] float32; without a filled slot 0 and -inf.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such a stream.
    """
    if chosen(implementation, hidden) == "xla":
        return _xla_forward(hidden, direction, length, epsilon)
    rule = partition.Rule((STREAM, ("columns",), ()), ((*TOKENS, "columns"), TOKENS), WHOLE)

    def local(axes: partition.Axes, hidden: Array, direction: Array, length: Array) -> tuple[Array, Array]:
        del axes
        if not takes(hidden):  # a device's part may be of another number of tokens
            return _xla_forward(hidden, direction, length, epsilon)
        out, lse = kernels("mixture").mixture_forward(rows(hidden), direction, length, epsilon=epsilon)
        return out.reshape(*hidden.shape[:2], -1), lse.reshape(hidden.shape[:2])

    return tuple(partition.partitioned(local, rule, [hidden, direction, jnp.asarray(length, jnp.int32)]))


def softmax_mixture_backward(
    hidden: Array,
    direction: Array,
    length: Array | np.int32,
    result: tuple[Array, Array],
    dresult: tuple[Array, Array],
    dhidden: Array,
    *,
    epsilon: float,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The direction's gradient, and `dhidden` with the slots' gradients added.

    The kernel takes what the mixture's gradient has along it from the rounded mixture, XLA's form from the products.

    Args:
        hidden, direction, length, epsilon, implementation: as in `softmax_mixture`.
        result: what that returned.
        dresult: its gradient.
        dhidden: [B, T, S, D], any float dtype; in place where the caller donates or carries it.

    Returns:
        [D] float32, summed over all tokens, and [B, T, S, D] in dhidden's dtype.

    Raises:
        ValueError, NotImplementedError: as `softmax_mixture`.
    """
    if chosen(implementation, hidden) == "xla":
        return _xla_backward(hidden, direction, length, result, dresult, dhidden, epsilon)
    outer = (*TOKENS, "columns")
    rule = partition.Rule(
        (STREAM, ("columns",), (), outer, TOKENS, outer, TOKENS, STREAM), (("columns",), STREAM), WHOLE
    )

    def local(axes: partition.Axes, hidden: Array, direction: Array, length: Array, *others: Array) -> list[Array]:
        out, lse, dout, dlse, dhidden = others
        if takes(hidden):
            ddirection, total = kernels("mixture").mixture_backward(
                rows(hidden), direction, length, (rows(out), lse.reshape(-1)), (rows(dout), dlse.reshape(-1)),
                rows(dhidden), epsilon=epsilon,
            )  # fmt: skip
            total = total.reshape(dhidden.shape)
        else:
            ddirection, total = _xla_backward(hidden, direction, length, (out, lse), (dout, dlse), dhidden, epsilon)
        split = tuple(axis for name in TOKENS for axis in axes.get(name, ()))
        return [jax.lax.psum(ddirection, split) if split else ddirection, total]

    operands = [hidden, direction, jnp.asarray(length, jnp.int32), *result, *dresult, dhidden]
    ddirection, total = partition.partitioned(local, rule, operands, references=True)
    return partition.laid_out_like(ddirection, direction), partition.laid_out_like(total, dhidden)


def along_last(vector: Array, like: Array) -> Array:
    """`vector` [D] as float32 beside `like` [..., D]: of its rank, so that strict rank promotion has nothing to say."""
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + vector.shape)


def mixture_logit(direction: Array, hidden: Array, epsilon: float) -> tuple[Array, Array]:
    """The logits of hidden states [..., D], and their inverse root mean squares, [...] float32."""
    hidden = hidden.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(hidden * hidden, axis=-1) + epsilon)
    return jnp.sum(hidden * along_last(direction, hidden), axis=-1) * inverse, inverse


def _xla_forward(hidden: Array, direction: Array, length: Array | np.int32, epsilon: float) -> tuple[Array, Array]:
    logits, _, wide = _logits(hidden, direction, length, epsilon)
    top = jnp.max(logits, axis=-1)  # [B, T]
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(jnp.where(logits > MASKED, weights, 0.0), axis=-1)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    mixture = jnp.sum(_weights(logits, lse)[..., None] * wide, axis=2)
    return mixture.astype(hidden.dtype), lse


def _xla_backward(
    hidden: Array,
    direction: Array,
    length: Array | np.int32,
    result: tuple[Array, Array],
    dresult: tuple[Array, Array],
    dhidden: Array,
    epsilon: float,
) -> tuple[Array, Array]:
    """dv_s = a_s dmix + dlogit_s (r_s direction - logit_s r_s^2 / D v_s), dlogit_s = a_s (dmix . v_s - delta)."""
    (_, lse), (dmixture, dlse) = result, dresult
    logits, inverse, wide = _logits(hidden, direction, length, epsilon)
    weights = _weights(logits, lse)  # [B, T, S]
    dmixture = dmixture.astype(jnp.float32)
    along = jnp.sum(dmixture[:, :, None] * wide, axis=-1)  # [B, T, S]
    # From the products themselves, not from the rounded mixture.
    delta = jnp.sum(weights * along, axis=-1) - dlse
    dlogits = weights * (along - delta[..., None])
    slope = dlogits * inverse
    ddirection = jnp.sum(slope[..., None] * wide, axis=(0, 1, 2))
    curvature = dlogits * logits * inverse**2 / wide.shape[-1]
    more = (
        weights[..., None] * dmixture[:, :, None]
        + slope[..., None] * along_last(direction, wide)
        - jnp.where(weights > 0, curvature, 0.0)[..., None] * wide
    )
    return ddirection, added(dhidden, more)


def _logits(hidden: Array, direction: Array, length: Array | np.int32, epsilon: float) -> tuple[Array, Array, Array]:
    """Logits and inverse root mean squares [B, T, S], and the slots [B, T, S, D], zero where not filled."""
    wide = filled(hidden, length)
    logits, inverse = mixture_logit(direction, wide, epsilon)
    return jnp.where(is_filled(hidden.shape[2], length), logits, MASKED), inverse, wide


def _weights(logits: Array, lse: Array) -> Array:
    """softmax(logits) from their log-sum-exp; 0 where nothing is filled."""
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    return jnp.where(logits > MASKED, weights, 0.0)
