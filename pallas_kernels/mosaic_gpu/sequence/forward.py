"""Sequence attention, forward, for Hopper.

Equation, per batch row b, query head n (KV head n // G), query t:
    s_u = scale * <query_t, key_u>,  u visible (pallas_kernels/block_masks.py)
    lse = log sum_u exp(s_u);  out = sum_u exp(s_u - lse) value_u
and, if `other_out`, `other_lse` are given (another block of the same softmax, such as the depth part):
    lse' = log(exp(lse) + exp(other_lse));  out' = exp(lse - lse') out + exp(other_lse - lse') other_out.
A query that sees nothing: out 0, lse -inf.
With `with_rest`, out also leaves what rounding took from it, as a second number of the input dtype; `other_rest` is
that of other_out.

Grid: CTAs that take turns at the query blocks (`warpgroup.Turns`), as many CTAs as are resident: heads fastest, so
    that the CTAs of one KV head run side by side and share K and V in L2; query blocks in descending order, so that the
    longest causal rows come first. The producer already loads K and V of the next turn while the consumers end one.
Blocks: query and out [query_block, H], 64 rows per consumer warpgroup; key and value [key_block, H].
Loop: one producer warpgroup streams K and V through two rings of `stages` TMA blocks; each consumer warpgroup walks the
    key blocks in ascending order: blocks that all its rows see whole unmasked, the others (document borders, the
    diagonal, a ragged end) masked. A warpgroup issues
    Q K^T of block j and P V of block j-1 together and does the softmax of j while the latter runs.
Resident: query tile in SMEM; out accumulator, running maximum and sum in registers.
Accumulators: float32 (logits, out, maximum, sum); P is rounded to the input dtype for the second product.
FLOPs: 4 T U N H B (half if causal). Bytes: query + key + value + out + 4 T N B; each CTA re-reads K and V from L2.
Bound on an H200 at H=64: exp2 (16 a clock per SM) takes exactly as long as the two products (4096 FLOP a clock per SM),
    so the tensor cores cannot be full. Causal, merged with another part, ms with a CTA for every query block | in turns
    | cuDNN, unmerged: B=1, T=16384, K=8, G=8 4.57 | 4.37 | 4.98 (480 to 500 TFLOP/s); B=8, T=4096, K=8, G=2
    0.71 | 0.66 | 0.74, where it was 0.85 with spilled registers and the softmax behind the products. Two warpgroups
    taking turns on the tensor cores (the usual schedule) measured 5.2 ms for the first. H=128: tensor cores.
Benchmark: python -m benchmarks.attention, rows with S=0, column "forward".

Interpreted on a CPU, P goes through SMEM (`p_stage`): `wgmma` with A in registers is not simulated (see warpgroup.py).
"""

from __future__ import annotations

import dataclasses
import functools
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
    SHARED_BYTES,
    ForwardTiles,
    ForwardVariant,
    SequenceShape,
    check_shared,
    choose_tiles,
)
from pallas_kernels.operands import Call
from pallas_kernels.parts import Part


class _Operands(NamedTuple):
    """References to a call's arrays in device memory; None where a variant has no such array.

    Attributes:
        query, key, value: [B, T or U, heads, H].
        other, other_rest, out, out_rest: like query. other_lse, lse: [B, N, T].
        limit: int32 [B], keys that exist. query_rows, key_rows, bounds: of explicit masks, see `MaskRows`.
    """

    query: Any
    key: Any
    value: Any
    other: Any
    other_lse: Any
    other_rest: Any
    limit: Any
    query_rows: Any
    key_rows: Any
    bounds: Any
    out: Any
    lse: Any
    out_rest: Any

    @classmethod
    def of(cls, variant: ForwardVariant, refs: tuple) -> _Operands:
        """From the kernel's arguments, in the order in which `sequence_forward` gives them."""
        spec, merge, with_rest = variant.shape.mask, variant.merge, variant.with_rest
        rows, always = (spec.explicit,) * 3, True
        others = merge, merge, merge and with_rest
        wanted = (always, always, always, *others, spec.limit, *rows, always, always, with_rest)
        given = iter(refs)
        return cls(*(next(given) if exists else None for exists in wanted))


