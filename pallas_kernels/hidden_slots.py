"""What the sums over a token's slots of hidden states have in common: slots that are not filled, and the choice between
a kernel and XLA.

Memory is all that such a sum costs. XLA goes over all slots, filled or not, and more than once where a weight depends
on the slot itself; the kernels go over the filled ones, once forward and once backward.

Axes: B batch, T tokens, S slots, D columns.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import dispatch

IMPLEMENTATIONS = ("xla", "mosaic_gpu")

# Names of dimensions, for `pallas_kernels.partition`.
TOKENS = ("batch", "tokens")
STREAM = (*TOKENS, "slots", "columns")
WHOLE = frozenset({"slots", "columns", "sums"})


def filled(hidden: Array, length: Array | np.int32) -> Array:
    """hidden [B, T, S, D] as float32, zero in slots that are not filled, which may hold anything."""
    return jnp.where(is_filled(hidden.shape[2], length)[..., None], hidden, 0).astype(jnp.float32)


def is_filled(slots: int, length: Array | np.int32) -> Array:
    """[1, 1, S], beside [B, T, S]."""
    return (jnp.arange(slots, dtype=jnp.int32) < length)[None, None]


def added(buffer: Array, more: Array) -> Array:
    """`buffer` plus `more` float32, in the buffer's dtype."""
    return (buffer.astype(jnp.float32) + more).astype(buffer.dtype)


def chosen(implementation: str | None, hidden: Array) -> str:
    """The implementation that serves hidden states [B, T, S, D].

    Raises:
        ValueError: no such implementation.
        NotImplementedError: "mosaic_gpu" was asked for and does not take such a stream.
    """
    if implementation is None:
        return "mosaic_gpu" if "mosaic_gpu" in dispatch.preferred() and takes(hidden) else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")
    if implementation == "mosaic_gpu":
        _check(hidden)
    return implementation


def _check(hidden: Array) -> None:
    batch, tokens, _, columns = hidden.shape
    kernels("token_slots").check_supported(dtype=hidden.dtype, tokens=batch * tokens, columns=columns)


def takes(hidden: Array) -> bool:
    """Whether the kernels do, on a GPU that has them. A device's part may be of another number of tokens."""
    try:
        _check(hidden)
    except NotImplementedError as error:
        dispatch.logger.info("sums over slots: xla (%s)", error)
        return False
    return True


def kernels(name: str) -> ModuleType:
    """A module of `pallas_kernels.mosaic_gpu`, imported when it is wanted: not every installation of JAX can."""
    return importlib.import_module(f"pallas_kernels.mosaic_gpu.{name}")


def rows(array: Array) -> Array:
    """[B, T, ...] as [B T, ...]."""
    return array.reshape(-1, *array.shape[2:])
