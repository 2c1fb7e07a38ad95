"""Which implementation serves a call: the table of names, what an implementation offers, and the choice for `None`.

An implementation is a module, named in `MODULES`, that offers three functions, and may offer two more:

    check_supported(call) -> None
        Raises NotImplementedError, with the reason, if it cannot serve such a `pallas_kernels.operands.Call`. The
        arrays of the call may be of any kind that has a shape and a dtype; nothing is computed.
    forward(call, *, with_rest=False) -> Part
        Attention over the call's keys, or over its slots, or over both under one softmax: `pallas_kernels.parts.Part`.
        out has the query's dtype; with `with_rest` also what rounding took from it, unless that dtype is float32.
    backward(call, upstream, buffers=None) -> Gradients
        `pallas_kernels.operands.Gradients` of the call's arrays, from the `Upstream` of the whole softmax, which may
        cover other keys too. `buffers` (key, value), [B, T, S, K, H] of any float dtype: the depth gradients are added
        to their seen slots, in place where the caller donates or carries them; other slots keep every bit. Slots that
        the call's depth part defers are such others; without `query_gradient` the query's gradient is None.
    gradient_group(call) -> int
        How many calls over the same slots, a layer's each, had better have the gradients of old slots added together,
        by one backward whose query heads are those of all of them; such calls defer them. Not offered: `backward` takes
        no call that defers.
    num_parts(rows, keys) -> int
        Into how many parts of equal length the keys had better be cut where few queries see many keys, in so many rows
        of one head, and the caller merges the parts. Not offered: one.

What a call may look like: T and U differ; any of the mask's arrays, in any combination; slots whose window [start,
length) is known only when it runs, and may be empty; slots of a chunk of tokens; no sequence part, or no depth part.
What is hidden (a key at or beyond key_length, unless the mask says `finite_beyond`; a slot outside of the window) may
hold NaN: it must not be multiplied by 0. A query that sees nothing: out 0, lse -inf, gradients 0, whatever delta is.

To add one: its module, a line in `MODULES`, and a line in `PREFERENCES`, if `None` is to pick it. The block ranges and
row-wise form of masks, for kernels, are in `pallas_kernels.block_masks`; the contract's tests (tests/pallas_kernels)
take its name.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import jax

from pallas_kernels.operands import Call

logger = logging.getLogger("pallas_kernels")

MODULES = {
    "reference": "pallas_kernels.reference",
    "xla": "pallas_kernels.xla.implementation",
    "mosaic_gpu": "pallas_kernels.mosaic_gpu.implementation",
    "triton": "pallas_kernels.triton.implementation",
}
IMPLEMENTATIONS = tuple(MODULES)
OPAQUE = ("mosaic_gpu", "triton")  # kernels, that XLA cannot partition by itself: `partitioned_block` does
OPERATIONS = ("check_supported", "forward", "backward")

# What `None` tries on a GPU, the best first: implementation, and the compute capabilities of the GPUs that it is for.
# "xla" serves every call that these do not take, and every other device.
PREFERENCES = (
    ("mosaic_gpu", ("9.0",)),  # Hopper
    ("triton", ("8.0", "8.6", "8.7", "8.9", "10.0", "10.3", "12.0", "12.1")),  # Ampere, Ada, Blackwell
)


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
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):  # something that it imports is missing
            raise NotImplementedError(f"implementation={name!r} needs {error.name}, which is not installed") from error
        raise NotImplementedError(f"implementation={name!r} is not in this version of pallas_kernels yet") from error
    missing = [operation for operation in OPERATIONS if not hasattr(module, operation)]
    if missing:
        raise NotImplementedError(f"implementation={name!r} is not complete: it lacks {', '.join(missing)}")
    return module


def resolve(implementation: str | None, call: Call) -> str:
    """The name of the implementation that serves a call.

    Args:
        implementation: a name, or None for the best one on this device.
        call: its shapes, dtypes and what its mask restricts are what counts.

    Raises:
        ValueError: no such name.
        NotImplementedError: the named implementation cannot serve the call; the message says what it lacks.
    """
    check_name(implementation)
    if implementation is not None:
        load(implementation).check_supported(call)
        return implementation
    platform, capability = _device()
    reason, level = f"platform {platform}", logging.INFO
    for name in preferred():
        try:
            module = load(name)
        except NotImplementedError as error:  # of a GPU that would be faster with it
            reason, level = str(error), logging.WARNING
            continue
        try:
            module.check_supported(call)
        except NotImplementedError as error:
            reason = f"{name} does not support the call: {error}"
        else:
            _log_choice(name, f"compute capability {capability}", logging.INFO)
            return name
    _log_choice("xla", reason, level)
    return "xla"


def best_for_rows(operation: str, check: Callable[[], None]) -> str:
    """The implementation of an operation over rows where none is named: Hopper's kernel, or XLA with the reason in the
    log.

    Args:
        operation: in words.
        check: raises NotImplementedError if the kernel does not take the rows.
    """
    if "mosaic_gpu" not in preferred():
        return "xla"
    try:
        check()
    except NotImplementedError as error:
        logger.info("%s: xla (%s)", operation, error)
        return "xla"
    return "mosaic_gpu"


def gradient_group(implementation: str | None, call: Call) -> int | None:
    """`gradient_group` of the implementation that serves a call, named or None as in `resolve`; None: it has none."""
    module = load(resolve(implementation, call))
    return module.gradient_group(call) if hasattr(module, "gradient_group") else None


def preferred() -> tuple[str, ...]:
    """The implementations that `None` tries on the default device before "xla", the best first."""
    platform, capability = _device()
    if platform != "gpu":
        return ()
    return tuple(name for name, capabilities in PREFERENCES if capability in capabilities)


@functools.cache
def _device() -> tuple[str, str | None]:
    """Platform and compute capability of the default device."""
    device = jax.devices()[0]
    return device.platform, str(getattr(device, "compute_capability", None))


@functools.cache
def _log_choice(chosen: str, reason: str, level: int) -> None:
    """Says once what None means here; a warning if something that can be installed would do better."""
    logger.log(level, "attention implementation: %s (%s)", chosen, reason)
