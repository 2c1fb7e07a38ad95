"""Weighted sums of a token's slots of hidden states, and their backward: the choice between the kernels and XLA.

    out_c = sum_s weight_cs v_s

Axes: B batch, T tokens, C sums, S slots, D columns.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import partition
from pallas_kernels.hidden_slots import STREAM, TOKENS, WHOLE, added, chosen, filled, is_filled, kernels, rows, takes

_WEIGHTS, _OUT = (*TOKENS, "sums", "slots"), (*TOKENS, "sums", "columns")


def weighted_sums(
    hidden: Array, weights: Array, length: Array | np.int32, *, implementation: str | None = None
) -> Array:
    """The sums over the filled slots.

    Args:
        hidden: [B, T, S, D], any float dtype. What stands in slots from `length` on does not count, and may be NaN.
        weights: [B, T, C, S] float32, each token's own.
        length: int32 scalar, the filled slots.
        implementation: "xla" or "mosaic_gpu"; None: the best that this device and these shapes have.

    Returns:
        [B, T, C, D] in hidden's dtype.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such a stream, or so many sums.
    """
    if _chosen(implementation, hidden, weights) == "xla":
        return _xla_forward(hidden, weights, length)

    def local(axes: partition.Axes, hidden: Array, weights: Array, length: Array) -> tuple[Array]:
        del axes
        if not takes(hidden):
            return (_xla_forward(hidden, weights, length),)
        out = kernels("weighted_sums").sums_forward(rows(hidden), rows(weights), length)
        return (out.reshape(*hidden.shape[:2], *out.shape[1:]),)

    rule = partition.Rule((STREAM, _WEIGHTS, ()), (_OUT,), WHOLE)
    return partition.partitioned(local, rule, [hidden, weights, jnp.asarray(length, jnp.int32)])[0]


def weighted_sums_backward(
    hidden: Array,
    weights: Array,
    length: Array | np.int32,
    dout: Array,
    dhidden: Array,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The weights' gradient, and `dhidden` with the slots' gradients added.

    Args:
        hidden, weights, length, implementation: as in `weighted_sums`.
        dout: [B, T, C, D].
        dhidden: [B, T, S, D], any float dtype; in place where the caller donates or carries it.

    Returns:
        [B, T, C, S] float32, 0 in slots that are not filled, and [B, T, S, D] in dhidden's dtype.

    Raises:
        ValueError, NotImplementedError: as `weighted_sums`.
    """
    if _chosen(implementation, hidden, weights) == "xla":
        return _xla_backward(hidden, weights, length, dout, dhidden)

    def local(axes: partition.Axes, hidden: Array, weights: Array, length: Array, *others: Array) -> list[Array]:
        del axes
        dout, dhidden = others
        if not takes(hidden):
            return list(_xla_backward(hidden, weights, length, dout, dhidden))
        dweights, total = kernels("weighted_sums").sums_backward(
            *map(rows, (hidden, weights)), length, *map(rows, others)
        )
        return [dweights.reshape(weights.shape), total.reshape(dhidden.shape)]

    rule = partition.Rule((STREAM, _WEIGHTS, (), _OUT, STREAM), (_WEIGHTS, STREAM), WHOLE)
    operands = [hidden, weights, jnp.asarray(length, jnp.int32), dout, dhidden]
    dweights, total = partition.partitioned(local, rule, operands, references=True)
    dweights = jnp.where(is_filled(hidden.shape[2], length)[:, :, None], dweights, 0.0)
    return partition.laid_out_like(dweights, weights), partition.laid_out_like(total, dhidden)


def _chosen(implementation: str | None, hidden: Array, weights: Array) -> str:
    name = chosen(implementation, hidden)
    if name == "xla":
        return name
    try:
        kernels("weighted_sums").check_sums(weights.shape[2])
    except NotImplementedError:
        if implementation is not None:
            raise
        return "xla"
    return name


def _xla_forward(hidden: Array, weights: Array, length: Array | np.int32) -> Array:
    known = jnp.where(is_filled(hidden.shape[2], length)[:, :, None], weights, 0.0)
    wide = filled(hidden, length)
    sums = [jnp.sum(known[:, :, c, :, None] * wide, axis=2) for c in range(weights.shape[2])]
    return jnp.stack(sums, axis=2).astype(hidden.dtype)


def _xla_backward(
    hidden: Array, weights: Array, length: Array | np.int32, dout: Array, dhidden: Array
) -> tuple[Array, Array]:
    """dv_s = sum_c weight_cs dout_c, dweight_cs = dout_c . v_s."""
    dout = dout.astype(jnp.float32)
    wide = filled(hidden, length)
    known = jnp.where(is_filled(hidden.shape[2], length)[:, :, None], weights, 0.0)
    sums = range(weights.shape[2])
    dweights = jnp.stack([jnp.sum(dout[:, :, c, None] * wide, axis=-1) for c in sums], axis=2)
    more = sum(known[:, :, c, :, None] * dout[:, :, c, None] for c in sums)
    return dweights, added(dhidden, more)
