"""Which implementation serves a call: the table of names, what each can do, and the choice for `None`.

An implementation is a module that provides `attention_forward`, `attention_backward`, `depth_forward` and
`depth_backward` as `pallas_kernels.block` describes them, and `check_supported(**facts)`, which raises
NotImplementedError with the reason if it cannot serve such a call. Its forwards return (out, lse, rest), rest None
unless they are called with `with_rest=True`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import jax

logger = logging.getLogger("pallas_kernels")

MODULES = {
    "reference": "pallas_kernels.reference",
    "xla": "pallas_kernels.xla",
    "mosaic_gpu": "pallas_kernels.mosaic_gpu",
    "triton": "pallas_kernels.triton",
}
IMPLEMENTATIONS = tuple(MODULES)
OPERATIONS = ("attention_forward", "attention_backward", "depth_forward", "depth_backward", "check_supported")

# Compute capabilities on which `None` picks "mosaic_gpu" if it supports the call: Hopper.
MOSAIC_GPU_DEFAULT_CAPABILITIES = frozenset({"9.0"})


def check_name(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or a name in the table."""
    if implementation is None:
        return
    if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected None or one of {IMPLEMENTATIONS}")


def load(name: str) -> ModuleType:
    """The module of a named implementation.

    Raises:
        NotImplementedError: it is not part of this installation, or not complete.
    """
    path = MODULES[name]
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # the module is there and something that it imports is not
            raise NotImplementedError(f"implementation={name!r} needs {error.name}, which is not installed") from error
        raise NotImplementedError(f"implementation={name!r} is not in this version of pallas_kernels yet") from error
    missing = [operation for operation in OPERATIONS if not hasattr(module, operation)]
    if missing:
        raise NotImplementedError(f"implementation={name!r} is not complete: it lacks {', '.join(missing)}")
    return module


def resolve(implementation: str | None, **facts: object) -> str:
    """The name of the implementation that serves a call of which `facts` are known.

    Args:
        implementation: a name, or None for the best one on this device.
        **facts: operation ("attention" or "depth"), dtype, batch, query_tokens, key_tokens, slots, num_heads,
            num_kv_heads, head_dim, causal, scale; segments, positions, key_length: whether such a mask is given.

    Raises:
        ValueError: no such name.
        NotImplementedError: the named implementation cannot serve the call; the message says what it lacks.
    """
    check_name(implementation)
    if implementation is not None:
        load(implementation).check_supported(**facts)
        return implementation
    platform, capability = _device()
    chosen, reason = "xla", f"platform {platform}"
    if prefers_mosaic_gpu():
        try:
            load("mosaic_gpu").check_supported(**facts)
            chosen, reason = "mosaic_gpu", f"compute capability {capability}"
        except NotImplementedError as error:
            reason = f"mosaic_gpu does not support the call: {error}"
    _log_choice(chosen, reason)
    return chosen


def prefers_mosaic_gpu() -> bool:
    """Whether the default device is one for which the kernels of `pallas_kernels.mosaic_gpu` are the best."""
    platform, capability = _device()
    return platform == "gpu" and capability in MOSAIC_GPU_DEFAULT_CAPABILITIES


@functools.cache
def _device() -> tuple[str, str | None]:
    """Platform and compute capability of the default device."""
    device = jax.devices()[0]
    return device.platform, str(getattr(device, "compute_capability", None))


@functools.cache
def _log_choice(chosen: str, reason: str) -> None:
    """Says once what None means here."""
    logger.info("attention implementation: %s (%s)", chosen, reason)
