"""`moda_sequence_dkv`: the key and value gradients of sequence attention, for Hopper (host side: backward.py).

Equation: P_tu = exp(scale * <query_t, key_u> - lse_t);  dS_tu = P_tu * (<dout_t, value_u> - delta_t)
    dvalue_u = sum_{g,t} P_tu dout_t;  dkey_u = scale * sum_{g,t} dS_tu query_t     (g over the G heads of the KV head)

Grid: (B, key blocks, K), or (B, K, key blocks) where the queries of all KV heads would not fit into L2; heavy (early)
    key blocks first.
Blocks: key, value, dkey, dvalue [64 rows per consumer warpgroup, H]; query, dout [block, H]; (lse, delta) [2, block].
Loop: the producer warpgroup streams the query blocks of the G heads, one head after the other. A consumer works
    transposed (S^T = K Q^T), so that P^T and dS^T are register operands of the second products, and issues S^T and dP^T
    of a step together with the second products of the step before. Blocks that do not see all keys
    (the diagonal, document borders) are masked.
Resident: K and V tiles (K in registers if `key_in_registers`); dkey and dvalue accumulators in registers, which also
    hold the sum over the G heads: no atomics, bit-equal from run to run.
Accumulators: float32; P and dS are rounded to the input dtype for the second products.
Above H=128 the accumulators do not fit into registers: the kernel runs once for every `GRADIENT_COLUMNS` of dkey and
    dvalue, and computes P and dS each time (12 T U N H B FLOPs at H=256).
FLOPs: 8 T U N H B (half if causal). Bytes: all inputs and dkey, dvalue once; Q and dout again from L2.
Bound on an H200 at H=64: tensor cores (exp2 takes half of their time). B=1, T=16384, K=8, G=8, causal: 7.7 to 8.3 ms,
    530 to 570 TFLOP/s: `wgmma` on 64 x 64 blocks reads SMEM at 80 of 128 bytes a clock, and two consumer warpgroups are
    all that the registers allow (three with 160 registers spill: 13.9 ms; three that finish each step first: 9.5 ms).
Benchmark: python -m benchmarks.attention, rows with S=0, column "forward+backward".

Interpreted on a CPU, P and dS go through SMEM (`p_stage`, `ds_stage`) and K is read from SMEM (`key_operand`): `wgmma`
with A in registers is not simulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import warpgroup as wg_lib
from pallas_kernels.mosaic_gpu.sequence.tiles import REGISTERS, BackwardVariant


def scratch_types(variant: BackwardVariant) -> dict[str, Any]:
    """Scratch shapes by name; None where a variant does not need it."""
    tiles, head_dim, dtype, spec = variant.tiles, variant.shape.head_dim, variant.shape.dtype, variant.shape.mask
    warpgroups, block, stages = tiles.warpgroups, tiles.block, tiles.stages
    tile, interpret = wg_lib.tiled_smem, variant.interpret
    box = functools.partial(tile, boxed=variant.boxed)
    own = warpgroups * min(tiles.images, 2)
    return dict(
        key_smem=box((own, 64, head_dim), dtype),
        value_smem=box((own, 64, head_dim), dtype),
        query_smem=box((stages, block, head_dim), dtype),
        dout_smem=box((stages, block, head_dim), dtype),
        statistics_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
        key_rows_smem=plgpu.SMEM((warpgroups, spec.channels, 64), jnp.int32) if spec.explicit else None,
        query_rows_smem=plgpu.SMEM((stages, spec.channels, block), jnp.int32) if spec.explicit else None,
        kept_smem=plgpu.SMEM((warpgroups, 128), jnp.int32) if head_dim == 64 else None,
        p_stage=tile((warpgroups, 64, block), dtype) if interpret else None,
        ds_stage=tile((warpgroups, 64, block), dtype) if interpret else None,
        own_ready=plgpu.Barrier(num_arrivals=3 if spec.explicit else 2, num_barriers=own),
        ready=plgpu.Barrier(num_arrivals=4 if spec.explicit else 3, num_barriers=stages),
        consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


def make_body(variant: BackwardVariant):
    """The kernel body: operands, outputs, scratch."""
    sizes, tiles, scale, interpret = variant.shape, variant.tiles, variant.scale, variant.interpret
    spec, dtype, group = sizes.mask, sizes.dtype, sizes.group
    query_tokens, key_tokens = sizes.query_tokens, sizes.key_tokens
    warpgroups, block, stages = tiles.warpgroups, tiles.block, tiles.stages
    query_blocks = pl.cdiv(query_tokens, block)
    scale2 = scale * wg_lib.LOG2E
    shape = (64, block)
    masked_start = spec.causal or spec.explicit

    def body(*refs, **scratch):
        fixed, limit_ref, (query_rows_ref, key_rows_ref, bounds_ref), (dk_ref, dv_ref) = wg_lib.split_backward_refs(
            refs, spec, 2
        )
        query_ref, key_ref, value_ref, dout_ref, statistics_ref = fixed
        s = wg_lib.named(scratch)
        images = wg_lib.Images(tiles.images, sizes.batch)
        batch, kv_head = images.first, lax.axis_index("kv_head")
        key_tile = lax.axis_index("key_block")
        warpgroup = lax.axis_index("warpgroup")
        key_start = key_tile * tiles.owned_block
        limit = limit_ref[batch] if spec.limit else jnp.int32(key_tokens)

        # Query blocks of the whole CTA, for each head: [first, last).
        if spec.explicit:
            first, last = bounds_ref[batch, key_tile, 0], bounds_ref[batch, key_tile, 1]
        else:
            first, last = jnp.int32(0), jnp.int32(query_blocks)
            if spec.causal:
                first = jnp.minimum(lax.div(key_start, jnp.int32(block)), last - 1)
            if spec.limit:  # nothing to do where no key is visible; one masked step keeps the pipeline regular
                last = jnp.where(key_start >= limit, first + 1, last)
        last = jnp.maximum(last, first + 1)
        steps = last - first
        total = steps * group  # of an image

        @pl.when(warpgroup == warpgroups)
        def _producer():
            plgpu.set_max_registers(REGISTERS[warpgroups][1], action="decrease")

            def fetch(step, wait):
                slot, image = lax.rem(step, jnp.int32(stages)), batch + images.of(step, total)
                step = images.within(step, total)
                head = kv_head * group + lax.div(step, steps)
                window = pl.ds((first + lax.rem(step, steps)) * block, block)
                if wait:
                    plgpu.barrier_wait(s.consumed.at[slot])
                ready = s.ready.at[slot]
                plgpu.copy_gmem_to_smem(query_ref.at[image, window, head], s.query_smem_box.at[slot], ready)
                plgpu.copy_gmem_to_smem(dout_ref.at[image, window, head], s.dout_smem_box.at[slot], ready)
                plgpu.copy_gmem_to_smem(statistics_ref.at[image, head, :, window], s.statistics_smem.at[slot], ready)
                if spec.explicit:
                    plgpu.copy_gmem_to_smem(query_rows_ref.at[image, :, window], s.query_rows_smem.at[slot], ready)

            waited = lambda slot: plgpu.barrier_wait(s.consumed.at[slot])  # noqa: E731
            wg_lib.produce(fetch, total * images.count, stages, waited)

        @pl.when(warpgroup < warpgroups)
        def _consumer():
            plgpu.set_max_registers(REGISTERS[warpgroups][0], action="increase")
            row_start = key_start + warpgroup * 64
            window = pl.ds(row_start, 64)
            p_stage = s.p_stage.at[warpgroup] if interpret else None
            ds_stage = s.ds_stage.at[warpgroup] if interpret else None

            def load(image):
                """What is the warpgroup's own of an image."""
                own = images.buffer(warpgroup, image)
                ready = s.own_ready.at[own]
                plgpu.copy_gmem_to_smem(key_ref.at[batch + image, window, kv_head], s.key_smem_box.at[own], ready)
                plgpu.copy_gmem_to_smem(value_ref.at[batch + image, window, kv_head], s.value_smem_box.at[own], ready)
                if spec.explicit:
                    plgpu.copy_gmem_to_smem(key_rows_ref.at[batch, :, window], s.key_rows_smem.at[warpgroup], ready)

            # Query blocks in [full_start, full_end) see all keys of this warpgroup.
            full_start, full_end = first, last
            if spec.explicit:
                full_start, full_end = bounds_ref[batch, key_tile, 2], bounds_ref[batch, key_tile, 3]
            if spec.causal and not spec.positions:
                full_start = jnp.maximum(full_start, pl.cdiv(row_start + 63, block))

            def compute(image):
                """An image's gradients."""
                own = images.buffer(warpgroup, image)
                key_smem, value_smem = s.key_smem.at[own], s.value_smem.at[own]

                def slot_of(step):
                    return lax.rem(image * total + step, jnp.int32(stages))

                plgpu.barrier_wait(s.own_ready.at[own])
                row_values = []
                if spec.explicit:
                    row_values = [
                        plgpu.load(s.key_rows_smem.at[warpgroup, c], layout=wg_lib.ROW) for c in range(spec.channels)
                    ]

                def hide(logits, slot, query_block):
                    """Keys are rows here. Keys past the limit are dropped at the end, rows past T by lse = +inf."""
                    conditions = []
                    column_values = [
                        plgpu.load(s.query_rows_smem.at[slot, c], layout=wg_lib.COLUMN) for c in range(spec.channels)
                    ]
                    channel = 0
                    if spec.positions:
                        conditions.append(wg_lib.rows(row_values[0], shape) <= wg_lib.columns(column_values[0], shape))
                        channel = 1
                    elif spec.causal:
                        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=wg_lib.TILE)
                        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=wg_lib.TILE)
                        conditions.append(row - column <= query_block * block - row_start)
                    if spec.segments:
                        conditions.append(
                            wg_lib.rows(row_values[channel], shape) == wg_lib.columns(column_values[channel], shape)
                        )
                    visible = conditions[0]
                    for condition in conditions[1:]:
                        visible &= condition
                    return jnp.where(visible, logits, wg_lib.HIDDEN)

                # K in registers takes a sixth off the SMEM reads of a step, 12 % off its time; V as well spills.
                in_registers = tiles.key_in_registers and not interpret
                key_operand = plgpu.load(key_smem, layout=wg_lib.TILE) if in_registers else key_smem

                def first_products(logits_acc, dp_acc, slot):
                    plgpu.wgmma(logits_acc, key_operand, s.query_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, value_smem, s.dout_smem.at[slot].T)

                def probability(logits_acc, slot, query_block, outstanding, masked):
                    """P^T in float32, once at most `outstanding` younger wgmma groups are in flight."""
                    lse = plgpu.load(s.statistics_smem.at[slot, 0], layout=wg_lib.COLUMN)
                    logits = wg_lib.load_after(logits_acc, outstanding)
                    if masked:
                        logits = hide(logits, slot, query_block)
                    return jnp.exp2(logits * scale2 - wg_lib.columns(lse, shape))

                def logits_gradient(dp_acc, p, slot, outstanding):
                    """dS^T in float32."""
                    delta = plgpu.load(s.statistics_smem.at[slot, 1], layout=wg_lib.COLUMN)
                    return p * (wg_lib.load_after(dp_acc, outstanding) - wg_lib.columns(delta, shape))

                consumer = _Consumer(
                    variant, warpgroup, s, first_products, probability, logits_gradient, p_stage, ds_stage, slot_of
                )
                blocks = wg_lib.BlockRange(first, full_start, full_end, last, masked_start, spec.explicit)
                dk, dv = _walk(consumer, blocks)

                dk = dk * scale
                if spec.limit:
                    row = plgpu.broadcasted_iota(jnp.int32, dk.shape, 0, layout=wg_lib.TILE)
                    seen = row < limit - row_start
                    dk, dv = jnp.where(seen, dk, 0.0), jnp.where(seen, dv, 0.0)
                if variant.columns is None:
                    key_smem[...] = dk.astype(dtype)
                    value_smem[...] = dv.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(s.key_smem_box.at[own], dk_ref.at[batch + image, window, kv_head])
                    plgpu.copy_smem_to_gmem(s.value_smem_box.at[own], dv_ref.at[batch + image, window, kv_head])
                else:
                    columns = pl.ds(variant.columns.start, len(variant.columns))
                    key_smem[:, columns] = dk.astype(dtype)
                    value_smem[:, columns] = dv.astype(dtype)
                    plgpu.commit_smem()
                    for start in range(0, 64, 8):  # TMA stores what lies together: of some columns 8 rows

                        @pl.when(row_start + start < key_tokens)
                        def _store(start=start):
                            to = pl.ds(row_start + start, 8)
                            for source, ref in ((key_smem, dk_ref), (value_smem, dv_ref)):
                                plgpu.copy_smem_to_gmem(
                                    source.at[pl.ds(start, 8), columns], ref.at[batch + image, to, kv_head]
                                )

            images.walk(load, compute)
            plgpu.wait_smem_to_gmem(0)

    return body