class _Turn(NamedTuple):
    """One query block of one head, as all warpgroups of a CTA see it.

    Attributes:
        number: which of the CTA's turns it is.
        batch, query_tile, head: its place.
        first, last: the key blocks [first, last) that at least one warpgroup needs.
        limit: keys of the batch row that exist.
    """

    number: Any
    batch: Any
    query_tile: Any
    head: Any
    first: Any
    last: Any
    limit: Any

    @property
    def key_blocks(self) -> Any:
        """How many there are."""
        return self.last - self.first


def _scratch(variant: ForwardVariant) -> dict[str, Any]:
    """Scratch types by name; None where a variant does not need it."""
    tiles, head_dim, dtype, mask = variant.tiles, variant.shape.head_dim, variant.shape.dtype, variant.shape.mask
    warpgroups, key_block, stages, buffers = tiles.warpgroups, tiles.key_block, tiles.stages, variant.query_buffers
    merge, with_rest, tile = variant.merge, variant.with_rest, wg_lib.tiled_smem
    box = functools.partial(tile, boxed=variant.boxed)
    query_rows = plgpu.SMEM((buffers, warpgroups, mask.channels, 64), jnp.int32) if mask.explicit else None
    return dict(
        query_smem=box((buffers, warpgroups, 64, head_dim), dtype),
        key_smem=box((stages, key_block, head_dim), dtype),
        value_smem=box((stages, key_block, head_dim), dtype),
        lse_smem=plgpu.SMEM((warpgroups, 64), jnp.float32),
        kept_smem=plgpu.SMEM((warpgroups, 128), jnp.int32),
        other_smem=box((warpgroups, 64, head_dim), dtype) if merge or with_rest else None,
        other_lse_smem=plgpu.SMEM((warpgroups, 64), jnp.float32) if merge else None,
        query_rows_smem=query_rows,
        key_rows_smem=plgpu.SMEM((stages, mask.channels, key_block), jnp.int32) if mask.explicit else None,
        p_stage=tile((warpgroups, 64, key_block), dtype) if variant.interpret else None,
        query_ready=plgpu.Barrier(num_arrivals=2 if mask.explicit else 1, num_barriers=warpgroups),
        other_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups) if merge else None,
        other_rest_ready=plgpu.Barrier(num_barriers=warpgroups) if merge and with_rest else None,
        key_ready=plgpu.Barrier(num_arrivals=2 if mask.explicit else 1, num_barriers=stages),
        value_ready=plgpu.Barrier(num_barriers=stages),
        key_consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        value_consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


def _fits(variant: ForwardVariant) -> bool:
    """Whether its scratch fits into shared memory."""
    return wg_lib.shared_bytes(_scratch(dataclasses.replace(variant, interpret=False))) <= SHARED_BYTES


def _make_body(variant: ForwardVariant):
    """The kernel body: operands, outputs, scratch."""
    warpgroups = variant.tiles.warpgroups

    def body(*refs, **scratch):
        arrays, memory = _Operands.of(variant, refs), wg_lib.named(scratch)
        warpgroup = lax.axis_index("warpgroup")

        def registers(which, action):
            if not variant.tiles.paired:
                plgpu.set_max_registers(REGISTERS[warpgroups][which], action=action)

        @pl.when(warpgroup == warpgroups)
        def _produce():
            registers(1, "decrease")
            _Producer(variant, arrays, memory).run()

        @pl.when(warpgroup < warpgroups)
        def _consume():
            registers(0, "increase")
            _Consumer(variant, arrays, memory, warpgroup).run()

    return body


class _Role:
    """What producer and consumers know alike: the turns of their CTA."""

    def __init__(self, variant: ForwardVariant, arrays: _Operands, memory: Any) -> None:
        self.variant, self.arrays, self.memory = variant, arrays, memory
        self.sizes, self.tiles, self.spec = variant.shape, variant.tiles, variant.shape.mask
        self.query_blocks = pl.cdiv(self.sizes.query_tokens, self.tiles.query_block)
        items = self.sizes.batch * self.query_blocks * self.sizes.num_heads
        self.turns = wg_lib.Turns(lax.axis_index("program"), variant.programs, items)

    def place(self, number: Any) -> tuple[Any, Any, Any]:
        """(batch row, query block, head) of a turn: the longest causal rows first, heads side by side."""
        rest, head = wg_lib.divided(self.turns.item(number), self.sizes.num_heads)
        place, batch = wg_lib.divided(rest, self.sizes.batch)
        return batch, self.query_blocks - 1 - place, head

    def turn(self, number: Any) -> _Turn:
        """What a turn is about."""
        batch, query_tile, head = self.place(number)
        limit = self.arrays.limit[batch] if self.spec.limit else jnp.int32(self.sizes.key_tokens)
        if self.spec.explicit:
            first, last = (self.arrays.bounds[batch, query_tile, i] for i in range(2))
        else:
            first, end = jnp.int32(0), limit
            if self.spec.causal:
                end = jnp.minimum(end, (query_tile + 1) * self.tiles.query_block)
            last = pl.cdiv(end, self.tiles.key_block)
        # One block is always walked: it is masked where nothing is visible.
        return _Turn(number, batch, query_tile, head, first, jnp.maximum(last, first + 1), limit)

    def stage(self, block: Any) -> Any:
        """Of the ring, for the number of a block counted over all turns."""
        return lax.rem(block, jnp.int32(self.tiles.stages))


