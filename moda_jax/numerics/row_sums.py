"""Sums of rows that share an index, always in the same order: the gradient of a table look-up.

XLA adds such rows with atomics on a GPU: in another order, and so with other last bits, in every run. Here the rows are
sorted by index and summed in three steps: inside blocks, where a block's rows of one index are found by comparing the
indices and summed by a matrix product; over blocks, where an index runs through several; and one row per index is
written, so that nothing is added in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moda_jax.numerics.precision import dot_precision

Array = jax.Array

BLOCK = 128


def sum_rows(indices: Array, rows: Array, num_rows: int) -> Array:
    """out[v] = sum of rows[i] over the i with indices[i] == v.

    Args:
        indices: [M] int32; rows whose index is not in 0..num_rows-1 count for nothing.
        rows: [M, D], float.
        num_rows: V.

    Returns:
        [V, D] float32, accumulated in float32; the same bits in every run.
    """
    count, width = rows.shape
    blocks = -(-count // BLOCK)
    indices = jnp.where((indices >= 0) & (indices < num_rows), indices, num_rows).astype(jnp.int32)
    order = jnp.argsort(indices, stable=True)
    padding = blocks * BLOCK - count
    index = jnp.pad(indices[order], (0, padding), constant_values=num_rows).reshape(blocks, BLOCK)
    sorted_rows = jnp.pad(rows[order], ((0, padding), (0, 0))).reshape(blocks, BLOCK, width)

    same = (index[:, :, None] == index[:, None, :]).astype(rows.dtype)  # [blocks, BLOCK, BLOCK]
    inside = jnp.einsum(
        "mij,mjd->mid", same, sorted_rows, precision=dot_precision(rows.dtype), preferred_element_type=jnp.float32
    )

    head, tail = index[:, 0], index[:, -1]
    goes_on = jnp.pad(head[1:] == tail[:-1], (1, 0))  # a block's first index is the last one of the block before
    carried = _carried(inside[:, -1], goes_on, whole=head == tail)
    total = inside + jnp.where((goes_on[:, None] & (index == head[:, None]))[..., None], carried[:, None], 0)

    flat = index.reshape(-1)
    is_last = jnp.append(flat[1:] != flat[:-1], True) & (flat < num_rows)
    # Indices beyond the end are dropped; they differ from each other, because XLA is told that all do.
    target = jnp.where(is_last, flat, num_rows + jnp.arange(flat.size, dtype=jnp.int32))
    out = jnp.zeros((num_rows, width), jnp.float32)
    return out.at[target].set(total.reshape(-1, width), mode="drop", unique_indices=True)


def _carried(tail_sums: Array, goes_on: Array, whole: Array) -> Array:
    """What the blocks before a block hold of its first index, [blocks, D]; anything where that index begins in it.

    total_m = tail_sums_m + (total_{m-1} if the block is of one index, which goes on), by a scan whose tree is fixed.
    """

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] & right[0], right[1] + jnp.where(right[0], left[1], 0)

    _, totals = jax.lax.associative_scan(combine, ((goes_on & whole)[:, None], tail_sums))
    return jnp.pad(totals[:-1], ((1, 0), (0, 0)))
