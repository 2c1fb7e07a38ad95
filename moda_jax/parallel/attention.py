"""The attention op on the mesh: every device runs the kernel on its own rows, heads and tokens, under `shard_map`.

Depth KV never moves: it is split like the queries that read it. Rows and heads need no exchange. Over `context` each
device holds the queries of its tokens and gathers the layer's sequence K and V of all tokens; the backward gathers them
again and returns their gradients by a reduce-scatter.

Balanced order. A causal query sees what came before it, so equal runs of tokens are unequal work. The sequence is cut
into 2c pieces, c = mesh.context, and device i holds pieces i and 2c-1-i: together always 2c+1 pairs of pieces. Batches
are permuted to this order once, on the host (`balanced_order`); the op derives its tokens' places from the device's
index. Everything else in the model is per token and does not notice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.parallel.mesh import current_mesh, partition_spec
from pallas_kernels import block, validation
from pallas_kernels.operands import Call, Gradients, Mask, Upstream
from pallas_kernels.parts import Part, delta

Array = jax.Array
PyTree = Any

_QUERY = ("batch", "tokens", "heads", "head_dim")
_KEY = ("batch", "tokens", "kv_heads", "head_dim")
_DEPTH = ("batch", "tokens", "slots", "kv_heads", "head_dim")
_STATISTICS = ("batch", "tokens", "heads")
_TOKENS = ("batch", "tokens")

# Logical axes of what goes to the devices and comes back, by its place in `Call`, `Upstream`, `Part` and `Gradients`.
_AXES = {
    **dict.fromkeys(("query", "dout", "out", "rest"), _QUERY),
    **dict.fromkeys(("key", "value"), _KEY),
    **dict.fromkeys(("depth.key", "depth.value", "depth_key", "depth_value"), _DEPTH),
    **dict.fromkeys(("depth.start", "depth.length", "depth.deferred"), ()),
    **dict.fromkeys(("mask.query_segment_ids", "mask.key_segment_ids"), _TOKENS),
    **dict.fromkeys(("lse", "delta"), _STATISTICS),
}


def balanced_order(tokens: int, context: int) -> np.ndarray:
    """Places of the tokens as they lie on the devices, one device after the other: int [T].

    Args:
        tokens: T, a multiple of 2 x context where context > 1.
        context: devices along the context axis.
    """
    if context == 1:
        return np.arange(tokens)
    pieces = np.arange(tokens).reshape(2 * context, -1)
    return np.concatenate([np.concatenate([pieces[i], pieces[2 * context - 1 - i]]) for i in range(context)])


def causal_mask(segment_ids: Array | None = None) -> Mask:
    """Of a whole sequence; segment_ids: [B, T] int32 or None."""
    return Mask(True, query_segment_ids=segment_ids, key_segment_ids=segment_ids)


def attention_forward(call: Call, *, with_rest: bool = False, implementation: str | None = None) -> Part:
    """`pallas_kernels.block.forward` of a whole sequence, or of its depth part alone, on the current mesh.

    Args:
        call: causal, without positions or key length; tokens in balanced order under `context`.
        with_rest, implementation: as there.
    """
    options = {"with_rest": with_rest, "implementation": implementation}
    mesh = current_mesh()
    if mesh is None:
        return block.forward(call, **options)
    rest = call.query if with_rest and call.query.dtype != jnp.float32 else None
    run = functools.partial(_local_forward, mesh.shape["context"], options)
    return _on_devices(run, Part(call.query, call.query, rest), call)


def attention_backward(
    call: Call,
    upstream: Upstream,
    *,
    buffers: tuple[Array, Array] | None = None,
    implementation: str | None = None,
) -> Gradients:
    """`pallas_kernels.block.backward`, as `attention_forward`; the buffers are of the stream, and lie as it does."""
    mesh = current_mesh()
    if mesh is None:
        return block.backward(call, upstream, buffers=buffers, implementation=implementation)
    depth = (None, None) if call.depth is None else (call.depth.key, call.depth.value)
    sums = None if buffers is None else Gradients(None, depth_key=buffers[0], depth_value=buffers[1])
    run = functools.partial(_local_backward, mesh.shape["context"], implementation)
    query = call.query if call.query_gradient else None
    return _on_devices(run, Gradients(query, call.key, call.value, *depth), call, upstream, sums)


def attend(call: Call, *, implementation: str | None = None) -> Array:
    """The output [B, T, N, H] of a call that is the whole softmax, differentiable, on the current mesh.

    Raises:
        ValueError: operands that do not fit together, as `pallas_kernels.moda_attention` says.
    """
    call = validation.checked_attention(call)
    if current_mesh() is None:
        return block.attend(call, implementation=implementation).out
    return _attend(implementation, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(implementation: str | None, call: Call) -> Array:
    return attention_forward(call, implementation=implementation).out


def _attend_fwd(implementation: str | None, call: Call) -> tuple[Array, tuple[Call, Part]]:
    part = attention_forward(call, with_rest=True, implementation=implementation)
    return part.out, (call, part)


def _attend_bwd(implementation: str | None, residuals: tuple[Call, Part], dout: Array) -> tuple[Call]:
    call, part = residuals
    upstream = Upstream(dout, part.lse, delta(dout, part))
    return (block.as_cotangent(call, attention_backward(call, upstream, implementation=implementation)),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _specs(tree: PyTree) -> PyTree:
    """The PartitionSpecs of operands or results, in their form."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: partition_spec(*_AXES[jax.tree_util.keystr(path, simple=True, separator=".")]), tree
    )