class _Producer(_Role):
    """Streams K and V through the rings, turn after turn."""

    def run(self) -> None:
        """All turns."""
        fetched = lax.fori_loop(0, self.turns.count, self._one_turn, jnp.int32(0))
        s, stages = self.memory, self.tiles.stages

        @pl.loop(jnp.maximum(fetched - stages, 0), fetched)
        def _drain(block):
            """Every phase of a barrier is observed before the barrier goes (the interpreter insists)."""
            plgpu.barrier_wait(s.key_consumed.at[self.stage(block)])
            plgpu.barrier_wait(s.value_consumed.at[self.stage(block)])

    def _one_turn(self, number, fetched):
        """fetched: blocks of the turns before; returns those of this one too."""
        s, arrays, key_block = self.memory, self.arrays, self.tiles.key_block
        turn = self.turn(number)
        kv_head = lax.div(turn.head, jnp.int32(self.sizes.group))

        @pl.loop(turn.first, turn.last)
        def _fetch(step):
            block = fetched + step - turn.first
            stage, window, refill = self.stage(block), pl.ds(step * key_block, key_block), block >= self.tiles.stages
            pl.when(refill)(lambda: plgpu.barrier_wait(s.key_consumed.at[stage]))
            copy = plgpu.copy_gmem_to_smem
            copy(arrays.key.at[turn.batch, window, kv_head], s.key_smem_box.at[stage], s.key_ready.at[stage])
            if self.spec.explicit:
                copy(arrays.key_rows.at[turn.batch, :, window], s.key_rows_smem.at[stage], s.key_ready.at[stage])
            pl.when(refill)(lambda: plgpu.barrier_wait(s.value_consumed.at[stage]))
            copy(arrays.value.at[turn.batch, window, kv_head], s.value_smem_box.at[stage], s.value_ready.at[stage])

        return fetched + turn.key_blocks


