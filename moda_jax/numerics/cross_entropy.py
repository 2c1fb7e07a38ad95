"""The training objective: cross-entropy in nats per target over a large vocabulary, and the z-loss beside it.

One algorithm for one device and for many: where arrays are split, what it needs of the other devices is an `Exchange`.

Axes: B batch, T tokens, D model width, V vocabulary; on several devices those of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.numerics.loss_chunks import (
    LOGITS_BYTES,
    LossSums,
    chunk_gradients,
    chunk_sums,
    in_one_pass_if_representable,
    no_sums,
    num_chunks,
)
from moda_jax.numerics.precision import contract

Array = jax.Array


class Exchange:
    """What the loss asks of other devices. The base: there are none. Compared by type, so it must hold nothing."""

    def run(self, local: Callable, operands: tuple[Array, ...], *, gradients: bool) -> Any:
        """`local(*operands)` on every device's part of hidden, table, targets and mask.

        Args:
            local: returns `LossSums`, the same everywhere; with `gradients` a pair of them and of the gradients in
                hidden and table, laid out as those are.
            operands: hidden, table, targets, mask.
            gradients: see above.
        """
        del gradients
        return local(*operands)

    def rows(self, table: Array, dtype: jnp.dtype) -> Array:
        """The device's columns of the vocabulary: whole rows of the table, [V, D] in `dtype`."""
        return table.astype(dtype)

    def first_column(self, rows: Array) -> Array | int:
        """Which of the whole vocabulary's columns `rows` begin with."""
        del rows
        return 0

    def total(self, x: Array) -> Array:
        """The sum over all devices that share the vocabulary."""
        return x

    def largest(self, x: Array) -> Array:
        """The maximum over them."""
        return x

    def over_tokens(self, sums: Any) -> Any:
        """A pytree's sums over all devices that share the tokens."""
        return sums

    def everywhere(self, condition: Array) -> Array:
        """Whether a bool holds on all devices that share the tokens."""
        return condition

    def table_gradient(self, gradient: Array) -> Array:
        """The gradient [V, D] of `rows`, summed over all tokens, in the table's layout."""
        return gradient

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


