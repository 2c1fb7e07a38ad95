"""Sequence attention, forward, for Hopper.

Equation, per batch row b, query head n (KV head n // G), query t:
    s_u = scale * <query_t, key_u>,  u visible (pallas_kernels/block_masks.py)
    lse = log sum_u exp(s_u);  out = sum_u exp(s_u - lse) value_u
and, if `other_out`, `other_lse` are given (another block of the same softmax, such as the depth part):
    lse' = log(exp(lse) + exp(other_lse));  out' = exp(lse - lse') out + exp(other_lse - lse') other_out.
A query that sees nothing: out 0, lse -inf.
With `with_rest`, out also leaves what rounding took from it, as a second number of the input dtype; `other_rest` is
that of other_out.

Grid: (B, query blocks, N); head fastest, so that the CTAs of one KV head run side by side and share K and V in L2;
    query blocks in descending order, so that the longest causal rows start first.
Blocks: query and out [query_block, H], 64 rows per consumer warpgroup; key and value [key_block, H].
Loop: one producer warpgroup streams K and V through two rings of `stages` TMA blocks; each consumer warpgroup walks the
    key blocks in ascending order: blocks that all its rows see whole unmasked, the others (document borders, the
    diagonal, a ragged end) masked. A warpgroup issues
    Q K^T of block j and P V of block j-1 together and does the softmax of j while the latter runs.
Resident: query tile in SMEM; out accumulator, running maximum and sum in registers.
Accumulators: float32 (logits, out, maximum, sum); P is rounded to the input dtype for the second product.
FLOPs: 4 T U N H B (half if causal). Bytes: query + key + value + out + 4 T N B; each CTA re-reads K and V from L2.
Bound on an H200 at H=64: exp2 (16 a clock per SM) takes exactly as long as the two products (4096 FLOP a clock per SM),
    so the tensor cores cannot be full. B=1, T=16384, K=8, G=8, causal: 4.5 to 4.6 ms, 480 TFLOP/s, cuDNN 4.9 to 5.2 ms.
    Two warpgroups taking turns on the tensor cores (the usual schedule) measured 5.2 ms. H=128: tensor cores.
Benchmark: python -m benchmarks.attention, rows with S=0, column "forward".

Interpreted on a CPU, P goes through SMEM (`p_stage`): `wgmma` with A in registers is not simulated (see warpgroup.py);
and `_release` waits for the blocks that it gives back, because there every phase of a barrier has to be observed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_masks import MaskRows, pad_rows
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib
from pallas_kernels.mosaic_gpu.sequence.tiles import (
    REGISTERS,
    ForwardTiles,
    ForwardVariant,
    SequenceShape,
    check_shared,
    choose_tiles,
)
from pallas_kernels.operands import Call
from pallas_kernels.parts import Part


def _scratch(variant: ForwardVariant) -> dict[str, Any]:
    """Scratch types by name; None where a variant does not need it."""
    tiles, head_dim, dtype, mask = variant.tiles, variant.shape.head_dim, variant.shape.dtype, variant.shape.mask
    warpgroups, key_block, stages = tiles.warpgroups, tiles.key_block, tiles.stages
    merge, with_rest, tile = variant.merge, variant.with_rest, wg_lib.tiled_smem
    box = functools.partial(tile, boxed=variant.boxed)
    own = warpgroups * min(tiles.images, 2)
    return dict(
        query_smem=box((own, 64, head_dim), dtype),
        key_smem=box((stages, key_block, head_dim), dtype),
        value_smem=box((stages, key_block, head_dim), dtype),
        lse_smem=plgpu.SMEM((warpgroups, 64), jnp.float32),
        other_smem=box((warpgroups, 64, head_dim), dtype) if merge or with_rest else None,
        other_lse_smem=plgpu.SMEM((warpgroups, 64), jnp.float32) if merge else None,
        query_rows_smem=plgpu.SMEM((warpgroups, mask.channels, 64), jnp.int32) if mask.explicit else None,
        key_rows_smem=plgpu.SMEM((stages, mask.channels, key_block), jnp.int32) if mask.explicit else None,
        p_stage=tile((warpgroups, 64, key_block), dtype) if variant.interpret else None,
        query_ready=plgpu.Barrier(num_arrivals=2 if mask.explicit else 1, num_barriers=own),
        other_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups) if merge else None,
        other_rest_ready=plgpu.Barrier(num_barriers=warpgroups) if merge and with_rest else None,
        key_ready=plgpu.Barrier(num_arrivals=2 if mask.explicit else 1, num_barriers=stages),
        value_ready=plgpu.Barrier(num_barriers=stages),
        key_consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        value_consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


def _make_body(variant: ForwardVariant):
    """The kernel body: operands, outputs, scratch."""
    sizes, tiles, interpret = variant.shape, variant.tiles, variant.interpret
    spec, merge, with_rest = sizes.mask, variant.merge, variant.with_rest
    query_tokens, key_tokens, head_dim, dtype = sizes.query_tokens, sizes.key_tokens, sizes.head_dim, sizes.dtype
    warpgroups, key_block, stages = tiles.warpgroups, tiles.key_block, tiles.stages
    query_blocks = pl.cdiv(query_tokens, tiles.query_block)
    scale2 = variant.scale * wg_lib.LOG2E  # the softmax runs in base 2
    shape = (64, key_block)
    masked_end = spec.causal or spec.explicit or spec.limit or key_tokens % key_block != 0

    def body(*refs, **scratch):
        refs = list(refs)
        query_ref, key_ref, value_ref = refs[:3]
        out_rest_ref = refs.pop() if with_rest else None
        lse_ref, out_ref = refs.pop(), refs.pop()
        refs = refs[3:]
        other_ref, other_lse_ref = (refs.pop(0), refs.pop(0)) if merge else (None, None)
        other_rest_ref = refs.pop(0) if merge and with_rest else None
        limit_ref = refs.pop(0) if spec.limit else None
        query_rows_ref, key_rows_ref, bounds_ref = refs if spec.explicit else (None, None, None)
        s = wg_lib.named(scratch)

        images = wg_lib.Images(tiles.images, sizes.batch)
        batch = images.first
        head = lax.axis_index("head")
        query_tile = query_blocks - 1 - lax.axis_index("query_block")
        warpgroup = lax.axis_index("warpgroup")
        query_start = query_tile * tiles.query_block
        limit = limit_ref[batch] if spec.limit else jnp.int32(key_tokens)

        # Key blocks of the whole CTA: [first, last).
        if spec.explicit:
            first = bounds_ref[batch, query_tile, 0]
            last = bounds_ref[batch, query_tile, 1]
        else:
            first = jnp.int32(0)
            end = limit
            if spec.causal:
                end = jnp.minimum(end, query_start + tiles.query_block)
            last = pl.cdiv(end, key_block)
        # One block is always walked: it is masked where nothing is visible.
        last = jnp.maximum(last, first + 1)
        steps = last - first  # of an image

        @pl.when(warpgroup == warpgroups)
        def _producer():
            if not tiles.paired:
                plgpu.set_max_registers(REGISTERS[warpgroups][1], action="decrease")
            kv_head = lax.div(head, jnp.int32(sizes.group))

            def fetch(step, wait):
                slot, image = lax.rem(step, jnp.int32(stages)), batch + images.of(step, steps)
                window = pl.ds((first + images.within(step, steps)) * key_block, key_block)
                if wait:
                    plgpu.barrier_wait(s.key_consumed.at[slot])
                plgpu.copy_gmem_to_smem(
                    key_ref.at[image, window, kv_head], s.key_smem_box.at[slot], s.key_ready.at[slot]
                )
                if spec.explicit:
                    plgpu.copy_gmem_to_smem(
                        key_rows_ref.at[image, :, window], s.key_rows_smem.at[slot], s.key_ready.at[slot]
                    )
                if wait:
                    plgpu.barrier_wait(s.value_consumed.at[slot])
                plgpu.copy_gmem_to_smem(
                    value_ref.at[image, window, kv_head], s.value_smem_box.at[slot], s.value_ready.at[slot]
                )

            def consumed(slot):
                plgpu.barrier_wait(s.key_consumed.at[slot])
                plgpu.barrier_wait(s.value_consumed.at[slot])

            wg_lib.produce(fetch, steps * images.count, stages, consumed)

        @pl.when(warpgroup < warpgroups)
        def _consumer():
            if not tiles.paired:
                plgpu.set_max_registers(REGISTERS[warpgroups][0], action="increase")
            row_start = query_start + warpgroup * 64
            row_window = pl.ds(row_start, 64)
            p_stage = s.p_stage.at[warpgroup] if interpret else None

            def load(image):
                """The warpgroup's queries of an image."""
                own = images.buffer(warpgroup, image)
                plgpu.copy_gmem_to_smem(
                    query_ref.at[batch + image, row_window, head], s.query_smem_box.at[own], s.query_ready.at[own]
                )
                if spec.explicit:
                    plgpu.copy_gmem_to_smem(
                        query_rows_ref.at[batch, :, row_window],
                        s.query_rows_smem.at[warpgroup],
                        s.query_ready.at[own],
                    )

            if merge:
                plgpu.copy_gmem_to_smem(
                    other_ref.at[batch, row_window, head], s.other_smem_box.at[warpgroup], s.other_ready.at[warpgroup]
                )
                plgpu.copy_gmem_to_smem(
                    other_lse_ref.at[batch, head, row_window],
                    s.other_lse_smem.at[warpgroup],
                    s.other_ready.at[warpgroup],
                )

            # Key blocks of this warpgroup: [first, own_end), of which [full_start, full_end) need no mask.
            if spec.explicit:
                full_start, full_end, own_end = bounds_ref[batch, query_tile, 2], bounds_ref[batch, query_tile, 3], last
            else:
                full_start, full_end, own_end = first, lax.div(limit, jnp.int32(key_block)), pl.cdiv(limit, key_block)
            if spec.causal and not spec.positions:
                full_end = jnp.minimum(full_end, lax.div(row_start + 1, jnp.int32(key_block)))
                own_end = jnp.minimum(own_end, pl.cdiv(row_start + 64, key_block))
            own_end = jnp.minimum(jnp.maximum(own_end, first + 1), last)

            def compute(image):
                """An image's part of the softmax."""
                own = images.buffer(warpgroup, image)
                query_smem, query_box = s.query_smem.at[own], s.query_smem_box.at[own]
                plgpu.barrier_wait(s.query_ready.at[own])
                row_values = []
                if spec.explicit:
                    row_values = [
                        plgpu.load(s.query_rows_smem.at[warpgroup, c], layout=wg_lib.ROW) for c in range(spec.channels)
                    ]

                def slot_of(step):
                    return lax.rem(image * steps + step - first, jnp.int32(stages))

                def load_key_rows(slot):
                    """Of a masked block. TMA overwrites the slot soon: these reads are fenced from its writes."""
                    loaded = [
                        plgpu.load(s.key_rows_smem.at[slot, c], layout=wg_lib.COLUMN) for c in range(spec.channels)
                    ]
                    if spec.explicit:
                        plgpu.commit_smem()
                    return loaded

                def hide(logits, step, key_values):
                    """Puts HIDDEN where a key is not visible."""
                    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=wg_lib.TILE)
                    visible = column < limit - step * key_block
                    channel = 0
                    if spec.positions:
                        visible &= wg_lib.columns(key_values[0], shape) <= wg_lib.rows(row_values[0], shape)
                        channel = 1
                    elif spec.causal:
                        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=wg_lib.TILE)
                        visible &= column - row <= row_start - step * key_block
                    if spec.segments:
                        visible &= wg_lib.columns(key_values[channel], shape) == wg_lib.rows(row_values[channel], shape)
                    return jnp.where(visible, logits, wg_lib.HIDDEN)

                def softmax(logits, maximum, total, step, key_values, masked):
                    """Online softmax in base 2 -> (P, rescaling of what is accumulated, new maximum, new sum)."""
                    if masked:
                        logits = hide(logits, step, key_values)
                    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale2)
                    shift = new_maximum
                    if masked:
                        # A row that saw no key yet: exp2(HIDDEN - 0) = 0, where exp2(HIDDEN - HIDDEN) would be NaN.
                        shift = jnp.where(new_maximum == wg_lib.HIDDEN, 0.0, new_maximum)
                    rescale = jnp.exp2(maximum - shift)
                    p = jnp.exp2(logits * scale2 - wg_lib.rows(shift, shape))
                    return p, rescale, new_maximum, total * rescale + p.sum(axis=1)

                maximum = wg_lib.full((64,), wg_lib.HIDDEN, wg_lib.ROW)
                total = wg_lib.full((64,), 0.0, wg_lib.ROW)
                out = wg_lib.full((64, head_dim), 0.0, wg_lib.TILE)

                consumer = _Consumer(variant, s, query_smem, p_stage, slot_of, load_key_rows, softmax)
                blocks = wg_lib.BlockRange(first, full_start, full_end, own_end, spec.explicit, masked_end)
                out, maximum, total = _walk(consumer, blocks, last, (out, maximum, total))

                if merge and with_rest:
                    plgpu.commit_smem()  # all warps are done with the queries, which make room
                    plgpu.copy_gmem_to_smem(
                        other_rest_ref.at[batch, row_window, head], query_box, s.other_rest_ready.at[warpgroup]
                    )
                # maximum is HIDDEN and total 0 in a row that saw nothing: lse = -inf.
                lse = maximum * wg_lib.LN2 + jnp.log(total)
                weight = jnp.where(maximum == wg_lib.HIDDEN, 0.0, 1.0 / total)
                if merge:
                    plgpu.barrier_wait(s.other_ready.at[warpgroup])
                    other_lse = plgpu.load(s.other_lse_smem.at[warpgroup], layout=wg_lib.ROW)
                    top = jnp.maximum(jnp.maximum(lse, other_lse), wg_lib.LOWEST)
                    mine, others = jnp.exp(lse - top), jnp.exp(other_lse - top)
                    both = mine + others
                    inverse = jnp.where(both > 0.0, 1.0 / both, 0.0)
                    lse = top + jnp.log(both)
                    weight = weight * mine * inverse
                    other = plgpu.load(s.other_smem.at[warpgroup], layout=wg_lib.TILE).astype(jnp.float32)
                    if with_rest:
                        plgpu.barrier_wait(s.other_rest_ready.at[warpgroup])
                        other += plgpu.load(query_smem, layout=wg_lib.TILE).astype(jnp.float32)
                        plgpu.commit_smem()  # all warps have read it
                    out = out * wg_lib.rows(weight, out.shape) + other * wg_lib.rows(others * inverse, out.shape)
                else:
                    out = out * wg_lib.rows(weight, out.shape)
                rounded = out.astype(dtype)
                query_smem[...] = rounded
                if with_rest:
                    s.other_smem[warpgroup] = (out - rounded.astype(jnp.float32)).astype(dtype)
                s.lse_smem[warpgroup] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query_box, out_ref.at[batch + image, row_window, head])
                if with_rest:
                    plgpu.copy_smem_to_gmem(
                        s.other_smem_box.at[warpgroup], out_rest_ref.at[batch + image, row_window, head]
                    )
                plgpu.copy_smem_to_gmem(s.lse_smem.at[warpgroup], lse_ref.at[batch + image, head, row_window])

            images.walk(load, compute)
            plgpu.wait_smem_to_gmem(0)

    return body


