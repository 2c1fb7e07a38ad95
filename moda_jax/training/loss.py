"""The training objective: cross-entropy in nats per target, and the z-loss beside it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class LossSums(NamedTuple):
    """Sums over the targets that count, float32 scalars. Sums, not means: they add up over micro-batches and processes.

    Attributes:
        loss: of -log p(target).
        z_loss: of log(Z)^2, Z the softmax's normaliser.
        num_targets: of the mask.
    """

    loss: Array
    z_loss: Array
    num_targets: Array


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
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
    # Whatever stands where the mask is 0 must stay inside the vocabulary: a gather outside of it gives NaN.
    safe_targets = jnp.where(target_mask > 0, targets, 0)
    target_logits = jnp.take_along_axis(logits, safe_targets[..., None], axis=-1)[..., 0]  # [B, T]
    mask = target_mask.astype(jnp.float32)
    return LossSums(
        loss=jnp.sum(mask * (log_z - target_logits)),
        z_loss=jnp.sum(mask * jnp.square(log_z)),
        num_targets=jnp.sum(mask),
    )
