"""Whose slots a query sees: its own token's, and those of the earlier tokens of its chunk (`depth_chunk`).

A row is cut into chunks of C tokens, counted from the first token of each document: what a document comes to does not
depend on where in a row it stands, nor on what is padded before it. A query at place p of its document sees the slots
of the tokens at places p - p % C to p.

Axes: B batch, T tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def reach(chunk: int, tokens: int, segment_ids: Array | None = None) -> Array:
    """How many tokens' slots each query sees: its own and those of so many tokens right before it.

    Args:
        chunk: C, at least 1.
        tokens: T.
        segment_ids: [B, T] int32; a document is a run of one id. None: a row is one document.

    Returns:
        [B, T] int32, or [1, T] without ids: 1 to C.
    """
    place = jnp.arange(tokens, dtype=jnp.int32)[None]
    if segment_ids is not None:
        begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        place = place - lax.cummax(jnp.where(begins, place, 0), axis=1)
    return place % chunk + 1
