"""Sequence attention, backward, for Hopper: two kernels, no atomics, bit-reproducible.

Equations, per batch row and query head n (KV head n // G), with lse and delta from outside (merged over all blocks):
    P_tu = exp(scale * <query_t, key_u> - lse_t);  dS_tu = P_tu * (<dout_t, value_u> - delta_t)
    dquery_t = scale * sum_u dS_tu key_u
    dvalue_u = sum_{g,t} P_tu dout_t;  dkey_u = scale * sum_{g,t} dS_tu query_t     (g over the G heads of the KV head)

Two kernels: dq.py owns query blocks and walks over keys, dkv.py owns key blocks and walks over the
queries of all G heads. Together 14 T U N H B FLOPs (half if causal); one fused kernel would need 10, but ordered or
atomic sums of dquery. This file prepares the operands, chooses the grids and launches both.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_masks import MaskRows, pad_rows
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib
from pallas_kernels.mosaic_gpu.sequence import dkv, dq
from pallas_kernels.mosaic_gpu.sequence.tiles import (
    GRADIENT_COLUMNS,
    L2_BYTES,
    BackwardTiles,
    BackwardVariant,
    SequenceShape,
    backward_tiles,
    check_shared,
)
from pallas_kernels.operands import Call, Upstream


def _statistics(lse: jax.Array, delta: jax.Array, multiple: int) -> jax.Array:
    """float32 [B, N, 2, padded T]: lse in base 2, and delta. lse = +inf (P = 0): padding, or nothing visible."""
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * wg_lib.LOG2E).swapaxes(1, 2)
    # The barrier keeps XLA from computing delta inside the concatenation below, as one serial sum per element.
    delta = jax.lax.optimization_barrier(delta).swapaxes(1, 2)
    padding = ((0, 0), (0, 0), (0, -lse.shape[-1] % multiple))
    return jnp.stack([jnp.pad(lse, padding, constant_values=jnp.inf), jnp.pad(delta, padding)], axis=2)


def sequence_backward(
    call: Call,
    upstream: Upstream,
    *,
    dq_tiles: BackwardTiles | None = None,
    dkv_tiles: BackwardTiles | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the sequence part, given the (merged) lse and delta.

    Args:
        call: as in the forward, its scale above zero.
        upstream: see `pallas_kernels.operands.Upstream`.
        dq_tiles, dkv_tiles: override `tiles.backward_tiles`.
        interpret: run on the CPU; None: where there is no GPU.

    Raises:
        ValueError: scale not above zero, or tiles that do not fit into shared memory.

    Returns:
        (dquery, dkey, dvalue) in the input dtype; bit-equal from run to run.
    """
    if call.scale <= 0:
        raise ValueError(f"scale={call.scale}: expected above zero (negate the query outside)")
    interpret = wg_lib.default_interpret() if interpret is None else interpret
    shape = SequenceShape.of(call)
    rows = MaskRows.of(call.mask, shape.batch, shape.query_tokens, shape.key_tokens)
    chosen = backward_tiles(shape, interpret=interpret)
    dq_tiles, dkv_tiles = dq_tiles or chosen.dq, dkv_tiles or chosen.dkv
    operands = call.query, call.key, call.value, upstream.dout
    if interpret or not shape.takes_boxes:
        operands = tuple(map(wg_lib.pad_tokens, operands))
    query, key, value, dout = operands
    statistics = _statistics(upstream.lse, upstream.delta, math.lcm(dq_tiles.owned_block, dkv_tiles.block))
    fixed = [query, key, value, dout, statistics, *([rows.limit] if shape.mask.limit else [])]

    def run(kernel, name, tiles, grid, like, query_block, key_block, per, columns=None):
        """One of the two kernels; it owns blocks of the `per` side."""
        shape.check_images(f"sequence {name}", tiles.images)
        variant = BackwardVariant(shape, tiles, call.scale, interpret, columns)
        plain = dataclasses.replace(variant, interpret=False)
        check_shared(f"sequence {name}", variant, kernel.scratch_types(plain))
        operands = list(fixed)
        if shape.mask.explicit:
            operands += [
                pad_rows(rows.query_rows, query_block), pad_rows(rows.key_rows, key_block),
                rows.block_bounds(query_block, key_block, per=per),
            ]  # fmt: skip
        return plgpu.kernel(
            kernel.make_body(variant),
            out_type=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like),
            grid=tuple(size for _, size in grid),
            grid_names=tuple(axis for axis, _ in grid),
            num_threads=tiles.warpgroups + 1,
            thread_name="warpgroup",
            scratch_types={key: entry for key, entry in kernel.scratch_types(variant).items() if entry is not None},
            compiler_params=wg_lib.compiler_params(),
            interpret=wg_lib.interpret_params(interpret),
            kernel_name=shape.kernel_name(f"moda_sequence_{name}", tiles)
            + ("" if columns is None else f"_columns_{columns.start}"),
        )(*operands)

    query_blocks = pl.cdiv(shape.query_tokens, dq_tiles.owned_block)
    grid = [("batch", pl.cdiv(shape.batch, dq_tiles.images)), ("query_block", query_blocks), ("head", shape.num_heads)]
    dquery = run(dq, "dq", dq_tiles, grid, query, dq_tiles.owned_block, dq_tiles.block, "query")
    key_blocks, kv_heads = ("key_block", pl.cdiv(shape.key_tokens, dkv_tiles.owned_block)), shape.num_kv_heads
    # Streaming one KV head's queries at a time keeps them in L2 when all heads together would not fit.
    query_bytes = 4 * shape.dtype.itemsize // 2 * shape.query_tokens * kv_heads * shape.head_dim
    axes = [key_blocks, ("kv_head", kv_heads)]
    grid = [("batch", pl.cdiv(shape.batch, dkv_tiles.images)), *(axes if query_bytes <= L2_BYTES else axes[::-1])]
    run_dkv = functools.partial(run, dkv, "dkv", dkv_tiles, grid)
    blocks = dkv_tiles.block, dkv_tiles.owned_block, "key"
    if shape.head_dim <= GRADIENT_COLUMNS:
        dkey, dvalue = run_dkv((key, value), *blocks)
    else:
        parts = []
        for start in range(0, shape.head_dim, GRADIENT_COLUMNS):
            columns = range(start, start + GRADIENT_COLUMNS)
            like = jax.ShapeDtypeStruct((*key.shape[:3], len(columns)), key.dtype)
            parts.append(run_dkv((like, like), *blocks, columns))
        dkey, dvalue = (jnp.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return dquery[:, : shape.query_tokens], dkey[:, : shape.key_tokens], dvalue[:, : shape.key_tokens]
