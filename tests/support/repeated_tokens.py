"""Many tokens for a kernel, few for the oracle: tokens beyond `DIFFERENT` are those before, again and again.

A kernel that takes each token by itself has to give every one of them what it gives the first. The period is a prime:
who takes a token for another one at a distance of blocks, warps or CTAs is seen.
"""

import jax.numpy as jnp
import numpy as np

DIFFERENT = 509


def repeated(array, tokens):
    """[n, ...] -> [tokens, ...]."""
    return array if len(array) == tokens else jnp.take(array, jnp.arange(tokens) % len(array), axis=0)


def first_of_each(array):
    """The first `DIFFERENT` tokens, of which all others have to be repetitions, bit by bit."""
    first = array[:DIFFERENT]
    same = (array == repeated(first, len(array))) | jnp.isnan(array)
    same &= jnp.isnan(array) == jnp.isnan(repeated(first, len(array)))
    wrong = np.flatnonzero(~np.asarray(same.reshape(len(array), -1).all(axis=1)))
    assert not len(wrong), f"token {wrong[0]} is not as token {wrong[0] % DIFFERENT}: {len(wrong)} such tokens"
    return first
