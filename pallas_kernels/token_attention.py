"""Whether a decode step's attention of one row, from raw projections on, runs as Hopper's two kernels.

XLA's form of it is not here: it is made of the block's parts (`moda_jax.inference.packed`).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax.numpy as jnp

from pallas_kernels import dispatch

MOST_HEADS = 2  # query heads of a KV head for which a card has run the kernels' tests: more are for who asks for them


@functools.cache
def best(*, dtype: jnp.dtype, rows: int, num_heads: int, num_kv_heads: int, head_dim: int, capacity: int) -> str:
    """ "mosaic_gpu" where the kernels are the best for the default device and these shapes, else "xla".

    Args:
        dtype, rows, num_heads, num_kv_heads, head_dim, capacity: see `mosaic_gpu.token_attention.check_supported`.
    """

    def check() -> None:
        if num_heads > MOST_HEADS * num_kv_heads:
            raise NotImplementedError(
                f"token attention: num_heads={num_heads} of num_kv_heads={num_kv_heads}: no card has run more than "
                f"{MOST_HEADS} to one yet"
            )
        kernel().check_supported(
            dtype=dtype, rows=rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            capacity=capacity,
        )  # fmt: skip

    return dispatch.best_for_rows("attention of a decode step", check)


def kernel() -> ModuleType:
    """The kernels' module. Imported when it is wanted, as `dispatch` does: not every installation of JAX can."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.token_attention")
