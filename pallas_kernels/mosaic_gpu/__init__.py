"""Hopper kernels in Pallas Mosaic GPU: the implementation "mosaic_gpu" of the internal block (`pallas_kernels.block`).

Two parts under one softmax, tuned apart: the sequence part is compute-bound (`sequence_forward`, `sequence_backward`),
the depth part memory-bound (`depth_forward`, `depth_backward`).
    forward   depth first; the sequence kernel merges the depth part's (out, lse) in its epilogue.
    backward  both parts on the merged lse and delta; the depth kernel adds the sequence part's dquery to its own.
On a CPU the same kernels run under the Pallas GPU interpreter, with race detection: for tests of small shapes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import depth_backward as _depth_backward
from pallas_kernels.mosaic_gpu import depth_forward as _depth_forward
from pallas_kernels.mosaic_gpu import depth_tiles, masks, sequence_backward, sequence_forward, warpgroup

__all__ = ["attention_backward", "attention_forward", "check_supported", "depth_backward", "depth_forward"]

COMPUTE_CAPABILITY = "9.0"
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)  # of the sequence kernels; others are padded
MAX_SLOTS = 512


def check_supported(
    *,
    dtype: Any,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    slots: int = 0,
    batch: int = 1,
    query_tokens: int = 1,
    **facts: object,
) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a call.

    Args:
        dtype, head_dim, num_heads, num_kv_heads, slots, batch, query_tokens: of the call.
        **facts: further facts of `dispatch.resolve`; every mask is supported.
    """
    del facts
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise NotImplementedError(f"mosaic_gpu: dtype={name}: the tensor cores' kernels take {' or '.join(DTYPES)}")
    if not 0 < head_dim <= HEAD_DIMS[-1] or head_dim % 8:
        raise NotImplementedError(f"mosaic_gpu: head_dim={head_dim}: expected a multiple of 8 up to {HEAD_DIMS[-1]}")
    if slots > MAX_SLOTS:
        raise NotImplementedError(f"mosaic_gpu: {slots} depth slots: expected at most {MAX_SLOTS}")
    if jax.default_backend() == "gpu":
        capability = str(jax.devices()[0].compute_capability)
        if capability != COMPUTE_CAPABILITY:
            raise NotImplementedError(
                f"mosaic_gpu: compute capability {capability}: the kernels are for {COMPUTE_CAPABILITY} (Hopper)"
            )
    if slots:
        heads = depth_tiles.tile_heads(num_heads // num_kv_heads)
        shape = depth_tiles.DepthShape(batch * query_tokens, slots, num_heads, num_kv_heads, head_dim, heads)
        depth_tiles.forward_tiles(shape)
        depth_tiles.backward_tiles(shape, dtype)


@warpgroup.in_default_modes
def attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    depth_key: jax.Array | None = None,
    depth_value: jax.Array | None = None,
    depth_length: int | jax.Array | None = None,
    *,
    scale: float,
    causal: bool,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_length: jax.Array | None = None,
    with_rest: bool = False,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(out [B, T, N, H], lse [B, T, N] float32, rest or None): see `pallas_kernels.block.attention_forward`."""
    other = (None, None, None)
    if _has_depth(depth_key, depth_length):
        other = depth_forward(
            query, depth_key, depth_value, depth_length, scale=scale, with_rest=with_rest, interpret=interpret
        )
    prepared = masks.prepare(
        query.shape[0], query.shape[1], key.shape[1], causal,
        query_positions, key_positions, query_segment_ids, key_segment_ids, key_length,
    )  # fmt: skip
    head_dim = query.shape[-1]
    query, key, value, other_out, other_rest = (_pad_head(x) for x in (query, key, value, other[0], other[2]))
    out, lse, rest = sequence_forward.sequence_forward(
        query, key, value, other_out, other[1], other_rest,
        scale=scale, masks=prepared, with_rest=with_rest, interpret=interpret,
    )  # fmt: skip
    rest = None if rest is None else rest[..., :head_dim]
    return out[..., :head_dim], lse, rest


@warpgroup.in_default_modes
def attention_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    depth_key: jax.Array | None,
    depth_value: jax.Array | None,
    depth_length: int | jax.Array | None,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    causal: bool,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_length: jax.Array | None = None,
    depth_key_gradient: jax.Array | None = None,
    depth_value_gradient: jax.Array | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """(dquery, dkey, dvalue, ddepth_key, ddepth_value): see `pallas_kernels.block.attention_backward`."""
    prepared = masks.prepare(
        query.shape[0], query.shape[1], key.shape[1], causal,
        query_positions, key_positions, query_segment_ids, key_segment_ids, key_length,
    )  # fmt: skip
    head_dim = query.shape[-1]
    positive_query, positive = warpgroup.positive_scale(query, scale)
    gradients = sequence_backward.sequence_backward(
        *(_pad_head(x) for x in (positive_query, key, value, dout)), lse, delta,
        scale=positive, masks=prepared, interpret=interpret,
    )  # fmt: skip
    dquery, dkey, dvalue = (x[..., :head_dim] for x in gradients)
    if scale <= 0:  # the kernel saw -query, or zeros
        dquery = -dquery if scale < 0 else jnp.zeros_like(dquery)
    if depth_key is None:
        return dquery, dkey, dvalue, None, None
    if not _has_depth(depth_key, depth_length):
        buffers = (depth_key_gradient, depth_value_gradient)
        return (dquery, dkey, dvalue, *(jnp.zeros_like(depth_key) if b is None else b for b in buffers))
    dquery, ddepth_key, ddepth_value = _depth_backward.depth_backward(
        query, depth_key, depth_value, depth_length, dout, lse, delta, scale=scale, dquery=dquery, interpret=interpret,
        depth_key_gradient=depth_key_gradient, depth_value_gradient=depth_value_gradient,
    )  # fmt: skip
    return dquery, dkey, dvalue, ddepth_key, ddepth_value


@warpgroup.in_default_modes
def depth_forward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    depth_length: int | jax.Array | None = None,
    *,
    scale: float,
    with_rest: bool = False,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(out, lse, rest or None) of the depth part alone: see `pallas_kernels.block.depth_forward`."""
    return _depth_forward.depth_forward(
        query, depth_key, depth_value, depth_length, scale=scale, with_rest=with_rest, interpret=interpret
    )


@warpgroup.in_default_modes
def depth_backward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    depth_length: int | jax.Array | None,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    depth_key_gradient: jax.Array | None = None,
    depth_value_gradient: jax.Array | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, ddepth_key, ddepth_value) of the depth part: see `pallas_kernels.block.depth_backward`."""
    return _depth_backward.depth_backward(
        query, depth_key, depth_value, depth_length, dout, lse, delta, scale=scale, interpret=interpret,
        depth_key_gradient=depth_key_gradient, depth_value_gradient=depth_value_gradient,
    )  # fmt: skip


def _has_depth(depth_key: jax.Array | None, depth_length: int | jax.Array | None) -> bool:
    """False where it is known before running that no slot is filled."""
    if depth_key is None or depth_key.shape[2] == 0:
        return False
    return not (isinstance(depth_length, int) and depth_length == 0)


def _pad_head(x: jax.Array | None) -> jax.Array | None:
    """[..., H] with zeros up to the next head_dim of the sequence kernels."""
    if x is None or x.shape[-1] in HEAD_DIMS:
        return x
    missing = next(h for h in HEAD_DIMS if h > x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),))
