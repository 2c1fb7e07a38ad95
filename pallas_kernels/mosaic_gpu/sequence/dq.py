"""`moda_sequence_dq`: the query gradient of sequence attention, for Hopper (host side: backward.py).

Equation: dS_tu = exp(scale * <query_t, key_u> - lse_t) * (<dout_t, value_u> - delta_t)
    dquery_t = scale * sum_u dS_tu key_u

Grid: (B, query blocks, N); head fastest (K and V shared in L2), heavy (late) query blocks first.
Blocks: query, dout, dquery [64 rows per consumer warpgroup, H]; key and value [block, H].
Loop: the producer warpgroup streams K and V blocks in ascending order; a consumer issues S and dP of block j together
    with dS K of block j-1, so that exp2 and the dS arithmetic run under the tensor cores. Masked blocks come last.
Resident: query, dout, lse, delta tiles in SMEM and registers; dquery accumulator in registers.
Accumulators: float32; dS is rounded to the input dtype for its product.
FLOPs: 6 T U N H B (half if causal). Bytes: query, dout, dquery, key, value once, statistics; K and V again from L2.
Bound on an H200 at H=64: tensor cores; exp2 takes 2/3 of their time. B=1, T=16384, K=8, G=8, causal: 5.1 to 5.3 ms,
    630 TFLOP/s (two instead of three consumer warpgroups: 6.6 ms).
Benchmark: python -m benchmarks.attention, rows with S=0, column "forward+backward".

Interpreted on a CPU, dS goes through SMEM (`ds_stage`): `wgmma` with A in registers is not simulated.
"""

from __future__ import annotations

import functools
from typing import Any

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
        query_smem=box((own, 64, head_dim), dtype),
        dout_smem=box((own, 64, head_dim), dtype),
        statistics_smem=plgpu.SMEM((own, 2, 64), jnp.float32),
        key_smem=box((stages, block, head_dim), dtype),
        value_smem=box((stages, block, head_dim), dtype),
        query_rows_smem=plgpu.SMEM((warpgroups, spec.channels, 64), jnp.int32) if spec.explicit else None,
        key_rows_smem=plgpu.SMEM((stages, spec.channels, block), jnp.int32) if spec.explicit else None,
        ds_stage=tile((warpgroups, 64, block), dtype) if interpret else None,
        own_ready=plgpu.Barrier(num_arrivals=4 if spec.explicit else 3, num_barriers=own),
        ready=plgpu.Barrier(num_arrivals=3 if spec.explicit else 2, num_barriers=stages),
        consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


