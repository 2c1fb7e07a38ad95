"""A float32 result in a narrow dtype, and what rounding takes from it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def rounded(wide: Array, dtype: jnp.dtype, *, with_rest: bool) -> tuple[Array, Array | None]:
    """A float32 array as (out, rest): the nearest array of `dtype`, and what is missing from it, also in `dtype`.

    rest is None without `with_rest`, and where `dtype` is float32.
    """
    if dtype == jnp.float32 or not with_rest:
        return wide.astype(dtype), None
    # XLA may drop a conversion to a narrower type and back, but not this.
    nearest = lax.reduce_precision(wide, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return nearest.astype(dtype), (wide - nearest).astype(dtype)