class _Consumer(_Role):
    """A warpgroup with 64 query rows of every turn."""

    def __init__(self, variant: ForwardVariant, arrays: _Operands, memory: Any, warpgroup: Any) -> None:
        super().__init__(variant, arrays, memory)
        self.warpgroup = warpgroup
        self.p_stage = memory.p_stage.at[warpgroup] if variant.interpret else None

    def run(self) -> None:
        """All turns."""
        pl.when(self.turns.count > 0)(lambda: self._load_queries(jnp.int32(0)))
        lax.fori_loop(0, self.turns.count, self._one_turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def rows(self, query_tile: Any) -> Any:
        """The first of its rows of a query block."""
        return query_tile * self.tiles.query_block + self.warpgroup * 64

    def buffer(self, number: Any) -> Any:
        """Of the queries of a turn."""
        return lax.rem(number, jnp.int32(self.variant.query_buffers))

    def _load_queries(self, number: Any) -> None:
        """Starts to load a turn's queries; nobody reads the buffer or writes to it any more."""
        s, arrays, (batch, query_tile, head) = self.memory, self.arrays, self.place(number)
        mine, window = (self.buffer(number), self.warpgroup), pl.ds(self.rows(query_tile), 64)
        ready = s.query_ready.at[self.warpgroup]
        plgpu.copy_gmem_to_smem(arrays.query.at[batch, window, head], s.query_smem_box.at[mine], ready)
        if self.spec.explicit:
            plgpu.copy_gmem_to_smem(arrays.query_rows.at[batch, :, window], s.query_rows_smem.at[mine], ready)

    def _load_next_queries(self, turn: _Turn) -> None:
        pl.when(turn.number + 1 < self.turns.count)(lambda: self._load_queries(turn.number + 1))

    def _one_turn(self, number, walked):
        """walked: blocks of the turns before; returns those of this one too."""
        turn, head_dim = self.turn(number), self.sizes.head_dim
        if self.variant.merge:
            self._load_other(turn)
        plgpu.barrier_wait(self.memory.query_ready.at[self.warpgroup])
        walk = _Walk(self, turn, walked)
        state = walk.run(
            wg_lib.full((64, head_dim), 0.0, wg_lib.TILE),
            wg_lib.full((64,), wg_lib.HIDDEN, wg_lib.ROW),
            wg_lib.full((64,), 0.0, wg_lib.ROW),
        )
        plgpu.wait_smem_to_gmem(0)  # the results of the turn before have left shared memory
        if self.variant.query_buffers > 1:
            self._load_next_queries(turn)
        self._finish(turn, *state)
        if self.variant.with_rest or self.variant.query_buffers == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if self.variant.query_buffers == 1:
            self._load_next_queries(turn)
        return walked + turn.key_blocks

    def _load_other(self, turn: _Turn) -> None:
        """Starts to load the other part's output and lse."""
        s, arrays, window = self.memory, self.arrays, pl.ds(self.rows(turn.query_tile), 64)
        ready = s.other_ready.at[self.warpgroup]
        target, lse = s.other_smem_box.at[self.warpgroup], s.other_lse_smem.at[self.warpgroup]
        plgpu.copy_gmem_to_smem(arrays.other.at[turn.batch, window, turn.head], target, ready)
        plgpu.copy_gmem_to_smem(arrays.other_lse.at[turn.batch, turn.head, window], lse, ready)

    def _finish(self, turn: _Turn, out: jax.Array, maximum: jax.Array, total: jax.Array) -> None:
        """Merges the other part, and stores out, lse and what rounding takes from out, by way of shared memory."""
        s, arrays, variant, mine = self.memory, self.arrays, self.variant, self.warpgroup
        place, window = (self.buffer(turn.number), mine), pl.ds(self.rows(turn.query_tile), 64)
        query_smem, query_box = s.query_smem.at[place], s.query_smem_box.at[place]
        if variant.merge and variant.with_rest:
            plgpu.commit_smem()  # all warps are done with the queries, which make room
            rest = arrays.other_rest.at[turn.batch, window, turn.head]
            plgpu.copy_gmem_to_smem(rest, query_box, s.other_rest_ready.at[mine])
        # maximum is HIDDEN and total 0 in a row that saw nothing: lse = -inf.
        lse = maximum * wg_lib.LN2 + jnp.log(total)
        weight = jnp.where(maximum == wg_lib.HIDDEN, 0.0, 1.0 / total)
        if variant.merge:
            plgpu.barrier_wait(s.other_ready.at[mine])
            other_lse = plgpu.load(s.other_lse_smem.at[mine], layout=wg_lib.ROW)
            top = jnp.maximum(jnp.maximum(lse, other_lse), wg_lib.LOWEST)
            ours, others = jnp.exp(lse - top), jnp.exp(other_lse - top)
            both = ours + others
            inverse = jnp.where(both > 0.0, 1.0 / both, 0.0)
            lse = top + jnp.log(both)
            weight = weight * ours * inverse
            other = plgpu.load(s.other_smem.at[mine], layout=wg_lib.TILE).astype(jnp.float32)
            if variant.with_rest:
                plgpu.barrier_wait(s.other_rest_ready.at[mine])
                other += plgpu.load(query_smem, layout=wg_lib.TILE).astype(jnp.float32)
                plgpu.commit_smem()  # all warps have read it
            out = out * wg_lib.rows(weight, out.shape) + other * wg_lib.rows(others * inverse, out.shape)
        else:
            out = out * wg_lib.rows(weight, out.shape)
        rounded = out.astype(self.sizes.dtype)
        query_smem[...] = rounded
        if variant.with_rest:
            s.other_smem[mine] = (out - rounded.astype(jnp.float32)).astype(self.sizes.dtype)
        s.lse_smem[mine] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query_box, arrays.out.at[turn.batch, window, turn.head])
        if variant.with_rest:
            plgpu.copy_smem_to_gmem(s.other_smem_box.at[mine], arrays.out_rest.at[turn.batch, window, turn.head])
        plgpu.copy_smem_to_gmem(s.lse_smem.at[mine], arrays.lse.at[turn.batch, turn.head, window])