class _Consumer(NamedTuple):
    """What a consumer warpgroup works with: its scratch, its queries, and what it does with a block of keys."""

    variant: ForwardVariant
    scratch: Any
    query_smem: Any
    p_stage: Any
    slot_of: Callable[[Any], Any]
    load_key_rows: Callable[[Any], list]
    softmax: Callable[..., tuple]


def _walk(consumer: _Consumer, blocks: wg_lib.BlockRange, last: Any, state: tuple) -> tuple:
    """(out, maximum, sum) after the blocks; Q K^T of a block runs together with P V of the block before.

    last: the end of the blocks of all warpgroups of the CTA.
    """
    variant, s, query_smem, p_stage, slot_of, load_key_rows, softmax = consumer
    shape, dtype, interpret = (64, variant.tiles.key_block), variant.shape.dtype, variant.interpret
    first, own_end = blocks.first, blocks.end
    out, maximum, total = state
    slot = slot_of(first)
    plgpu.barrier_wait(s.key_ready.at[slot])
    (logits,), _ = wg_lib.accumulate(
        lambda acc: plgpu.wgmma(acc, query_smem, s.key_smem.at[slot].T) or (), [shape], interpret=interpret
    )
    key_values = load_key_rows(slot)
    plgpu.barrier_arrive(s.key_consumed.at[slot])
    p, _, maximum, total = softmax(logits, maximum, total, first, key_values, blocks.masked_tail)
    p = p.astype(dtype)

    def step_body(step, carry, masked):
        out, p, maximum, total = carry
        slot, previous = slot_of(step), slot_of(step - 1)
        plgpu.barrier_wait(s.key_ready.at[slot])

        def issue(out_acc, logits_acc):
            plgpu.wgmma(logits_acc, query_smem, s.key_smem.at[slot].T)
            plgpu.barrier_wait(s.value_ready.at[previous])
            wg_lib.wgmma_registers(out_acc, p, s.value_smem.at[previous], p_stage)
            logits = wg_lib.load_after(logits_acc, 1)
            key_values = load_key_rows(slot) if masked else []
            plgpu.barrier_arrive(s.key_consumed.at[slot])
            new_p, rescale, new_maximum, new_total = softmax(logits, maximum, total, step, key_values, masked)
            plgpu.wgmma_wait(0)
            # P of the block before is an operand in registers of the product that ran until here: keep it alive, and
            # round the new P only now, so that no register of the old one is written too early.
            new_p, _ = lax.optimization_barrier((new_p, p))
            plgpu.barrier_arrive(s.value_consumed.at[previous])
            return new_p.astype(dtype), rescale, new_maximum, new_total

        (out, _), (p, rescale, maximum, total) = wg_lib.accumulate(
            issue, [out, shape], (p, maximum, maximum, total), interpret=interpret
        )
        return out * wg_lib.rows(rescale, out.shape), p, maximum, total

    out, p, maximum, total = wg_lib.walk_blocks(blocks._replace(first=first + 1), step_body, (out, p, maximum, total))

    slot = slot_of(own_end - 1)
    plgpu.barrier_wait(s.value_ready.at[slot])

    def finish(acc):
        wg_lib.wgmma_registers(acc, p, s.value_smem.at[slot], p_stage)
        return ()

    (out,), _ = wg_lib.accumulate(finish, [out], interpret=interpret)
    plgpu.barrier_arrive(s.value_consumed.at[slot])

    @pl.loop(own_end, last)
    def _release(step):
        """Blocks that only the other warpgroups need."""
        if interpret:
            plgpu.barrier_wait(s.key_ready.at[slot_of(step)])
            plgpu.barrier_wait(s.value_ready.at[slot_of(step)])
        plgpu.barrier_arrive(s.key_consumed.at[slot_of(step)])
        plgpu.barrier_arrive(s.value_consumed.at[slot_of(step)])

    return out, maximum, total


