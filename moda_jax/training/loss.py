"""The training objective: cross-entropy in nats per target, and the z-loss beside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.numerics.loss_chunks import (
    LOGITS_BYTES,
    VOCABULARY_MULTIPLE,
    LossSums,
    block_gradients,
    block_sums,
    in_one_pass_if_representable,
    no_sums,
    num_blocks,
)
from moda_jax.numerics.precision import contract

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
    flat = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
    return block_sums(flat, jnp.asarray(targets).reshape(-1), jnp.asarray(target_mask, jnp.float32).reshape(-1))


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
    sums = _blockwise_sums(hidden, table, targets, target_mask)
    return sums.loss + z_loss * sums.z_loss, sums


def _forward(z_loss: float, hidden: Array, table: Array, targets: Array, target_mask: Array) -> tuple[Any, Any]:
    sums, gradients = _sums_and_gradients(z_loss, hidden, table, targets, target_mask)
    return (sums.loss + z_loss * sums.z_loss, sums), gradients


def _backward(z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, Any]) -> tuple:
    dhidden, dtable = gradients
    scale = cotangents[0]
    return (dhidden * scale).astype(dhidden.dtype), dtable * scale, None, None


projected_loss_sums.defvjp(_forward, _backward)


def _blockwise_sums(hidden: Array, table: Array, targets: Array, target_mask: Array) -> LossSums:
    rows = _padded_rows(table, hidden.dtype)

    def one(total: LossSums, block: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, mask = block
        sums = loss_sums(_block_logits(hidden, rows, table.shape[0]), targets, mask)
        return jax.tree.map(jnp.add, total, sums), None

    return _over_blocks(one, no_sums(), (hidden, targets, target_mask), rows.shape[0])[0]


def _sums_and_gradients(
    z_loss: float, hidden: Array, table: Array, targets: Array, target_mask: Array
) -> tuple[LossSums, tuple[Array, Array]]:
    """The sums and the objective's gradients: dhidden [B, T, D], dtable [V, D] float32."""
    rows = _padded_rows(table, hidden.dtype)

    def compute(normalise_first: bool) -> tuple[tuple[LossSums, Array, Array], Array]:
        def one(carry: tuple[LossSums, Array, Array], block: tuple[Array, Array, Array]):
            total, dtable, representable = carry
            hidden, targets, mask = block
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = _block_logits(flat, rows, table.shape[0])
            sums, dlogits, weight, fits = block_gradients(
                z_loss, logits, targets.reshape(-1), mask.reshape(-1), hidden.dtype, normalise_first=normalise_first
            )
            dtable += contract("tv,td->vd", dlogits, (weight * flat).astype(hidden.dtype), jnp.float32)
            dhidden = weight * contract("tv,vd->td", dlogits, rows, jnp.float32)
            total = jax.tree.map(jnp.add, total, sums)
            return (total, dtable, representable & fits), dhidden.astype(hidden.dtype).reshape(hidden.shape)

        carry = no_sums(), jnp.zeros(rows.shape, jnp.float32), jnp.bool(True)
        inputs = hidden, targets, target_mask.astype(jnp.float32)
        (total, dtable, representable), dhidden = _over_blocks(one, carry, inputs, rows.shape[0])
        return (total, dhidden, dtable), representable

    total, dhidden, dtable = in_one_pass_if_representable(compute, hidden.dtype)
    return total, (dhidden, dtable[: table.shape[0]])


def _block_logits(hidden: Array, rows: Array, vocabulary: int) -> Array:
    """hidden [..., D] times rows [V padded, D]: [..., V padded] float32, -inf where there is no such token."""
    # The barrier keeps XLA from making the mask a kernel of its own, which reads and writes all logits once more.
    logits = jax.lax.optimization_barrier(contract("...d,vd->...v", hidden, rows, jnp.float32))
    return jnp.where(jnp.arange(rows.shape[0]) < vocabulary, logits, -jnp.inf)


def _padded_rows(table: Array, dtype: jnp.dtype) -> Array:
    """The table [V, D] in the compute dtype, V padded to a multiple of `VOCABULARY_MULTIPLE` with zeros."""
    return jnp.pad(table.astype(dtype), ((0, -table.shape[0] % VOCABULARY_MULTIPLE), (0, 0)))


def _over_blocks(one: Callable, carry: Any, inputs: tuple[Array, ...], vocabulary: int) -> tuple[Any, Any]:
    """`lax.scan` of `one` over blocks of tokens whose logits take at most `LOGITS_BYTES`.

    Args:
        one: (carry, block of the inputs [B, block, ...]) -> (carry, None or [B, block, ...]).
        carry: as for `lax.scan`.
        inputs: [B, T, ...] each; where a block is padded they are 0, the mask above all.
        vocabulary: columns of the logits.

    Returns:
        The last carry, and `one`'s second results as [B, T, ...] or None.
    """
    batch, tokens = inputs[0].shape[:2]
    count = num_blocks(tokens, math.ceil(batch * tokens * vocabulary * 4 / LOGITS_BYTES))
    if count == 1:
        return one(carry, inputs)
    block = math.ceil(tokens / count)

    def split(x: Array) -> Array:
        """[B, T, ...] to [blocks, B, block, ...]."""
        x = jnp.pad(x, ((0, 0), (0, count * block - tokens), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, count, block, *x.shape[2:]).swapaxes(0, 1)

    carry, out = jax.lax.scan(one, carry, tuple(split(x) for x in inputs))
    return carry, None if out is None else out.swapaxes(0, 1).reshape(batch, count * block, *out.shape[3:])[:, :tokens]
