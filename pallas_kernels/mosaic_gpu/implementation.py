"""Hopper kernels in Pallas Mosaic GPU: the implementation "mosaic_gpu" of the internal block (`pallas_kernels.block`).

Two parts under one softmax, tuned apart: the sequence part is compute-bound (`sequence_forward`, `sequence_backward`),
the depth part memory-bound (`depth_forward`, `depth_backward`).
    forward   depth first; the sequence kernel merges the depth part's (out, lse) in its epilogue.
    backward  both parts on the merged lse and delta; the depth kernel adds the sequence part's dquery to its own.
On a CPU the same kernels run under the Pallas GPU interpreter, with race detection: for tests of small shapes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_masks import MaskRows
from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import depth_tiles, sequence_backward, sequence_forward, warpgroup
from pallas_kernels.mosaic_gpu.depth_backward import depth_backward
from pallas_kernels.mosaic_gpu.depth_forward import depth_forward
from pallas_kernels.operands import Call, Gradients, Upstream
from pallas_kernels.parts import Part

COMPUTE_CAPABILITY = "9.0"
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)  # of the sequence kernels; others are padded
MAX_SLOTS = 512


def check_supported(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a call; they take every mask."""
    batch, tokens, num_heads, head_dim = call.query.shape
    name = jnp.dtype(call.query.dtype).name
    if name not in DTYPES:
        raise NotImplementedError(f"mosaic_gpu: dtype={name}: the tensor cores' kernels take {' or '.join(DTYPES)}")
    if not 0 < head_dim <= HEAD_DIMS[-1] or head_dim % 8:
        raise NotImplementedError(f"mosaic_gpu: head_dim={head_dim}: expected a multiple of 8 up to {HEAD_DIMS[-1]}")
    if call.slots > MAX_SLOTS:
        raise NotImplementedError(f"mosaic_gpu: {call.slots} depth slots: expected at most {MAX_SLOTS}")
    if call.depth is not None and call.depth.start is not None:
        raise NotImplementedError("mosaic_gpu: depth_start: expected None")
    if jax.default_backend() == "gpu":
        capability = str(jax.devices()[0].compute_capability)
        if capability != COMPUTE_CAPABILITY:
            raise NotImplementedError(
                f"mosaic_gpu: compute capability {capability}: the kernels are for {COMPUTE_CAPABILITY} (Hopper)"
            )
    if call.slots:
        heads = depth_tiles.tile_heads(num_heads // call.num_kv_heads)
        shape = depth_tiles.DepthShape(batch * tokens, call.slots, num_heads, call.num_kv_heads, head_dim, heads)
        depth_tiles.forward_tiles(shape)
        depth_tiles.backward_tiles(shape, call.query.dtype)


@in_default_modes
def forward(call: Call, *, with_rest: bool = False, interpret: bool | None = None) -> Part:
    """See `pallas_kernels.dispatch`."""
    depth = None
    if call.sees_slots:
        depth = depth_forward(
            call.query, call.depth.key, call.depth.value, call.depth.length,
            scale=call.scale, with_rest=with_rest, interpret=interpret,
        )  # fmt: skip
    if call.key is None:
        return Part.of_nothing(call.query, with_rest=with_rest) if depth is None else Part(*depth)
    other = (None, None, None) if depth is None else depth
    query, key, value, other_out, other_rest = (
        _pad_head(x) for x in (call.query, *_without_unfilled(call), other[0], other[2])
    )
    out, lse, rest = sequence_forward.sequence_forward(
        query, key, value, other_out, other[1], other_rest,
        scale=call.scale, masks=_rows(call), with_rest=with_rest, interpret=interpret,
    )  # fmt: skip
    head_dim = call.query.shape[-1]
    return Part(out[..., :head_dim], lse, None if rest is None else rest[..., :head_dim])


@in_default_modes
def backward(
    call: Call,
    upstream: Upstream,
    buffers: tuple[jax.Array, jax.Array] | None = None,
    *,
    interpret: bool | None = None,
) -> Gradients:
    """See `pallas_kernels.dispatch`."""
    dquery = dkey = dvalue = None
    if call.key is not None:
        dquery, dkey, dvalue = _sequence_gradients(call, upstream, interpret)
    if call.sees_slots:
        buffers = (None, None) if buffers is None else buffers
        dquery, *depth = depth_backward(
            call.query, call.depth.key, call.depth.value, call.depth.length, *upstream,
            scale=call.scale, dquery=dquery, interpret=interpret,
            depth_key_gradient=buffers[0], depth_value_gradient=buffers[1],
        )  # fmt: skip
    elif call.depth is not None:
        depth = (jnp.zeros_like(call.depth.key), jnp.zeros_like(call.depth.value)) if buffers is None else buffers
    else:
        depth = (None, None)
    return Gradients(jnp.zeros_like(call.query) if dquery is None else dquery, dkey, dvalue, *depth)


def _sequence_gradients(
    call: Call, upstream: Upstream, interpret: bool | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, dkey, dvalue) of the sequence part."""
    query, scale = warpgroup.positive_scale(call.query, call.scale)
    key, value = _without_unfilled(call)
    gradients = sequence_backward.sequence_backward(
        *(_pad_head(x) for x in (query, key, value, upstream.dout)), upstream.lse, upstream.delta,
        scale=scale, masks=_rows(call), interpret=interpret,
    )  # fmt: skip
    dquery, dkey, dvalue = (x[..., : call.query.shape[-1]] for x in gradients)
    if call.scale <= 0:  # the kernel saw -query, or zeros
        dquery = -dquery if call.scale < 0 else jnp.zeros_like(dquery)
    return dquery, dkey, dvalue


def _rows(call: Call) -> MaskRows:
    return MaskRows.of(call.mask, *call.query.shape[:2], call.key.shape[1])


def _without_unfilled(call: Call) -> tuple[jax.Array, jax.Array]:
    """Key and value, finite: the kernels multiply what is hidden by 0."""
    return call.mask.cleared(call.key), call.mask.cleared(call.value)


def _pad_head(x: jax.Array | None) -> jax.Array | None:
    """[..., H] with zeros up to the next head_dim of the sequence kernels."""
    if x is None or x.shape[-1] in HEAD_DIMS:
        return x
    missing = next(h for h in HEAD_DIMS if h > x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),))
