"""Arrays under `jax.shard_map`: which manual mesh axes a value varies over."""

from __future__ import annotations

import jax

Array = jax.Array


def varying_like(a: Array, x: Array) -> Array:
    """`a`, varying over the manual axes that `x` varies over, so that its gradient is summed over them.

    JAX does so by itself where both meet in one of its own operations, but not for the arguments of a function with a
    backward of its own. Outside of `jax.shard_map` `a` comes back as it is.
    """
    missing = _varying(x) - _varying(a)
    return jax.lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a


def _varying(x: Array) -> frozenset[str]:
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # an older JAX's name
