"""JAX's tracing modes, in which kernels are indifferent to what a user has switched on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def in_default_modes[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function` traced in JAX's default modes: a kernel's indices and constants are of 32 bits whatever
    JAX_ENABLE_X64 says, and promotions of rank and dtype that a user may have forbidden are meant here."""

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return traced
