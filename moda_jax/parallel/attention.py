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

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.parallel.mesh import current_mesh, partition_spec
from pallas_kernels import block, moda_attention

Array = jax.Array

_QUERY = ("batch", "tokens", "heads", "head_dim")
_KEY = ("batch", "tokens", "kv_heads", "head_dim")
_DEPTH = ("batch", "tokens", "slots", "kv_heads", "head_dim")
_STATISTICS = ("batch", "tokens", "heads")  # lse, delta
_TOKENS = ("batch", "tokens")


class Options(NamedTuple):
    """The op's static arguments; it is always causal.

    Attributes:
        scale, implementation: as in `pallas_kernels.block`.
        with_rest: the forward also returns what rounding took from out, for the backward's delta.
    """

    scale: float
    implementation: str | None
    with_rest: bool = False


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


def attention_forward(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None,
    depth_value: Array | None,
    depth_length: int | Array | None,
    segment_ids: Array | None,
    options: Options,
) -> tuple[Array, ...]:
    """(out, lse[, rest]) of causal attention over sequence and depth KV, as `pallas_kernels.block.attention_forward`.

    Args:
        query, key, value, depth_key, depth_value, depth_length: as there; tokens in balanced order under `context`.
        segment_ids: [B, T] int32 or None.
        options: the static arguments.
    """
    operands = (query, key, value, depth_key, depth_value, depth_length, segment_ids)
    if current_mesh() is None:
        return _local_forward(options, 1, *operands)
    specs = _specs((_QUERY, _KEY, _KEY, _DEPTH, _DEPTH, (), _TOKENS), operands)
    out_axes = (_QUERY, _STATISTICS)
    if options.with_rest:
        out_axes += (None if query.dtype == jnp.float32 else _QUERY,)
    return _on_devices(_local_forward, options, specs, _specs(out_axes), operands)


