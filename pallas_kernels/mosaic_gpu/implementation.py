"""Hopper kernels in Pallas Mosaic GPU: the implementation "mosaic_gpu" of the internal block (`pallas_kernels.block`).

Two parts under one softmax, tuned apart: the sequence part is compute-bound (`sequence/`), the depth part
memory-bound (`depth/`).
    forward   depth first; the sequence kernel merges the depth part's (out, lse) in its epilogue.
    backward  both parts on the merged lse and delta; the depth kernel adds the sequence part's dquery to its own.
On a CPU the same kernels run under the Pallas GPU interpreter, with race detection: for tests of small shapes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import warpgroup
from pallas_kernels.mosaic_gpu.depth import entry_tiles, tiles
from pallas_kernels.mosaic_gpu.depth.backward import depth_backward
from pallas_kernels.mosaic_gpu.depth.forward import depth_forward
from pallas_kernels.mosaic_gpu.sequence.backward import sequence_backward
from pallas_kernels.mosaic_gpu.sequence.forward import sequence_forward
from pallas_kernels.mosaic_gpu.sequence.split import num_parts as num_parts
from pallas_kernels.mosaic_gpu.sequence.split import split_forward, splits
from pallas_kernels.mosaic_gpu.sequence.tiles import HEAD_DIMS
from pallas_kernels.operands import Call, Gradients, Upstream
from pallas_kernels.parts import Part

COMPUTE_CAPABILITY = "9.0"
DTYPES = ("bfloat16", "float16")
LARGEST_HEAD_DIM = HEAD_DIMS[-1]  # of the sequence kernels; others are padded
FLOAT8_HEAD_DIMS = (64, 128)  # with depth entries of 8 bits: whole column blocks
DEPTH_STEP = 8  # the depth kernels take every multiple of it as it lies: TMA wants rows of whole 16 bytes
MAX_SLOTS = 512
MOST_TOGETHER = 4  # calls whose gradients of old slots are added together: see `gradient_group`
FEWEST_SLOTS = 32  # for which that is done; for 16 to 31 it is predicted to gain, and was not timed


def check_supported(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a call; they take every mask."""
    batch, tokens, num_heads, head_dim = call.query.shape
    name = jnp.dtype(call.query.dtype).name
    if name not in DTYPES:
        raise NotImplementedError(f"mosaic_gpu: dtype={name}: the tensor cores' kernels take {' or '.join(DTYPES)}")
    if not 0 < head_dim <= LARGEST_HEAD_DIM or head_dim % 2:
        raise NotImplementedError(f"mosaic_gpu: head_dim={head_dim}: expected an even number up to {LARGEST_HEAD_DIM}")
    if call.slots > MAX_SLOTS:
        raise NotImplementedError(f"mosaic_gpu: {call.slots} depth slots: expected at most {MAX_SLOTS}")
    if call.depth is not None and call.depth.chunk > 1:
        raise NotImplementedError(f"mosaic_gpu: depth_chunk={call.depth.chunk}: the kernels read a token's own slots")
    if call.depth is not None and call.depth.key.dtype != call.query.dtype:
        entries = jnp.dtype(call.depth.key.dtype)
        if entries != entry_tiles.FLOAT8:
            expected = f"expected {name}, the query's, or {entry_tiles.FLOAT8}"
            raise NotImplementedError(f"mosaic_gpu: depth entries in {entries}: {expected}")
        if head_dim not in FLOAT8_HEAD_DIMS:
            raise NotImplementedError(
                f"mosaic_gpu: head_dim={head_dim} with depth entries in {entries}: expected one of {FLOAT8_HEAD_DIMS}"
            )
    if jax.default_backend() == "gpu":
        capability = str(jax.devices()[0].compute_capability)
        if capability != COMPUTE_CAPABILITY:
            raise NotImplementedError(
                f"mosaic_gpu: compute capability {capability}: the kernels are for {COMPUTE_CAPABILITY} (Hopper)"
            )
    if call.slots:
        heads = tiles.tile_heads(num_heads // call.num_kv_heads, tiles.most_heads(head_dim))
        narrow = call.depth.key.dtype != call.query.dtype
        shape = tiles.DepthShape(batch * tokens, call.slots, num_heads, call.num_kv_heads, head_dim, heads, narrow)
        tiles.forward_tiles(shape)
        tiles.forward_tiles(shape, windowed=True)
        tiles.backward_tiles(shape, tiles.SMALL_BUFFERS)
        if call.depth.deferred is not None:
            tiles.backward_tiles(shape, tiles.SMALL_BUFFERS, deferred=True)


def forward(call: Call, *, with_rest: bool = False, interpret: bool | None = None) -> Part:
    """See `pallas_kernels.dispatch`."""
    seen = call if call.sees_slots else dataclasses.replace(call, depth=None)
    return _forward(seen, with_rest=with_rest, interpret=interpret)


def backward(
    call: Call,
    upstream: Upstream,
    buffers: tuple[jax.Array, jax.Array] | None = None,
    *,
    interpret: bool | None = None,
) -> Gradients:
    """See `pallas_kernels.dispatch`."""
    if call.depth is None or call.sees_slots:
        return _backward(call, upstream, buffers, interpret=interpret)
    gradients = _backward(dataclasses.replace(call, depth=None), upstream, interpret=interpret)
    dtype = call.query.dtype
    zeros = (jnp.zeros_like(x, dtype) for x in (call.depth.key, call.depth.value))
    key, value = zeros if buffers is None else buffers
    return gradients._replace(depth_key=key, depth_value=value)


# Jitted, so that the layers of an unrolled model share what is traced and lowered: a kernel takes a second of it.
@functools.partial(jax.jit, static_argnames=("with_rest", "interpret"))
@in_default_modes
def _forward(call: Call, *, with_rest: bool, interpret: bool | None) -> Part:
    if call.depth is not None and call.query.shape[-1] % DEPTH_STEP:
        part = _forward(_whole_rows(call), with_rest=with_rest, interpret=interpret)
        return _cut(part, call.query.shape[-1])._replace(lse=part.lse)
    depth = None
    if call.depth is not None:
        depth = depth_forward(call, with_rest=with_rest, interpret=interpret)
    if call.key is None:
        return Part.of_nothing(call.query, with_rest=with_rest) if depth is None else depth
    other = None if depth is None else jax.tree.map(_pad_head, depth._replace(lse=None))._replace(lse=depth.lse)
    if splits(call):
        part = split_forward(_for_kernels(call), with_rest=with_rest, interpret=interpret)
    else:
        part = sequence_forward(_for_kernels(call), other, with_rest=with_rest, interpret=interpret)
    head_dim = call.query.shape[-1]
    rest = None if part.rest is None else part.rest[..., :head_dim]
    return Part(part.out[..., :head_dim], part.lse, rest)


@functools.partial(jax.jit, static_argnames=("interpret",))
@in_default_modes
def _backward(
    call: Call,
    upstream: Upstream,
    buffers: tuple[jax.Array, jax.Array] | None = None,
    *,
    interpret: bool | None,
) -> Gradients:
    if call.depth is not None and call.query.shape[-1] % DEPTH_STEP:
        wide_upstream = upstream._replace(dout=_whole_rows(upstream.dout))
        gradients = _backward(_whole_rows(call), wide_upstream, _whole_rows(buffers), interpret=interpret)
        return _cut(gradients, call.query.shape[-1])
    dquery = dkey = dvalue = None
    if call.key is not None:
        dquery, dkey, dvalue = _sequence_gradients(call, upstream, interpret)
    depth = None, None
    if call.depth is not None:
        dquery, *depth = depth_backward(call, upstream, buffers, dquery=dquery, interpret=interpret)
    if not call.query_gradient:
        return Gradients(None, dkey, dvalue, *depth)
    return Gradients(jnp.zeros_like(call.query) if dquery is None else dquery, dkey, dvalue, *depth)


def gradient_group(call: Call) -> int:
    """See `pallas_kernels.dispatch`: MOST_TOGETHER, if the heads of so many calls fit into one tile.

    With n seen slots, e new ones a call and M calls together, a call moves on average 2 n entries (K and V, for the
    query's gradient), 6 n / M (the pass over the old slots) and 2 (M - 1) e (the gradients of new slots, read and
    written), where it alone moves 6 n. Of 35 layers with two entries each that is 0.62 of the traffic for M = 4 and
    0.56 for M = 8; but 8 keeps twice as many queries and output gradients waiting, and at G = 2 its pass multiplies
    two blocks of 8 heads and not one. Of 12 layers with 22 slots and G = 1 it is 0.76, the queries and output gradients
    that are put side by side counted (M = 2: 0.92, 3: 0.80), of 8 layers 0.83; fewer than 16 slots were not considered.
    """
    heads = MOST_TOGETHER * (call.query.shape[2] // call.num_kv_heads)
    return MOST_TOGETHER if call.slots >= FEWEST_SLOTS and heads <= tiles.most_heads(call.query.shape[3]) else 1


def _sequence_gradients(
    call: Call, upstream: Upstream, interpret: bool | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, dkey, dvalue) of the sequence part."""
    query, scale = warpgroup.positive_scale(call.query, call.scale)
    positive = _for_kernels(dataclasses.replace(call, query=query, scale=scale))
    upstream = upstream._replace(dout=_pad_head(upstream.dout))
    gradients = sequence_backward(positive, upstream, interpret=interpret)
    dquery, dkey, dvalue = (x[..., : call.query.shape[-1]] for x in gradients)
    if call.scale <= 0:  # the kernel saw -query, or zeros
        dquery = -dquery if call.scale < 0 else jnp.zeros_like(dquery)
    return dquery, dkey, dvalue


def _for_kernels(call: Call) -> Call:
    """With a head_dim of the sequence kernels, and with finite keys and values: they multiply what is hidden by 0."""
    key, value = (_pad_head(call.mask.cleared(x)) for x in (call.key, call.value))
    return dataclasses.replace(call, query=_pad_head(call.query), key=key, value=value)


def _whole_rows[Tree](tree: Tree) -> Tree:
    """Of a call or of arrays [..., H]: with zeros up to the next head_dim that the depth kernels take.

    A copy of the depth arrays: where they are read again and again, as in a stack of layers, they had better be made
    with such a head_dim (and `scale` be given).
    """
    if isinstance(tree, Call):
        call, depth = tree, tree.depth
        query, key, value, slot_key, slot_value = _whole_rows(
            (call.query, call.key, call.value, depth.key, depth.value)
        )
        depth = dataclasses.replace(depth, key=slot_key, value=slot_value)
        return dataclasses.replace(call, query=query, key=key, value=value, depth=depth)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % DEPTH_STEP),)), tree)


def _cut[Tree](tree: Tree, head_dim: int) -> Tree:
    """Arrays [..., H] without what was added."""
    return jax.tree.map(lambda x: x[..., :head_dim], tree)


def _pad_head(x: jax.Array | None) -> jax.Array | None:
    """[..., H] with zeros up to the next head_dim of the sequence kernels."""
    if x is None or x.shape[-1] in HEAD_DIMS:
        return x
    missing = next(h for h in HEAD_DIMS if h > x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),))
