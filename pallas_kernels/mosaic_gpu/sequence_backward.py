"""Sequence attention, backward, for Hopper: two kernels, no atomics, bit-reproducible.

Equations, per batch row and query head n (KV head n // G), with lse and delta from outside (merged over all blocks):
    P_tu = exp(scale * <query_t, key_u> - lse_t);  dS_tu = P_tu * (<dout_t, value_u> - delta_t)
    dquery_t = scale * sum_u dS_tu key_u
    dvalue_u = sum_{g,t} P_tu dout_t;  dkey_u = scale * sum_{g,t} dS_tu query_t     (g over the G heads of the KV head)

Two kernels: sequence_dq.py owns query blocks and walks over keys, sequence_dkv.py owns key blocks and walks over the
queries of all G heads. Together 14 T U N H B FLOPs (half if causal); one fused kernel would need 10, but ordered or
atomic sums of dquery. This file prepares the operands, chooses the grids and launches both.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_masks import MaskRows, pad_rows
from pallas_kernels.mosaic_gpu import sequence_dkv, sequence_dq
from pallas_kernels.mosaic_gpu import tiles as tiles_lib
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib


def _statistics(lse: jax.Array, delta: jax.Array, multiple: int) -> jax.Array:
    """float32 [B, N, 2, padded T]: lse in base 2, and delta. lse = +inf (P = 0): padding, or nothing visible."""
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * wg_lib.LOG2E).swapaxes(1, 2)
    # The barrier keeps XLA from computing delta inside the concatenation below, as one serial sum per element.
    delta = jax.lax.optimization_barrier(delta).swapaxes(1, 2)
    padding = ((0, 0), (0, 0), (0, -lse.shape[-1] % multiple))
    return jnp.stack([jnp.pad(lse, padding, constant_values=jnp.inf), jnp.pad(delta, padding)], axis=2)


def sequence_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    masks: MaskRows,
    dq_tiles: tiles_lib.BackwardTiles | None = None,
    dkv_tiles: tiles_lib.BackwardTiles | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the sequence part, given the (merged) lse and delta.

    Args:
        query, dout: [B, T, N, H]; key, value: [B, U, K, H]; bfloat16 or float16, H 64 or 128.
        lse, delta: float32 [B, T, N]; lse natural log, -inf where a query saw nothing;
            delta = rowsum(dout * out) - dlse.
        scale, masks: as in the forward.
        dq_tiles, dkv_tiles: override `tiles.choose_tiles`.
        interpret: run on the CPU; None: where there is no GPU.

    Raises:
        ValueError: scale not above zero, or tiles that do not fit into shared memory.

    Returns:
        (dquery, dkey, dvalue) in the input dtype; bit-equal from run to run.
    """
    batch, query_tokens, heads, head_dim = query.shape
    key_tokens, kv_heads = key.shape[1:3]
    interpret = wg_lib.default_interpret() if interpret is None else interpret
    chosen = tiles_lib.choose_tiles(head_dim, interpret=interpret)
    dq_tiles, dkv_tiles = dq_tiles or chosen.dq, dkv_tiles or chosen.dkv
    if scale <= 0:
        raise ValueError(f"scale={scale}: expected above zero (negate the query outside)")
    dq_tiles.check(head_dim, query.dtype.itemsize, masks.spec.channels, "dq")
    dkv_tiles.check(head_dim, query.dtype.itemsize, masks.spec.channels, "dkv")
    query, key, value, dout = (wg_lib.pad_tokens(x) for x in (query, key, value, dout))
    statistics = _statistics(lse, delta, math.lcm(dq_tiles.owned_block, dkv_tiles.block))
    fixed = [query, key, value, dout, statistics]
    limit = [masks.limit] if masks.spec.limit else []

    def mask_operands(query_multiple, key_multiple, query_block, key_block, per):
        if not masks.spec.explicit:
            return []
        return [
            pad_rows(masks.query_rows, query_multiple),
            pad_rows(masks.key_rows, key_multiple),
            masks.block_bounds(query_block, key_block, per=per),
        ]

    common = dict(
        spec=masks.spec, scale=scale, query_tokens=query_tokens, key_tokens=key_tokens, group=heads // kv_heads,
        head_dim=head_dim, dtype=query.dtype, interpret=interpret,
    )  # fmt: skip

    def call(body, name, tiles, scratch, grid, out_type, operands):
        return plgpu.kernel(
            body,
            out_type=out_type,
            grid=tuple(size for _, size in grid),
            grid_names=tuple(axis for axis, _ in grid),
            num_threads=tiles.warpgroups + 1,
            thread_name="warpgroup",
            scratch_types={key: entry for key, entry in scratch.items() if entry is not None},
            compiler_params=wg_lib.compiler_params(),
            interpret=wg_lib.interpret_params(interpret),
            kernel_name=wg_lib.kernel_name(name, query_tokens, key_tokens, heads, kv_heads, head_dim, tiles),
        )(*operands)

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    dquery = call(
        sequence_dq.make_body(tiles=dq_tiles, **common),
        "moda_sequence_dq",
        dq_tiles,
        sequence_dq.scratch_types(dq_tiles, head_dim, query.dtype, masks.spec, interpret),
        [("batch", batch), ("query_block", pl.cdiv(query_tokens, dq_tiles.owned_block)), ("head", heads)],
        like(query),
        fixed + limit + mask_operands(
            dq_tiles.owned_block, dq_tiles.block, dq_tiles.owned_block, dq_tiles.block, "query"
        ),
    )  # fmt: skip
    key_blocks = ("key_block", pl.cdiv(key_tokens, dkv_tiles.owned_block))
    # Streaming one KV head's queries at a time keeps them in L2 when all heads together would not fit.
    inner_heads = 4 * query.dtype.itemsize // 2 * query_tokens * kv_heads * head_dim <= tiles_lib.L2_BYTES
    axes = [key_blocks, ("kv_head", kv_heads)] if inner_heads else [("kv_head", kv_heads), key_blocks]
    dkey, dvalue = call(
        sequence_dkv.make_body(tiles=dkv_tiles, **common),
        "moda_sequence_dkv",
        dkv_tiles,
        sequence_dkv.scratch_types(dkv_tiles, head_dim, query.dtype, masks.spec, interpret),
        [("batch", batch), *axes],
        (like(key), like(value)),
        fixed + limit + mask_operands(
            dkv_tiles.block, dkv_tiles.owned_block, dkv_tiles.block, dkv_tiles.owned_block, "key"
        ),
    )  # fmt: skip
    return dquery[:, :query_tokens], dkey[:, :key_tokens], dvalue[:, :key_tokens]