def _on_devices(function: Callable[..., PyTree], results: PyTree, *operands: PyTree) -> PyTree:
    """`function` on every device's part of the operands; `results`: anything in the form of what it returns."""
    # Every float operand is split over every mesh axis, so there is nothing to check about replication.
    mapped = jax.shard_map(
        function, in_specs=tuple(_specs(x) for x in operands), out_specs=_specs(results), check_vma=False
    )
    return mapped(*operands)


def _local_forward(context: int, options: dict[str, Any], call: Call) -> Part:
    """The forward of this device's queries."""
    return block.forward(_gathered(call, context), **options)


def _local_backward(
    context: int, implementation: str | None, call: Call, upstream: Upstream, sums: Gradients | None
) -> Gradients:
    """The gradients of this device's operands."""
    buffers = None if sums is None else (sums.depth_key, sums.depth_value)
    gradients = block.backward(_gathered(call, context), upstream, buffers=buffers, implementation=implementation)
    if context == 1 or call.key is None:
        return gradients
    dkey, dvalue = (scatter_tokens(x, context) for x in (gradients.key, gradients.value))
    return gradients._replace(key=dkey, value=dvalue)


def _gathered(call: Call, context: int) -> Call:
    """This device's queries, and what they attend to in the order of the sequence."""
    if context > 1 and call.depth is not None and call.depth.chunk > 1:
        raise NotImplementedError(
            f"depth_chunk={call.depth.chunk} with mesh.context={context}: a chunk's tokens lie on different devices"
        )
    if context == 1 or call.key is None:
        return call
    ids = call.mask.query_segment_ids
    mask = Mask(
        call.mask.causal, _places(context, *call.query.shape[:2]), query_segment_ids=ids,
        key_segment_ids=None if ids is None else gather_tokens(ids, context),
    )  # fmt: skip
    key, value = (gather_tokens(x, context) for x in (call.key, call.value))
    return dataclasses.replace(call, key=key, value=value, mask=mask)


def _places(context: int, batch: int, tokens: int) -> Array:
    """[B, T / c] int32: the places in the sequence of this device's tokens."""
    piece = tokens // 2
    index, within = jax.lax.axis_index("context"), jnp.arange(piece, dtype=jnp.int32)
    early, late = index * piece + within, (2 * context - 1 - index) * piece + within
    return jnp.broadcast_to(jnp.concatenate([early, late]), (batch, tokens))


def gather_tokens(x: Array, context: int) -> Array:
    """[B, T / c, ...] of every device to [B, T, ...], in the order of the sequence."""
    parts = jax.lax.all_gather(x, "context")  # [c, B, T / c, ...]
    piece = x.shape[1] // 2
    ordered = jnp.concatenate([parts[:, :, :piece], parts[::-1, :, piece:]])  # [2c, B, T / 2c, ...]
    return jnp.moveaxis(ordered, 0, 1).reshape(x.shape[0], context * x.shape[1], *x.shape[2:])


def scatter_tokens(x: Array, context: int) -> Array:
    """The transpose of `gather_tokens`: [B, T, ...] on every device to the sums [B, T / c, ...]."""
    pieces = jnp.moveaxis(x.reshape(x.shape[0], 2 * context, -1, *x.shape[2:]), 1, 0)  # [2c, B, T / 2c, ...]
    parts = jnp.concatenate([pieces[:context], pieces[: context - 1 : -1]], axis=2)  # [c, B, T / c, ...]
    return jax.lax.psum_scatter(parts, "context")