class _Walk:
    """A consumer's way over the key blocks of a turn; Q K^T of a block runs together with P V of the block before."""

    def __init__(self, consumer: _Consumer, turn: _Turn, walked: Any) -> None:
        self.consumer, self.turn, self.walked = consumer, turn, walked
        variant, s = consumer.variant, consumer.memory
        self.memory, self.spec, self.interpret = s, consumer.spec, variant.interpret
        self.key_block, self.dtype = variant.tiles.key_block, variant.shape.dtype
        self.shape = (64, self.key_block)
        self.scale2 = variant.scale * wg_lib.LOG2E  # the softmax runs in base 2
        place = consumer.buffer(turn.number), consumer.warpgroup
        self.query_smem = s.query_smem.at[place]
        self.row_start = consumer.rows(turn.query_tile)
        self.row_values = []
        if self.spec.explicit:
            self.row_values = [
                plgpu.load(s.query_rows_smem.at[(*place, c)], layout=wg_lib.ROW) for c in range(self.spec.channels)
            ]

    def blocks(self) -> wg_lib.BlockRange:
        """Key blocks of this warpgroup, and those of them that need no mask."""
        turn, spec, key_block = self.turn, self.spec, jnp.int32(self.key_block)
        first, last, limit = turn.first, turn.last, turn.limit
        if spec.explicit:
            bounds = self.consumer.arrays.bounds
            full_start, full_end = (bounds[turn.batch, turn.query_tile, i] for i in (2, 3))
            end = last
        else:
            full_start, full_end, end = first, lax.div(limit, key_block), pl.cdiv(limit, key_block)
        if spec.causal and not spec.positions:
            full_end = jnp.minimum(full_end, lax.div(self.row_start + 1, key_block))
            end = jnp.minimum(end, pl.cdiv(self.row_start + 64, key_block))
        end = jnp.minimum(jnp.maximum(end, first + 1), last)
        masked_end = spec.causal or spec.explicit or spec.limit or self.consumer.sizes.key_tokens % self.key_block != 0
        return wg_lib.BlockRange(first, full_start, full_end, end, spec.explicit, masked_end)

    def run(self, out: jax.Array, maximum: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(out, maximum, sum) after all blocks."""
        s, blocks = self.memory, self.blocks()
        stage = self.stage(blocks.first)
        plgpu.barrier_wait(s.key_ready.at[stage])
        (logits,), _ = wg_lib.accumulate(
            lambda acc: plgpu.wgmma(acc, self.query_smem, s.key_smem.at[stage].T) or (), [self.shape],
            interpret=self.interpret,
        )  # fmt: skip
        key_values = self._load_key_rows(stage)
        plgpu.barrier_arrive(s.key_consumed.at[stage])
        p, _, maximum, total = self._softmax(logits, maximum, total, blocks.first, key_values, blocks.masked_tail)
        state = out, p.astype(self.dtype), maximum, total
        out, p, maximum, total = wg_lib.walk_blocks(blocks._replace(first=blocks.first + 1), self._step, state)

        stage = self.stage(blocks.end - 1)
        plgpu.barrier_wait(s.value_ready.at[stage])

        def finish(acc):
            wg_lib.wgmma_registers(acc, p, s.value_smem.at[stage], self.consumer.p_stage)
            return ()

        (out,), _ = wg_lib.accumulate(finish, [out], interpret=self.interpret)
        plgpu.barrier_arrive(s.value_consumed.at[stage])

        @pl.loop(blocks.end, self.turn.last)
        def _release(step):
            """Blocks that only the other warpgroups need. Their phases of the barriers have to be seen here too: the
            next turn counts on them."""
            stage = self.stage(step)
            plgpu.barrier_wait(s.key_ready.at[stage])
            plgpu.barrier_wait(s.value_ready.at[stage])
            plgpu.barrier_arrive(s.key_consumed.at[stage])
            plgpu.barrier_arrive(s.value_consumed.at[stage])

        return out, maximum, total

    def stage(self, step: Any) -> Any:
        """Of the ring, for a key block."""
        return self.consumer.stage(self.walked + step - self.turn.first)

    def _step(self, step, carry, masked):
        """One block behind the first."""
        s, p_stage = self.memory, self.consumer.p_stage
        out, p, maximum, total = carry
        stage, previous = self.stage(step), self.stage(step - 1)
        plgpu.barrier_wait(s.key_ready.at[stage])

        def issue(out_acc, logits_acc):
            plgpu.wgmma(logits_acc, self.query_smem, s.key_smem.at[stage].T)
            plgpu.barrier_wait(s.value_ready.at[previous])
            wg_lib.wgmma_registers(out_acc, p, s.value_smem.at[previous], p_stage)
            logits = wg_lib.load_after(logits_acc, 1)
            key_values = self._load_key_rows(stage) if masked else []
            plgpu.barrier_arrive(s.key_consumed.at[stage])
            new_p, rescale, new_maximum, new_total = self._softmax(logits, maximum, total, step, key_values, masked)
            kept = s.kept_smem.at[self.consumer.warpgroup]
            wg_lib.keep_before(new_total, kept, wg_lib.ROW, interpret=self.interpret)  # the sum needs all of P
            plgpu.wgmma_wait(0)
            # P of the block before is an operand in registers of the product that ran until here: keep it alive, and
            # round the new P only now, so that no register of the old one is written too early.
            new_p, _ = lax.optimization_barrier((new_p, p))
            plgpu.barrier_arrive(s.value_consumed.at[previous])
            return new_p.astype(self.dtype), rescale, new_maximum, new_total

        (out, _), (p, rescale, maximum, total) = wg_lib.accumulate(
            issue, [out, self.shape], (p, maximum, maximum, total), interpret=self.interpret
        )
        return out * wg_lib.rows(rescale, out.shape), p, maximum, total

    def _load_key_rows(self, stage: Any) -> list:
        """Of a block that is masked. TMA overwrites the stage soon: these reads are fenced from its writes."""
        if not self.spec.explicit:
            return []
        rows = self.memory.key_rows_smem
        loaded = [plgpu.load(rows.at[stage, c], layout=wg_lib.COLUMN) for c in range(self.spec.channels)]
        plgpu.commit_smem()
        return loaded

    def _hide(self, logits: jax.Array, step: Any, key_values: list) -> jax.Array:
        """Puts HIDDEN where a key is not visible."""
        start = step * self.key_block
        return wg_lib.hide_unseen(
            logits, self.spec, self.turn.limit - start, self.row_start - start, self.row_values, key_values,
            interpret=self.interpret,
        )  # fmt: skip

    def _softmax(self, logits, maximum, total, step, key_values, masked):
        """Online softmax in base 2 -> (P, rescaling of what is accumulated, new maximum, new sum)."""
        if masked:
            logits = self._hide(logits, step, key_values)
        new_maximum = jnp.maximum(maximum, logits.max(axis=1) * self.scale2)
        shift = new_maximum
        if masked:
            # A row that saw no key yet: exp2(HIDDEN - 0) = 0, where exp2(HIDDEN - HIDDEN) would be NaN.
            shift = jnp.where(new_maximum == wg_lib.HIDDEN, 0.0, new_maximum)
        rescale = jnp.exp2(maximum - shift)
        p = jnp.exp2(logits * self.scale2 - wg_lib.rows(shift, self.shape))
        return p, rescale, new_maximum, total * rescale + p.sum(axis=1)


def sequence_forward(
    call: Call,
    other: Part | None = None,
    *,
    with_rest: bool = False,
    tiles: ForwardTiles | None = None,
    programs: int | None = None,
    interpret: bool | None = None,
) -> Part:
    """softmax(scale * query key^T) value over the visible keys, merged with another part if one is given.

    Args:
        call: its sequence part, bfloat16 or float16, H 64, 128 or 256; keys and values that are hidden are finite.
        other: another part of the same softmax; where `with_rest`, with its rest.
        with_rest: also return what rounding took from out.
        tiles: overrides `tiles.choose_tiles`. programs: overrides the number of CTAs.
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
    query_blocks = pl.cdiv(shape.query_tokens, tiles.query_block)
    turns = shape.batch * query_blocks * shape.num_heads
    resident = wg_lib.multiprocessors() * (1 + tiles.paired)
    programs = min(turns, programs or (wg_lib.INTERPRETED_PROGRAMS if interpret else resident))
    variant = ForwardVariant(shape, tiles, scale, merge, with_rest, interpret, programs)
    if not _fits(variant):
        variant = dataclasses.replace(variant, query_buffers=1)
    check_shared("sequence forward", variant, _scratch(dataclasses.replace(variant, interpret=False)))
    if with_rest and merge and other.rest is None:
        raise ValueError("other.rest=None: expected an array, because with_rest=True and another part is given")
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
        grid=(programs,),
        grid_names=("program",),
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