def attention_backward(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None,
    depth_value: Array | None,
    depth_length: int | Array | None,
    segment_ids: Array | None,
    dout: Array,
    lse: Array,
    delta: Array,
    depth_key_gradient: Array | None,
    depth_value_gradient: Array | None,
    options: Options,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """(dquery, dkey, dvalue, ddepth_key, ddepth_value), as `pallas_kernels.block.attention_backward`.

    Args:
        query ... segment_ids: as in `attention_forward`.
        dout, lse, delta, depth_key_gradient, depth_value_gradient: as in `pallas_kernels.block.attention_backward`.
        options: the static arguments.
    """
    operands = (
        query, key, value, depth_key, depth_value, depth_length, segment_ids, dout, lse, delta,
        depth_key_gradient, depth_value_gradient,
    )  # fmt: skip
    if current_mesh() is None:
        return _local_backward(options, 1, *operands)
    axes = (_QUERY, _KEY, _KEY, _DEPTH, _DEPTH, (), _TOKENS, _QUERY, _STATISTICS, _STATISTICS, _DEPTH, _DEPTH)
    depth = (None, None) if depth_key is None else (_DEPTH, _DEPTH)
    out_specs = _specs((_QUERY, _KEY, _KEY, *depth))
    return _on_devices(_local_backward, options, _specs(axes, operands), out_specs, operands)


def depth_forward(
    query: Array, depth_key: Array, depth_value: Array, depth_length: int | Array | None, options: Options
) -> tuple[Array, Array]:
    """(out, lse) of the depth part alone, as `pallas_kernels.block.depth_forward`; everything in it is per token."""

    def local(options: Options, context: int, *operands: Array) -> tuple[Array, Array]:
        return block.depth_forward(*operands, scale=options.scale, implementation=options.implementation)

    operands = (query, depth_key, depth_value, depth_length)
    if current_mesh() is None:
        return local(options, 1, *operands)
    specs = _specs((_QUERY, _DEPTH, _DEPTH, ()), operands)
    return _on_devices(local, options, specs, _specs((_QUERY, _STATISTICS)), operands)


def depth_backward(
    query: Array,
    depth_key: Array,
    depth_value: Array,
    depth_length: int | Array | None,
    dout: Array,
    lse: Array,
    delta: Array,
    depth_key_gradient: Array,
    depth_value_gradient: Array,
    options: Options,
) -> tuple[Array, Array, Array]:
    """(dquery, ddepth_key, ddepth_value), as `pallas_kernels.block.depth_backward`."""

    def local(options: Options, context: int, *operands: Array) -> tuple[Array, Array, Array]:
        *operands, key_gradient, value_gradient = operands
        return block.depth_backward(
            *operands, scale=options.scale, depth_key_gradient=key_gradient, depth_value_gradient=value_gradient,
            implementation=options.implementation,
        )  # fmt: skip

    operands = (
        query, depth_key, depth_value, depth_length, dout, lse, delta, depth_key_gradient, depth_value_gradient,
    )  # fmt: skip
    if current_mesh() is None:
        return local(options, 1, *operands)
    axes = (_QUERY, _DEPTH, _DEPTH, (), _QUERY, _STATISTICS, _STATISTICS, _DEPTH, _DEPTH)
    return _on_devices(local, options, _specs(axes, operands), _specs((_QUERY, _DEPTH, _DEPTH)), operands)


def attend(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array | None,
    depth_value: Array | None,
    depth_length: int | Array | None,
    *,
    segment_ids: Array | None,
    scale: float | None = None,
    implementation: str | None,
) -> Array:
    """`pallas_kernels.moda_attention`, differentiable, on the current mesh. Arguments and result as there."""
    if current_mesh() is None:
        return moda_attention(
            query, key, value, depth_key, depth_value,
            depth_length=depth_length, segment_ids=segment_ids, scale=scale, implementation=implementation,
        )  # fmt: skip
    length = None if depth_length is None else jnp.asarray(depth_length, jnp.int32)
    if depth_key is None or depth_key.shape[2] == 0:
        depth_key = depth_value = length = None
    options = Options(query.shape[-1] ** -0.5 if scale is None else scale, implementation)
    return _attend(options, query, key, value, depth_key, depth_value, length, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, *operands: Array | None) -> Array:
    return attention_forward(*operands, options)[0]


def _attend_fwd(options: Options, *operands: Array | None) -> tuple[Array, tuple]:
    out, lse, rest = attention_forward(*operands, options._replace(with_rest=True))
    return out, (operands, out, lse, rest)


def _attend_bwd(options: Options, residuals: tuple, dout: Array) -> tuple:
    operands, out, lse, rest = residuals
    wide = out.astype(jnp.float32) if rest is None else out.astype(jnp.float32) + rest.astype(jnp.float32)
    delta = jnp.sum(dout.astype(jnp.float32) * wide, axis=-1)  # [B, T, N]
    gradients = attention_backward(*operands, dout, lse, delta, None, None, options)
    return *gradients, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _specs(axes: tuple, operands: tuple | None = None) -> tuple:
    """PartitionSpecs by logical axes; None for an operand that is not there."""
    operands = axes if operands is None else operands
    return tuple(
        None if a is None or operand is None else partition_spec(*a) for a, operand in zip(axes, operands, strict=True)
    )


def _on_devices(function, options: Options, in_specs: tuple, out_specs: tuple, operands: tuple) -> tuple:
    """`function(options, context, *operands)` on every device's part of the operands."""
    context = current_mesh().shape["context"]
    # Every float operand is split over every mesh axis, so there is nothing to check about replication.
    mapped = jax.shard_map(
        functools.partial(function, options, context), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(*operands)


def _local_forward(options, context, query, key, value, depth_key, depth_value, depth_length, segment_ids):
    """The forward of this device's queries."""
    masks, key, value = _sequence(context, query, key, value, segment_ids)
    return block.attention_forward(
        query, key, value, depth_key, depth_value, depth_length, scale=options.scale, causal=True,
        with_rest=options.with_rest, implementation=options.implementation, **masks,
    )  # fmt: skip


def _local_backward(
    options, context, query, key, value, depth_key, depth_value, depth_length, segment_ids, dout, lse, delta,
    depth_key_gradient, depth_value_gradient,
):  # fmt: skip
    """The gradients of this device's operands."""
    masks, key, value = _sequence(context, query, key, value, segment_ids)
    dquery, dkey, dvalue, *depth = block.attention_backward(
        query, key, value, depth_key, depth_value, depth_length, dout, lse, delta,
        scale=options.scale, causal=True, implementation=options.implementation, **masks,
        depth_key_gradient=depth_key_gradient, depth_value_gradient=depth_value_gradient,
    )  # fmt: skip
    if context > 1:
        dkey, dvalue = scatter_tokens(dkey, context), scatter_tokens(dvalue, context)
    return dquery, dkey, dvalue, *depth


def _sequence(context, query, key, value, segment_ids):
    """(masks, key, value): what this device's queries attend to, in the order of the sequence."""
    if context == 1:
        return {"query_segment_ids": segment_ids, "key_segment_ids": segment_ids}, key, value
    masks = {"query_positions": _places(context, *query.shape[:2])}
    if segment_ids is not None:
        masks |= {"query_segment_ids": segment_ids, "key_segment_ids": gather_tokens(segment_ids, context)}
    return masks, gather_tokens(key, context), gather_tokens(value, context)


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