def _own_columns(variant: BackwardVariant, tile: Any) -> Any:
    """Of a tile [rows, H] the columns whose gradients the kernel makes."""
    columns = variant.columns
    return tile if columns is None else tile.at[:, pl.ds(columns.start, len(columns))]


class _Consumer(NamedTuple):
    """What a consumer warpgroup works with: its scratch, and what it does with a block of queries."""

    variant: BackwardVariant
    warpgroup: Any
    scratch: Any
    first_products: Callable[..., None]
    probability: Callable[..., Any]
    logits_gradient: Callable[..., Any]
    p_stage: Any
    ds_stage: Any
    slot_of: Callable[[Any], Any]


def _walk(consumer: _Consumer, blocks: wg_lib.BlockRange) -> tuple[Any, Any]:
    """(dK, dV): the second products of a step run together with the first products of the next one."""
    variant, warpgroup, s, first_products, probability, logits_gradient, p_stage, ds_stage, slot_of = consumer
    shape, dtype, interpret = (64, variant.tiles.block), variant.shape.dtype, variant.interpret
    columns = variant.shape.head_dim if variant.columns is None else len(variant.columns)
    zeros = wg_lib.full((64, columns), 0.0, wg_lib.TILE)
    first, last, group = blocks.first, blocks.end, variant.shape.group
    steps = last - first
    begin = slot_of(0)
    plgpu.barrier_wait(s.ready.at[begin])

    def prologue(logits_acc, dp_acc):
        first_products(logits_acc, dp_acc, begin)
        p = probability(logits_acc, begin, first, 1, blocks.masked_head)
        return p.astype(dtype), logits_gradient(dp_acc, p, begin, 0).astype(dtype)

    empty = plgpu.layout_cast(jnp.zeros(shape, dtype), wg_lib.TILE)
    _, (p, ds) = wg_lib.accumulate(prologue, [shape, shape], (empty, empty), interpret=interpret)

    def step_body(head_step, query_block, carry, masked):
        dk, dv, p, ds = carry
        step = head_step + query_block - first
        slot, previous = slot_of(step), slot_of(step - 1)
        plgpu.barrier_wait(s.ready.at[slot])

        def issue(dk_acc, dv_acc, logits_acc, dp_acc):
            first_products(logits_acc, dp_acc, slot)
            wg_lib.wgmma_registers(dv_acc, p, _own_columns(variant, s.dout_smem.at[previous]), p_stage)
            wg_lib.wgmma_registers(dk_acc, ds, _own_columns(variant, s.query_smem.at[previous]), ds_stage)
            new_p = probability(logits_acc, slot, query_block, 3, masked)
            new_ds = logits_gradient(dp_acc, new_p, slot, 2)
            if variant.shape.head_dim == 64:  # at 128 it costs 2 %, in dq too; here it gains 1 to 3 %
                wg_lib.keep_before(new_ds, s.kept_smem.at[warpgroup], interpret=interpret)
            plgpu.wgmma_wait(0)
            # The old P and dS are operands in registers until here; round the new ones only now.
            new_p, new_ds, _, _ = lax.optimization_barrier((new_p, new_ds, p, ds))
            plgpu.barrier_arrive(s.consumed.at[previous])
            return new_p.astype(dtype), new_ds.astype(dtype)

        (dk, dv, _, _), (p, ds) = wg_lib.accumulate(issue, [dk, dv, shape, shape], (p, ds), interpret=interpret)
        return dk, dv, p, ds

    def head_body(index, carry):
        start = first + jnp.where(index == 0, 1, 0)  # the prologue did the very first step
        return wg_lib.walk_blocks(blocks._replace(first=start), functools.partial(step_body, index * steps), carry)

    dk, dv, p, ds = lax.fori_loop(0, group, head_body, (zeros, zeros, p, ds))
    slot = slot_of(steps * group - 1)

    def finish(dk_acc, dv_acc):
        wg_lib.wgmma_registers(dv_acc, p, _own_columns(variant, s.dout_smem.at[slot]), p_stage)
        wg_lib.wgmma_registers(dk_acc, ds, _own_columns(variant, s.query_smem.at[slot]), ds_stage)
        return ()

    (dk, dv), _ = wg_lib.accumulate(finish, [dk, dv], interpret=interpret)
    plgpu.barrier_arrive(s.consumed.at[slot])
    return dk, dv
