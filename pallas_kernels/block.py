"""The internal block beneath the public op: forward and backward as separate pure functions, for one block of keys.

Distribution, decoding and the layer loop build on it: queries and keys may differ in length, positions and segment ids
are explicit, a row of keys may be filled only in part, and the backward takes lse and delta from outside, merged over
all the blocks that one softmax spans (`pallas_kernels.parts`). Each block then recomputes its own probabilities.

Nothing here is validated beyond what an implementation supports: callers pass what `pallas_kernels.validation` has
checked or what they built themselves.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax import Array

from pallas_kernels import dispatch, partitioned_block
from pallas_kernels.operands import Call, Gradients, Upstream
from pallas_kernels.parts import Part, delta


def forward(call: Call, *, with_rest: bool = False, implementation: str | None = None) -> Part:
    """Attention of the call's queries over all that it shows them.

    Args:
        call: the operands.
        with_rest: also keep what rounding took from out.
        implementation: a name, or None for the best on this device.

    Raises:
        ValueError: no implementation of that name.
        NotImplementedError: the named implementation cannot serve the call.
    """
    name = dispatch.resolve(implementation, call)
    if name in dispatch.OPAQUE:
        return partitioned_block.forward(dispatch.load(name), call, with_rest=with_rest)
    return dispatch.load(name).forward(call, with_rest=with_rest)


def backward(
    call: Call,
    upstream: Upstream,
    *,
    buffers: tuple[Array, Array] | None = None,
    implementation: str | None = None,
) -> Gradients:
    """Gradients of one block, given lse and delta of the whole softmax.

    Args:
        call, implementation: as in `forward`.
        upstream: gradient of the merged output, merged lse and delta.
        buffers: (key, value), [B, T, S, K, H] of any float dtype: the depth gradients are added to their seen slots, in
            place when the caller donates or carries them through a loop; the other slots are not touched.

    Raises:
        ValueError, NotImplementedError: as `forward`.
    """
    name = dispatch.resolve(implementation, call)
    if name in dispatch.OPAQUE:
        return partitioned_block.backward(dispatch.load(name), call, upstream, buffers)
    return dispatch.load(name).backward(call, upstream, buffers)


def attend(call: Call, *, implementation: str | None = None) -> Part:
    """`forward` of a call that is the whole softmax, differentiable in its arrays through out and lse: once and in
    reverse mode ("reference": as often as wanted). Arguments and errors as there."""
    implementation = dispatch.resolve(implementation, call)
    function = _forward if implementation == "reference" else _attention
    return function(implementation, call)


def as_cotangent(call: Call, gradients: Gradients) -> Call:
    """What a `custom_vjp` whose argument is a call returns for it."""
    depth = call.depth
    if depth is not None:
        depth = dataclasses.replace(
            depth, key=gradients.depth_key, value=gradients.depth_value, start=None, length=None, deferred=None
        )
    return dataclasses.replace(
        call, query=gradients.query, key=gradients.key, value=gradients.value, mask=None, depth=depth
    )


# One compilation for all calls of a kind outside of jit; inside of one, just the operations themselves.
_compiled = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(_compiled, static_argnames="with_rest")
def _forward(implementation: str, call: Call, with_rest: bool = False) -> Part:
    return forward(call, with_rest=with_rest, implementation=implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(implementation: str, call: Call) -> Part:
    """The whole softmax's part, differentiable once and in reverse mode."""
    return _forward(implementation, call)._replace(rest=None)


def _attention_fwd(implementation: str, call: Call) -> tuple[Part, tuple[Call, Part]]:
    part = _forward(implementation, call, with_rest=True)
    return part._replace(rest=None), (call, part)


@_compiled
def _attention_bwd(implementation: str, residuals: tuple[Call, Part], gradient: Part) -> tuple[Call]:
    call, part = residuals
    upstream = Upstream(gradient.out, part.lse, delta(gradient.out, part, gradient.lse))
    gradients = backward(call, upstream, implementation=implementation)
    return (as_cotangent(call, gradients),)


_attention.defvjp(_attention_fwd, _attention_bwd)
