"""How the loss over a large vocabulary is cut up: what the loss of one device (`moda_jax.training.loss`) and that of a
mesh (`moda_jax.parallel.vocabulary`) agree in. Imports neither."""

from __future__ import annotations

from typing import NamedTuple

import jax

Array = jax.Array

# Largest block of float32 logits that is held at once, in bytes: large enough for full-speed matrix products and few
# passes over the table's gradient, small beside a GPU's memory.
LOGITS_BYTES = 2**31
# The products run over a vocabulary padded to a multiple of this. At 100278 the rows are not aligned as the tensor
# cores' fast kernels want them: the three products were seen to take 70 ms on an H100 where 30 are expected.
VOCABULARY_MULTIPLE = 128


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


def num_blocks(tokens: int, least: int) -> int:
    """How many blocks a row of `tokens` is cut into: at least `least`, if there are so many tokens, and a number that
    divides them, if there is one below twice `least`; otherwise the last block is to be padded.

    Args:
        tokens: length of the row, >= 1.
        least: as many as keep a block's logits within `LOGITS_BYTES`, >= 1.
    """
    least = min(least, tokens)
    return next((count for count in range(least, min(2 * least, tokens + 1)) if tokens % count == 0), least)
