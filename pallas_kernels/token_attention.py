"""Whether a decode step's attention, from raw projections on, runs as Hopper's kernels: of one row, or of many.

XLA's form of it is not here: it is made of the block's parts (`moda_jax.inference.packed`).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

# Rows for which a card has run the kernels' tests: more, which have a kernel of their own, are for who asks for them.
MOST_ROWS = 1
MOST_HEADS = 2  # query heads of a KV head for which a card has run the kernels' tests: more are for who asks for them


@functools.cache
def best(*, dtype: jnp.dtype, rows: int, num_heads: int, num_kv_heads: int, head_dim: int, capacity: int) -> str:
    """ "mosaic_gpu" where the kernels are known to be the best for the default device and these shapes, else "xla".

    Args:
        dtype, rows, num_heads, num_kv_heads, head_dim, capacity: see `mosaic_gpu.token_attention.check_supported`.
    """

    def check() -> None:
        if rows > MOST_ROWS:
            raise NotImplementedError(f"token attention: {rows} rows: no card has run more than {MOST_ROWS} yet")
        if num_heads > MOST_HEADS * num_kv_heads:
            raise NotImplementedError(
                f"token attention: num_heads={num_heads} of num_kv_heads={num_kv_heads}: no card has run more than "
                f"{MOST_HEADS} to one yet"
            )
        kernel(rows).check_supported(
            dtype=dtype, rows=rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            capacity=capacity,
        )  # fmt: skip

    return dispatch.best_for_rows("attention of a decode step", check)


def check_supported(*, rows: int, **shape: Any) -> None:
    """Raises NotImplementedError, with the reason, if the kernels take no such step on the default device; without a
    GPU they are interpreted.

    Args:
        rows, and the others: as of `best`.
    """
    if jax.default_backend() == "gpu" and "mosaic_gpu" not in dispatch.preferred():
        raise NotImplementedError("token attention: the kernels are for compute capability 9.0 (Hopper)")
    kernel(rows).check_supported(rows=rows, **shape)


def kernel(rows: int) -> ModuleType:
    """The module of the kernels for so many rows. Imported when it is wanted, as `dispatch` does: not every
    installation of JAX can."""
    return importlib.import_module(f"pallas_kernels.mosaic_gpu.{'token_attention' if rows == 1 else 'token_rows'}")
