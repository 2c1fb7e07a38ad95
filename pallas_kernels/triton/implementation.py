"""Triton kernels: the implementation "triton" of the internal block (`pallas_kernels.block`).

For NVIDIA GPUs from Ampere on (compute capability 8.0). Two parts under one softmax, tuned apart: the sequence part is
compute-bound (`sequence_forward`, `sequence_dq`, `sequence_dkv`), the depth part memory-bound (`depth_forward`,
`depth_backward`).
    forward   depth first; the sequence kernel merges the depth part's (out, lse) in its epilogue.
    backward  both parts on the merged lse and delta; the depth kernel adds its dquery to the sequence part's.
On a CPU the same kernels run under Triton's interpreter where the environment has TRITON_INTERPRET=1: for tests.
"""

from __future__ import annotations

from pallas_kernels.triton import versions

versions.check()  # before anything imports triton

# ruff: noqa: E402
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.modes import in_default_modes
from pallas_kernels.operands import Call, Gradients, Upstream
from pallas_kernels.parts import Part
from pallas_kernels.triton import batches, depth, sequence
from pallas_kernels.triton import call as calls

OLDEST_CAPABILITY = (8, 0)
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = range(16, 257, 2)
MAX_SLOTS = 512


def check_supported(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a call.

    They take every mask, every window of slots and any number of heads.
    """
    name, head_dim = jnp.dtype(call.query.dtype).name, call.query.shape[3]
    if name not in DTYPES:
        raise NotImplementedError(f"triton: dtype={name}: the tensor cores' kernels take {' or '.join(DTYPES)}")
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"triton: head_dim={head_dim}: expected an even number from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        )
    if call.slots > MAX_SLOTS:
        raise NotImplementedError(f"triton: {call.slots} depth slots: expected at most {MAX_SLOTS}")
    if call.depth is not None and call.depth.chunk > 1:
        raise NotImplementedError(f"triton: depth_chunk={call.depth.chunk}: the kernels read a token's own slots")
    if call.depth is not None and call.depth.deferred is not None:
        raise NotImplementedError("triton: depth.deferred: the kernels add the gradients of all seen slots")
    if call.depth is not None and call.depth.key.dtype != call.query.dtype:
        raise NotImplementedError(f"triton: depth entries in {call.depth.key.dtype}: expected the query's {name}")
    if not calls.can_run():
        raise NotImplementedError(
            f"triton: needs an NVIDIA GPU, and JAX runs on {jax.default_backend()} here; with TRITON_INTERPRET=1 in "
            "the environment the kernels are interpreted on a CPU"
        )
    if calls.capability() < OLDEST_CAPABILITY:
        capability, oldest = (".".join(map(str, x)) for x in (calls.capability(), OLDEST_CAPABILITY))
        raise NotImplementedError(f"triton: compute capability {capability}: expected at least {oldest} (Ampere)")


@in_default_modes
def forward(call: Call, *, with_rest: bool = False) -> Part:
    """See `pallas_kernels.dispatch`."""
    if call.key is None and not call.sees_slots:
        return Part.of_nothing(call.query, with_rest=with_rest)

    def run(call: Call, window: jax.Array | None) -> Part:
        slots = None if window is None else depth.forward(call, window, with_rest=with_rest)
        return slots if call.key is None else sequence.forward(call, slots, with_rest=with_rest)

    return batches.folding(run)(*_split(call))


@in_default_modes
def backward(call: Call, upstream: Upstream, buffers: tuple[jax.Array, jax.Array] | None = None) -> Gradients:
    """See `pallas_kernels.dispatch`."""

    def run(arrays: tuple[Call, Upstream, Any], window: jax.Array | None) -> Gradients:
        call, upstream, buffers = arrays
        dquery = dkey = dvalue = None
        if call.key is not None:
            dquery, dkey, dvalue = sequence.backward(call, upstream)
        gradients = (None, None)
        if window is not None:
            dquery, *gradients = depth.backward(call, window, upstream, dquery, buffers)
        elif call.depth is not None:
            slots = call.depth.key, call.depth.value
            gradients = tuple(map(jnp.zeros_like, slots)) if buffers is None else buffers
        return Gradients(jnp.zeros_like(call.query) if dquery is None else dquery, dkey, dvalue, *gradients)

    call, window = _split(call)
    gradients = batches.folding(run)((call, upstream, buffers), window)
    return gradients if call.query_gradient else gradients._replace(query=None)


def _split(call: Call) -> tuple[Call, jax.Array | None]:
    """The call without its window, all whose arrays have the batch as first axis; and the window, int32 [2], or None
    where it is known before running that no slot is seen."""
    if call.depth is None:
        return call, None
    window = None
    if call.sees_slots:
        start = 0 if call.depth.start is None else call.depth.start
        length = call.slots if call.depth.length is None else call.depth.length
        window = jnp.stack([jnp.asarray(start, jnp.int32), jnp.asarray(length, jnp.int32)])
    return dataclasses.replace(call, depth=dataclasses.replace(call.depth, start=None, length=None)), window