def sequence_forward(
    call: Call,
    other: Part | None = None,
    *,
    with_rest: bool = False,
    tiles: ForwardTiles | None = None,
    interpret: bool | None = None,
) -> Part:
    """softmax(scale * query key^T) value over the visible keys, merged with another part if one is given.

    Args:
        call: its sequence part, bfloat16 or float16, H 64, 128 or 256; keys and values that are hidden are finite.
        other: another part of the same softmax; where `with_rest`, with its rest.
        with_rest: also return what rounding took from out.
        tiles: overrides `tiles.choose_tiles`.
        interpret: run on the CPU; None: where there is no GPU.

    Raises:
        ValueError: tiles that do not fit into shared memory, or another part without its rest.
    """
    interpret = wg_lib.default_interpret() if interpret is None else interpret
    query, scale = wg_lib.positive_scale(call.query, call.scale)
    shape, merge = SequenceShape.of(call), other is not None
    rows = MaskRows.of(call.mask, shape.batch, shape.query_tokens, shape.key_tokens)
    tiles = tiles or choose_tiles(
        shape.head_dim, query_tokens=shape.query_tokens, explicit_masks=shape.mask.explicit, interpret=interpret,
        cache_only=shape.query_tokens <= 64 and not (shape.mask.causal or merge or with_rest),
    ).forward  # fmt: skip
    shape.check_images("sequence forward", tiles.images)
    if tiles.images > 1 and (merge or with_rest):
        raise ValueError(f"sequence forward: images={tiles.images}: expected 1 with another part or with_rest")
    variant = ForwardVariant(shape, tiles, scale, merge, with_rest, interpret)
    check_shared("sequence forward", variant, _scratch(dataclasses.replace(variant, interpret=False)))
    if with_rest and merge and other.rest is None:
        raise ValueError("other.rest=None: expected an array, because with_rest=True and another part is given")
    query_blocks = pl.cdiv(shape.query_tokens, tiles.query_block)
    padded_tokens = query_blocks * tiles.query_block

    as_copied = (lambda x: x) if variant.boxed else wg_lib.pad_tokens
    operands = [as_copied(x) for x in (query, call.key, call.value)]
    query = operands[0]
    if merge:
        other_out = as_copied(other.out)
        other_lse = jnp.pad(other.lse.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded_tokens - shape.query_tokens)))
        operands += [other_out, other_lse, *([as_copied(other.rest)] if with_rest else [])]
    if shape.mask.limit:
        operands.append(rows.limit)
    if shape.mask.explicit:
        operands += [
            pad_rows(rows.query_rows, tiles.query_block),
            pad_rows(rows.key_rows, tiles.key_block),
            rows.block_bounds(tiles.query_block, tiles.key_block, per="query"),
        ]
    like_query = jax.ShapeDtypeStruct(query.shape, query.dtype)
    kernel = plgpu.kernel(
        _make_body(variant),
        out_type=(
            like_query,
            jax.ShapeDtypeStruct((shape.batch, shape.num_heads, padded_tokens), jnp.float32),
            *([like_query] if with_rest else []),
        ),
        grid=(pl.cdiv(shape.batch, tiles.images), query_blocks, shape.num_heads),
        grid_names=("batch", "query_block", "head"),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={name: entry for name, entry in _scratch(variant).items() if entry is not None},
        compiler_params=wg_lib.compiler_params(),
        interpret=wg_lib.interpret_params(interpret),
        kernel_name=shape.kernel_name("moda_sequence_forward", tiles),
    )
    # XLA would run the kernel a second time to write a stacked copy of `out` (what a scan keeps for its backward) in
    # place: its dynamic-slice fusion clones a custom call whose result has other users too. Not through a barrier.
    out, lse, *rest = lax.optimization_barrier(kernel(*operands))
    rest = rest[0][:, : shape.query_tokens] if with_rest else None
    return Part(out[:, : shape.query_tokens], lse[..., : shape.query_tokens].swapaxes(1, 2), rest)