def make_body(variant: BackwardVariant):
    """The kernel body: operands, outputs, scratch."""
    sizes, tiles, scale, interpret = variant.shape, variant.tiles, variant.scale, variant.interpret
    spec, head_dim, dtype, group = sizes.mask, sizes.head_dim, sizes.dtype, sizes.group
    query_tokens, key_tokens = sizes.query_tokens, sizes.key_tokens
    warpgroups, block, stages = tiles.warpgroups, tiles.block, tiles.stages
    query_blocks = pl.cdiv(query_tokens, tiles.owned_block)
    scale2 = scale * wg_lib.LOG2E
    shape = (64, block)
    masked_end = spec.causal or spec.explicit or spec.limit or key_tokens % block != 0

    def body(*refs, **scratch):
        fixed, limit_ref, (query_rows_ref, key_rows_ref, bounds_ref), (dq_ref,) = wg_lib.split_backward_refs(
            refs, spec, 1
        )
        query_ref, key_ref, value_ref, dout_ref, statistics_ref = fixed
        s = wg_lib.named(scratch)
        images = wg_lib.Images(tiles.images, sizes.batch)
        batch, head = images.first, lax.axis_index("head")
        query_tile = query_blocks - 1 - lax.axis_index("query_block")
        warpgroup = lax.axis_index("warpgroup")
        query_start = query_tile * tiles.owned_block
        limit = limit_ref[batch] if spec.limit else jnp.int32(key_tokens)
        if spec.explicit:
            first, last = bounds_ref[batch, query_tile, 0], bounds_ref[batch, query_tile, 1]
        else:
            first, end = jnp.int32(0), limit
            if spec.causal:
                end = jnp.minimum(end, query_start + tiles.owned_block)
            last = pl.cdiv(end, block)
        last = jnp.maximum(last, first + 1)

        steps = last - first  # of an image
        total = steps * images.count

        @pl.when(warpgroup == warpgroups)
        def _producer():
            plgpu.set_max_registers(REGISTERS[warpgroups][1], action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            def fetch(step, wait):
                slot, image = lax.rem(step, jnp.int32(stages)), batch + images.of(step, steps)
                window = pl.ds((first + images.within(step, steps)) * block, block)
                if wait:
                    plgpu.barrier_wait(s.consumed.at[slot])
                ready = s.ready.at[slot]
                plgpu.copy_gmem_to_smem(key_ref.at[image, window, kv_head], s.key_smem_box.at[slot], ready)
                plgpu.copy_gmem_to_smem(value_ref.at[image, window, kv_head], s.value_smem_box.at[slot], ready)
                if spec.explicit:
                    plgpu.copy_gmem_to_smem(key_rows_ref.at[image, :, window], s.key_rows_smem.at[slot], ready)

            wg_lib.produce(fetch, total, stages, lambda slot: plgpu.barrier_wait(s.consumed.at[slot]))

        @pl.when(warpgroup < warpgroups)
        def _consumer():
            plgpu.set_max_registers(REGISTERS[warpgroups][0], action="increase")
            row_start = query_start + warpgroup * 64
            window = pl.ds(row_start, 64)
            ds_stage = s.ds_stage.at[warpgroup] if interpret else None

            def load(image):
                """What is the warpgroup's own of an image."""
                own = images.buffer(warpgroup, image)
                ready = s.own_ready.at[own]
                plgpu.copy_gmem_to_smem(query_ref.at[batch + image, window, head], s.query_smem_box.at[own], ready)
                plgpu.copy_gmem_to_smem(dout_ref.at[batch + image, window, head], s.dout_smem_box.at[own], ready)
                statistics = statistics_ref.at[batch + image, head, :, window]
                plgpu.copy_gmem_to_smem(statistics, s.statistics_smem.at[own], ready)
                if spec.explicit:
                    plgpu.copy_gmem_to_smem(query_rows_ref.at[batch, :, window], s.query_rows_smem.at[warpgroup], ready)

            # Key blocks of this warpgroup: [first, own_end), of which [full_start, full_end) need no mask.
            if spec.explicit:
                full_start, full_end, own_end = bounds_ref[batch, query_tile, 2], bounds_ref[batch, query_tile, 3], last
            else:
                full_start, full_end, own_end = first, lax.div(limit, jnp.int32(block)), pl.cdiv(limit, block)
            if spec.causal and not spec.positions:
                full_end = jnp.minimum(full_end, lax.div(row_start + 1, jnp.int32(block)))
                own_end = jnp.minimum(own_end, pl.cdiv(row_start + 64, block))
            own_end = jnp.minimum(jnp.maximum(own_end, first + 1), last)

            def compute(image):
                """An image's gradient."""
                own = images.buffer(warpgroup, image)
                query_smem, dout_smem = s.query_smem.at[own], s.dout_smem.at[own]
                statistics_smem = s.statistics_smem.at[own]

                def slot_of(step):
                    return lax.rem(image * steps + step - first, jnp.int32(stages))

                plgpu.barrier_wait(s.own_ready.at[own])
                lse = plgpu.load(statistics_smem.at[0], layout=wg_lib.ROW)
                delta = plgpu.load(statistics_smem.at[1], layout=wg_lib.ROW)
                row_values = []
                if spec.explicit:
                    row_values = [
                        plgpu.load(s.query_rows_smem.at[warpgroup, c], layout=wg_lib.ROW) for c in range(spec.channels)
                    ]

                def hide(logits, step):
                    column_values = [
                        plgpu.load(s.key_rows_smem.at[slot_of(step), c], layout=wg_lib.COLUMN)
                        for c in range(spec.channels)
                    ]
                    begin = step * block
                    return wg_lib.hide_unseen(
                        logits, spec, limit - begin, row_start - begin, row_values, column_values, interpret=interpret
                    )

                def first_products(logits_acc, dp_acc, slot):
                    plgpu.wgmma(logits_acc, query_smem, s.key_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, dout_smem, s.value_smem.at[slot].T)

                def gradient(logits_acc, dp_acc, step, later, masked):
                    """dS in float32; `later` wgmma groups were issued after the two first products."""
                    logits = wg_lib.load_after(logits_acc, later + 1)
                    if masked:
                        logits = hide(logits, step)
                    p = jnp.exp2(logits * scale2 - wg_lib.rows(lse, shape))
                    return p * (wg_lib.load_after(dp_acc, later) - wg_lib.rows(delta, shape))

                plgpu.barrier_wait(s.ready.at[slot_of(first)])

                def prologue(logits_acc, dp_acc):
                    first_products(logits_acc, dp_acc, slot_of(first))
                    return gradient(logits_acc, dp_acc, first, 0, masked_end).astype(dtype)

                ds = plgpu.layout_cast(jnp.zeros(shape, dtype), wg_lib.TILE)
                _, ds = wg_lib.accumulate(prologue, [shape, shape], ds, interpret=interpret)
                dq = wg_lib.full((64, head_dim), 0.0, wg_lib.TILE)

                def step_body(step, carry, masked):
                    dq, ds = carry
                    slot, previous = slot_of(step), slot_of(step - 1)
                    plgpu.barrier_wait(s.ready.at[slot])

                    def issue(dq_acc, logits_acc, dp_acc):
                        first_products(logits_acc, dp_acc, slot)
                        wg_lib.wgmma_registers(dq_acc, ds, s.key_smem.at[previous], ds_stage)
                        new_ds = gradient(logits_acc, dp_acc, step, 1, masked)
                        plgpu.wgmma_wait(0)
                        # The old dS is an operand in registers until here; round the new one only now.
                        new_ds, _ = lax.optimization_barrier((new_ds, ds))
                        plgpu.barrier_arrive(s.consumed.at[previous])
                        return new_ds.astype(dtype)

                    (dq, _, _), ds = wg_lib.accumulate(issue, [dq, shape, shape], ds, interpret=interpret)
                    return dq, ds

                blocks = wg_lib.BlockRange(first + 1, full_start, full_end, own_end, spec.explicit, masked_end)
                dq, ds = wg_lib.walk_blocks(blocks, step_body, (dq, ds))

                slot = slot_of(own_end - 1)

                def finish(dq_acc):
                    wg_lib.wgmma_registers(dq_acc, ds, s.key_smem.at[slot], ds_stage)
                    return ()

                (dq,), _ = wg_lib.accumulate(finish, [dq], interpret=interpret)
                plgpu.barrier_arrive(s.consumed.at[slot])

                @pl.loop(own_end, last)
                def _release(step):
                    """Blocks that only the other warpgroups need."""
                    if interpret or tiles.images > 1:  # the phases that the next image counts on
                        plgpu.barrier_wait(s.ready.at[slot_of(step)])
                    plgpu.barrier_arrive(s.consumed.at[slot_of(step)])

                query_smem[...] = (dq * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(s.query_smem_box.at[own], dq_ref.at[batch + image, window, head])

            images.walk(load, compute)
            plgpu.wait_smem_to_gmem(0)

    return body
