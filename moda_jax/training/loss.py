"""The training objective: cross-entropy in nats per target, and the z-loss beside it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.loss_blocks import LOGITS_BYTES, VOCABULARY_MULTIPLE, LossSums, num_blocks
from moda_jax.model.precision import contract

Array = jax.Array


def loss_sums(logits: Array, targets: Array, target_mask: Array) -> LossSums:
    """Cross-entropy and z-loss, summed over the positions that `target_mask` selects.

    Args:
        logits: [B, T, V], float32 (a narrower dtype is widened before the softmax).
        targets: [B, T] int32 in 0..V-1; where the mask is 0 any value is fine.
        target_mask: [B, T] float32, 1 where the target counts and 0 elsewhere.

    Returns:
        The three sums; all are 0 where no target counts.

    Source: the z-loss is PaLM's (Chowdhery et al. 2022, section 5); OLMo 2 uses it too.
    """
    return _sums(logits.astype(jnp.float32), targets, target_mask)[0]


def _sums(logits: Array, targets: Array, target_mask: Array) -> tuple[LossSums, Array, Array]:
    """The sums, log(Z) [B, T], and the targets [B, T] with a valid one wherever the mask is 0."""
    log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
    # Whatever stands where the mask is 0 must stay inside the vocabulary: a gather outside of it gives NaN.
    safe_targets = jnp.where(target_mask > 0, targets, 0)
    target_logits = jnp.take_along_axis(logits, safe_targets[..., None], axis=-1)[..., 0]  # [B, T]
    mask = target_mask.astype(jnp.float32)
    sums = LossSums(
        loss=jnp.sum(mask * (log_z - target_logits)),
        z_loss=jnp.sum(mask * jnp.square(log_z)),
        num_targets=jnp.sum(mask),
    )
    return sums, log_z, safe_targets


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def projected_loss_sums(
    z_loss: float, hidden: Array, table: Array, targets: Array, target_mask: Array
) -> tuple[Array, LossSums]:
    """`loss_sums` of logits = hidden table^T, which are never there all at once: 13 GB of them at 32768 x 100278.

    The tokens are taken in blocks of at most `LOGITS_BYTES` of float32 logits. Differentiated, a block's gradients are
    computed while its logits are there, so that nothing is computed twice: three matrix products in all, as with the
    logits kept.

    Args:
        z_loss: weight of the z-loss in the objective.
        hidden: [B, T, D] in the compute dtype.
        table: [V, D] float32; the products are in hidden's dtype, accumulated and returned in float32.
        targets, target_mask: [B, T], as in `loss_sums`.

    Returns:
        objective = sums.loss + z_loss * sums.z_loss, float32, and the sums. Differentiable through the objective alone,
        in hidden and table; the gradient through the sums is 0.
    """
    sums, _ = _blockwise(z_loss, hidden, table, targets, target_mask, gradients=False)
    return sums.loss + z_loss * sums.z_loss, sums


def _forward(z_loss: float, hidden: Array, table: Array, targets: Array, target_mask: Array) -> tuple[Any, Any]:
    sums, gradients = _blockwise(z_loss, hidden, table, targets, target_mask, gradients=True)
    return (sums.loss + z_loss * sums.z_loss, sums), gradients


def _backward(z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, Any]) -> tuple:
    dhidden, dtable = gradients
    scale = cotangents[0]
    return (dhidden * scale).astype(dhidden.dtype), dtable * scale, None, None


projected_loss_sums.defvjp(_forward, _backward)


def _blockwise(
    z_loss: float, hidden: Array, table: Array, targets: Array, target_mask: Array, *, gradients: bool
) -> tuple[LossSums, tuple[Array, Array] | None]:
    """The sums and, if asked for, the objective's gradients (dhidden [B, T, D], dtable [V, D] float32)."""
    batch, tokens, width = hidden.shape
    vocabulary = table.shape[0]
    narrow = jnp.pad(table.astype(hidden.dtype), ((0, -vocabulary % VOCABULARY_MULTIPLE), (0, 0)))
    in_vocabulary = jnp.arange(narrow.shape[0]) < vocabulary
    count = num_blocks(tokens, math.ceil(batch * tokens * narrow.shape[0] * 4 / LOGITS_BYTES))
    block = math.ceil(tokens / count)

    def split(x: Array) -> Array:
        """[B, T, ...] to [blocks, B, block, ...]; the padding's mask is 0."""
        x = jnp.pad(x, ((0, 0), (0, count * block - tokens), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, count, block, *x.shape[2:]).swapaxes(0, 1)

    def one(carry: tuple[LossSums, Array | None], inputs: tuple[Array, Array, Array]):
        total, dtable = carry
        hidden, targets, mask = inputs
        # The barrier keeps XLA from making the mask a kernel of its own, which reads and writes all logits once more.
        logits = jax.lax.optimization_barrier(contract("btd,vd->btv", hidden, narrow, jnp.float32))
        logits = jnp.where(in_vocabulary, logits, -jnp.inf)
        sums, log_z, safe_targets = _sums(logits, targets, mask)
        total = jax.tree.map(jnp.add, total, sums)
        if not gradients:
            return (total, dtable), None
        # d objective / d logits = mask (p (1 + 2 z_loss log Z) - [target])
        p = jnp.exp(logits - log_z[..., None])
        is_target = jnp.arange(logits.shape[-1]) == safe_targets[..., None]
        dlogits = mask[..., None] * (p * (1.0 + 2.0 * z_loss * log_z[..., None]) - is_target)
        dlogits = dlogits.astype(hidden.dtype)
        dtable += contract("btv,btd->vd", dlogits, hidden, jnp.float32)
        return (total, dtable), contract("btv,vd->btd", dlogits, narrow)

    zero = LossSums(*(jnp.zeros((), jnp.float32),) * 3)
    carry = zero, jnp.zeros(narrow.shape, jnp.float32) if gradients else None
    if count == 1:
        (total, dtable), dhidden = one(carry, (hidden, targets, target_mask))
    else:
        (total, dtable), dhidden = jax.lax.scan(one, carry, (split(hidden), split(targets), split(target_mask)))
        if gradients:
            dhidden = dhidden.swapaxes(0, 1).reshape(batch, count * block, width)[:, :tokens]
    return total, (dhidden, dtable[:vocabulary]) if gradients else None
