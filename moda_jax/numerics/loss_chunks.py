"""A chunk of the loss over a large vocabulary: how many there are, and how one's sums and gradients are computed.

With p the softmax, d objective / d logits = mask ((1 + 2 z_loss log Z) p - [target]). To form p one has to read a
block's logits twice before, for their maximum and for Z. Here they are read once: the softmax's terms are taken
relative to the target's, e = exp(logit - target's logit), their sum z comes out beside them, and what z would divide is
divided in the tokens that e is multiplied with in the two matrix products that follow. e overflows where another token
is likelier than the target by many orders of magnitude; whether that happened is known when all is done, and then all
is done again with log Z taken first. On an H100, 32768 tokens x 100278: 36 ms with the matrix products, 45 with p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Largest chunk of float32 logits that is held at once, in bytes: large enough for full-speed matrix products and few
# passes over the table's gradient, small beside a GPU's memory.
LOGITS_BYTES = 2**31
# Terms relative to the target's are trusted up to this sum, a loss of 55 nats: neither they nor the quotient of a
# number near 1 by their sum leave the range of bfloat16 and float32, 2^-126 to 2^127.
LARGEST_RELATIVE_Z = 2.0**80


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


def num_chunks(tokens: int, least: int) -> int:
    """How many chunks a row of `tokens` is cut into: at least `least`, if there are so many tokens, and a number that
    divides them, if there is one below twice `least`; otherwise the last chunk is to be padded.

    Args:
        tokens: length of the row, >= 1.
        least: as many as keep a chunk's logits within `LOGITS_BYTES`, >= 1.
    """
    least = min(least, tokens)
    return next((count for count in range(least, min(2 * least, tokens + 1)) if tokens % count == 0), least)


def no_sums() -> LossSums:
    """Sums of nothing."""
    return LossSums(*(jnp.zeros((), jnp.float32),) * 3)


def in_one_pass_if_representable[R](compute: Callable[[bool], tuple[R, Array]], dtype: jnp.dtype) -> R:
    """`compute(normalise_first)`'s results: first without, and once more with it if they could not be represented.

    Args:
        compute: returns its results and whether they could be represented, a bool scalar.
        dtype: of the factors that `chunk_gradients` returns; one of small range is never tried without.
    """
    if jnp.finfo(dtype).maxexp < jnp.finfo(jnp.float32).maxexp:
        return compute(True)[0]
    results, representable = compute(False)
    return jax.lax.cond(representable, lambda: results, lambda: compute(True)[0])


def chunk_sums(
    logits: Array,
    target_columns: Array,
    mask: Array,
    *,
    total: Callable[[Array], Array] = lambda x: x,
    largest: Callable[[Array], Array] = lambda x: x,
) -> LossSums:
    """The sums of a chunk alone. Arguments as in `chunk_gradients`."""
    target_logits, _ = _target_logits(logits, target_columns, mask > 0, total)
    log_z = jnp.where(mask > 0, _log_z(logits, total, largest), 0.0)
    return LossSums(jnp.sum(mask * (log_z - target_logits)), jnp.sum(mask * jnp.square(log_z)), jnp.sum(mask))


def chunk_gradients(
    z_loss: float,
    logits: Array,
    target_columns: Array,
    mask: Array,
    dtype: jnp.dtype,
    *,
    normalise_first: bool,
    total: Callable[[Array], Array] = lambda x: x,
    largest: Callable[[Array], Array] = lambda x: x,
) -> tuple[LossSums, Array, Array, Array]:
    """The sums of a chunk, and d objective / d logits as two factors, of which the second is a number per token.

    Args:
        z_loss: weight of the z-loss in the objective.
        logits: [T, V] float32, columns of the vocabulary that stand here; -inf where there is no such token.
        target_columns: [T] int32, the target's column; outside of 0..V-1 if it stands elsewhere; anything where the
            mask is 0.
        mask: [T] float32.
        dtype: of the first factor.
        normalise_first: find log Z first, so that no term is larger than 1.
        total, largest: sum and maximum of a [T] over all places that hold columns of the vocabulary.

    Returns:
        The sums over all columns; the factors [T, V] in `dtype` and [T, 1] float32; whether they could be represented.
    """
    tokens, columns = logits.shape
    counts = mask > 0
    target_logits, here = _target_logits(logits, target_columns, counts, total)
    reference = _log_z(logits, total, largest) if normalise_first else target_logits
    reference = jnp.where(counts, reference, jnp.finfo(jnp.float32).max)  # where nothing counts, all terms are 0
    e = jnp.exp(logits - reference[:, None])
    z = jnp.where(counts, total(jnp.sum(e, axis=-1)), 1.0)
    log_z = jnp.where(counts, reference + jnp.log(z), 0.0)
    loss = jnp.where(counts, jnp.log(z) + (reference - target_logits), 0.0)  # exact where those are the same
    sums = LossSums(jnp.sum(mask * loss), jnp.sum(mask * jnp.square(log_z)), jnp.sum(mask))
    scale = 1.0 + 2.0 * z_loss * log_z
    # mask (scale e / z - [target]) = (mask scale / z) (e - [target] z / scale)
    of_target = jnp.exp(target_logits - reference) - z / scale
    place = e.astype(dtype).at[jnp.arange(tokens), jnp.where(here, target_columns, columns)]
    dlogits = place.set(of_target.astype(dtype), unique_indices=True, mode="drop")  # elsewhere: no such column
    return sums, dlogits, (mask * scale / z)[:, None], jnp.all(z < LARGEST_RELATIVE_Z)


def _target_logits(
    logits: Array, target_columns: Array, counts: Array, total: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The targets' logits [T], 0 where nothing counts, and whether a token's stands here."""
    here = counts & (target_columns >= 0) & (target_columns < logits.shape[-1])
    own = jnp.where(here, target_columns, 0)  # a gather outside of the columns gives NaN
    found = jnp.take_along_axis(logits, own[:, None], axis=-1)[:, 0]
    return total(jnp.where(here, found, 0.0)), here


def _log_z(logits: Array, total: Callable[[Array], Array], largest: Callable[[Array], Array]) -> Array:
    """[T], over all places."""
    peak = largest(jax.lax.stop_gradient(jnp.max(logits, axis=-1)))  # log Z does not depend on it
    return peak + jnp.log(total(jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1)))