ALONE = Exchange()


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
    return chunk_sums(flat, jnp.asarray(targets).reshape(-1), jnp.asarray(target_mask, jnp.float32).reshape(-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def projected_loss_sums(
    z_loss: float, vocab_size: int, exchange: Exchange, hidden: Array, table: Array, targets: Array, target_mask: Array
) -> tuple[Array, LossSums]:
    """`loss_sums` of logits = hidden table^T, which are never there all at once: 13 GB of them at 32768 x 100278.

    The tokens are taken in chunks of at most `LOGITS_BYTES` of float32 logits. Differentiated, a chunk's gradients are
    computed while its logits are there, so that nothing is computed twice: three matrix products in all, as with the
    logits kept. Where the vocabulary is split, two numbers per token cross devices: the target's logit and the sum of
    exponentials.

    Args:
        z_loss: weight of the z-loss in the objective.
        vocab_size: V; rows of the table behind it are padding.
        exchange: with the other devices; `ALONE` on one.
        hidden: [B, T, D] in the compute dtype.
        table: [V padded, D] float32; the products are in hidden's dtype, accumulated and returned in float32.
        targets, target_mask: [B, T], as in `loss_sums`.

    Returns:
        objective = sums.loss + z_loss * sums.z_loss, float32, and the sums. Differentiable through the objective alone,
        in hidden and table; the gradient through the sums is 0.
    """
    local = functools.partial(_local_loss, z_loss, vocab_size, exchange, False)
    sums = exchange.run(local, (hidden, table, targets, target_mask), gradients=False)
    return sums.loss + z_loss * sums.z_loss, sums


def _forward(z_loss: float, vocab_size: int, exchange: Exchange, *operands: Array) -> tuple[Any, Any]:
    local = functools.partial(_local_loss, z_loss, vocab_size, exchange, True)
    sums, gradients = exchange.run(local, operands, gradients=True)
    return (sums.loss + z_loss * sums.z_loss, sums), gradients


def _backward(
    z_loss: float, vocab_size: int, exchange: Exchange, gradients: tuple[Array, Array], cotangents: tuple[Array, Any]
) -> tuple:
    dhidden, dtable = gradients
    scale = cotangents[0]
    return (dhidden * scale).astype(dhidden.dtype), dtable * scale, None, None


projected_loss_sums.defvjp(_forward, _backward)


def _local_loss(
    z_loss: float, vocab_size: int, exchange: Exchange, gradients: bool, hidden: Array, table: Array, targets: Array,
    target_mask: Array,
) -> LossSums | tuple[LossSums, tuple[Array, Array]]:  # fmt: skip
    """The sums over all devices and, if asked for, this device's part of the objective's gradients."""
    rows = exchange.rows(table, hidden.dtype)
    first = exchange.first_column(rows)
    in_vocabulary = first + jnp.arange(rows.shape[0]) < vocab_size
    options = {"total": exchange.total, "largest": exchange.largest}
    inputs = hidden, targets - first, target_mask.astype(jnp.float32)

    def flat_logits(hidden: Array) -> tuple[Array, Array]:
        """[tokens, D] and their logits [tokens, V] float32, -inf where there is no such token."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        # The barrier keeps XLA from making the mask a kernel of its own, which reads and writes all logits once more.
        logits = jax.lax.optimization_barrier(contract("td,vd->tv", flat, rows, jnp.float32))
        return flat, jnp.where(in_vocabulary, logits, -jnp.inf)

    def sums_of(total: LossSums, chunk: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, mask = chunk
        sums = chunk_sums(flat_logits(hidden)[1], targets.reshape(-1), mask.reshape(-1), **options)
        return jax.tree.map(jnp.add, total, sums), None

    def compute(normalise_first: bool) -> tuple[tuple[LossSums, Array, Array], Array]:
        def one(carry: tuple[LossSums, Array, Array], chunk: tuple[Array, Array, Array]):
            total, dtable, representable = carry
            hidden, targets, mask = chunk
            flat, logits = flat_logits(hidden)
            sums, dlogits, weight, fits = chunk_gradients(
                z_loss, logits, targets.reshape(-1), mask.reshape(-1), hidden.dtype,
                normalise_first=normalise_first, **options,
            )  # fmt: skip
            dtable += contract("tv,td->vd", dlogits, (weight * flat).astype(hidden.dtype), jnp.float32)
            dhidden = weight * contract("tv,vd->td", dlogits, rows, jnp.float32)
            total = jax.tree.map(jnp.add, total, sums)
            return (total, dtable, representable & fits), dhidden.astype(hidden.dtype).reshape(hidden.shape)

        carry = no_sums(), jnp.zeros(rows.shape, jnp.float32), jnp.bool(True)
        (total, dtable, representable), dhidden = _over_chunks(one, carry, inputs, rows.shape[0])
        # All devices take the same way: there are collectives in it.
        return (total, dhidden, dtable), exchange.everywhere(representable)

    if not gradients:
        return exchange.over_tokens(_over_chunks(sums_of, no_sums(), inputs, rows.shape[0])[0])
    total, dhidden, dtable = in_one_pass_if_representable(compute, hidden.dtype)
    return exchange.over_tokens(total), (exchange.total(dhidden), exchange.table_gradient(dtable))


def _over_chunks(one: Callable, carry: Any, inputs: tuple[Array, ...], vocabulary: int) -> tuple[Any, Any]:
    """`lax.scan` of `one` over chunks of tokens whose logits take at most `LOGITS_BYTES`.

    Args:
        one: (carry, chunk of the inputs [B, chunk, ...]) -> (carry, None or [B, chunk, ...]).
        carry: as for `lax.scan`.
        inputs: [B, T, ...] each; where a chunk is padded they are 0, the mask above all.
        vocabulary: columns of the logits.

    Returns:
        The last carry, and `one`'s second results as [B, T, ...] or None.
    """
    batch, tokens = inputs[0].shape[:2]
    count = num_chunks(tokens, math.ceil(batch * tokens * vocabulary * 4 / LOGITS_BYTES))
    if count == 1:
        return one(carry, inputs)
    chunk = math.ceil(tokens / count)

    def split(x: Array) -> Array:
        """[B, T, ...] to [chunks, B, chunk, ...]."""
        x = jnp.pad(x, ((0, 0), (0, count * chunk - tokens), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    carry, out = jax.lax.scan(one, carry, tuple(split(x) for x in inputs))
    return carry, None if out is None else out.swapaxes(0, 1).reshape(batch, count * chunk, *out.shape[3:])[:, :tokens]
