"""A decode step's attention of many rows on Hopper: from the raw projections to the softmax's output.

Equations: those of `token_attention`, for every row of a batch by itself; all rows have n places filled.

Grid: (B K P,), one warpgroup each: a row, a KV head with its G query heads, and a P-th of the filled places, in blocks
    of `BLOCK`. The last part also takes the depth slots, the entry and the token's own key and value. With one part the
    output is written at once; else a second kernel, of `token_attention`, merges a head's parts.
Blocks (TMA boxes): key and value [BLOCK places, H] of [B, K, C, H], 8 KB each, as they lie.
Loop order: the first blocks are on their way before queries are computed and slots are read; then block by block.
Resident: a ring of `STAGES` blocks in shared memory; a warp reads 4 rows of it at a time, 8 lanes a row, 16 bytes each:
    no two lanes meet in a bank. 55 KB and at most 128 registers a thread, so that four programs share a multiprocessor
    and nearly all of 64 rows and 8 KV heads run at a time.
Softmax: each of the 16 groups of 8 lanes has rows, a running maximum, a sum and outputs of its own, which meet once, at
    the end: nothing in the loop waits for another warp but the ring's next stage.
Writes in place: cache and slots are references; a program writes the token's own row of its head, and its slots, when
    it has read everything. Another part of the same head may have loaded that row meanwhile: it hides it.
Arithmetic: float32 on CUDA cores, exponentials to base 2; query and key are rounded where the model rounds them.
Bytes: 2 B K n H 2 of the cache, read once and only as far as it is filled, to the next block; slots alike.
FLOPs: 4 G a key and channel. Bound: memory; B = 64, n = 2112, K = 8, H = 64: 277 MB, 67 us at 4.13 TB/s.
Benchmark: python -m benchmarks.decode --layouts=packed,fused --batches=64.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import matvec
from pallas_kernels.mosaic_gpu import token_attention as one_row
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib
from pallas_kernels.mosaic_gpu.token_attention import HALF, HEAD_DIM, LOWEST, Given, Token, store

BLOCK = 64
STAGES = 3
ROWS = 16  # of a block at a time
SLOT_ROWS = 32  # slots at a time
PROGRAMS_OF_MULTIPROCESSOR = 4
REDUCTION_BYTES = 4 * 32 * one_row.LANE_COLUMNS * 4
FULL = 0.9  # of all turns of the programs: fewer parts will not do
MOST_PARTS = one_row.MOST_PARTS

LAYOUT = plgpu.Layout.TILED(
    fragmented_array.Tiling(((ROWS, HEAD_DIM), (ROWS // 4, HEAD_DIM), (8,))), (-5,), (-3, -2), -1
)
OF_COLUMNS = LAYOUT.reduce(0)
OF_ROWS = LAYOUT.reduce(1)


def check_supported(
    *, dtype: jnp.dtype, rows: int, num_heads: int, num_kv_heads: int, head_dim: int, capacity: int
) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a step: any number of rows, else as
    `token_attention.check_supported`, where the arguments are."""
    del rows
    one_row.check_supported(
        dtype=dtype, rows=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, capacity=capacity
    )


def slots_shape(rows: int, slots: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """[B, K, S, H] of the buffers for so many slots."""
    return rows, num_kv_heads, -(-slots // SLOT_ROWS) * SLOT_ROWS, head_dim


def num_parts(programs: int, capacity: int, multiprocessors: int) -> int:
    """P for B K programs without parts: the fewest with which the multiprocessors are nearly always full, or as many as
    leave two blocks to each."""
    at_once = PROGRAMS_OF_MULTIPROCESSOR * multiprocessors
    most = min(MOST_PARTS, max(1, capacity // (2 * BLOCK)))
    for parts in range(1, most + 1):
        turns = programs * parts / at_once
        if turns / -(-programs * parts // at_once) >= FULL:
            return parts
    return most


def scratch(dtype: jnp.dtype, group: int, has_entry: bool) -> dict[str, Any]:
    """Shared memory and barriers of a program with G query heads: the ring; rows for the heads' queries at first and
    for a head's 16 streams at the end, and behind them the new keys and values. Four programs fit, see the tests: an
    array more, of whatever size, and it would be three."""
    rows = max(ROWS, group) + 2 * (1 + has_entry)
    return {
        "ring": plgpu.SMEM((STAGES, 2, BLOCK, HEAD_DIM), dtype), "vectors": plgpu.SMEM((rows, HEAD_DIM), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    }  # fmt: skip


# Jitted, so that the layers of an unrolled model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames=("epsilon", "parts", "interpret"))
@in_default_modes
def token_attention(
    token: Token,
    cache: tuple[jax.Array, jax.Array],
    slots: tuple[jax.Array, jax.Array] | None,
    length: jax.Array,
    filled: jax.Array,
    *,
    epsilon: float,
    parts: int | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    """See the equations.

    Args:
        token: as `token_attention` takes it, but raw [B, (N + 2K) H] and entry [B, >= 2 K H], of which the last
            2 K H outputs are the entry; all rows share the rotation.
        cache: key and value [B, K, C, H], the places from n on finite; written in place if the caller gives them away.
        slots: depth key and value [B, K, S, H], S as `slots_shape` says, the unfilled ones finite; None: the model has
            none. In place, too.
        length: int32 scalar, n.
        filled: int32 scalar, slots that are filled.
        epsilon: of the norms.
        parts: P; None: as `num_parts` says.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        [B, N H] in the operands' dtype; the cache, and the slots.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    batch, num_kv_heads, capacity, head_dim = cache[0].shape
    num_heads = token.query_norm.size // head_dim
    check_supported(
        dtype=token.raw.dtype, rows=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        capacity=capacity,
    )  # fmt: skip
    interpret = wg_lib.default_interpret() if interpret is None else interpret
    parts = parts or num_parts(batch * num_kv_heads, capacity, wg_lib.multiprocessors())
    group, dtype = num_heads // num_kv_heads, token.raw.dtype
    held = max(ROWS, group)
    params = {
        "approx_math": True, "lowering_semantics": plgpu.LoweringSemantics.Lane,
        "reduction_scratch_bytes": REDUCTION_BYTES,
        "unsafe_no_auto_barriers": True,  # what is read after it was written in shared memory has a barrier
    }  # fmt: skip
    options = {
        "compiler_params": plgpu.CompilerParams(**params), "interpret": wg_lib.interpret_params(interpret)
    }  # fmt: skip
    has_entry, has_slots = token.entry is not None, slots is not None
    references = [jax.new_ref(x) for x in (*cache, *(slots or ()))]
    operands = [
        token.raw.reshape(batch, -1, matvec.BLOCK), token.raw.reshape(batch, -1, 2, HALF),
        token.query_norm.reshape(-1, 2, HALF), token.key_norm.reshape(-1, 2, HALF), *token.rotation,
    ]  # fmt: skip
    if has_entry:
        behind = token.entry.shape[1] - 2 * num_kv_heads * head_dim  # outputs before the entry's
        if behind % matvec.BLOCK:  # it is read in such blocks
            token, behind = token._replace(entry=token.entry[:, behind:]), 0
        operands += [token.entry.reshape(batch, -1, matvec.BLOCK), token.entry.reshape(batch, -1, 2, HALF)]
        operands += [token.entry_norm.reshape(-1, 2, HALF)]
    counts = (length.reshape(1), filled.reshape(1))
    size = dict(N=num_heads, K=num_kv_heads, parts=parts, epsilon=epsilon, dtype=dtype)

    def body(*refs):
        *refs, ring, vectors, loaded = refs
        streams_ref, new_ref = vectors.at[pl.ds(0, ROWS)], vectors.at[pl.ds(held, 2 * (1 + has_entry))]
        raw_blocks, raw, query_norm, key_norm, cos, sin, *refs = refs
        entry = [None] * 3
        if has_entry:
            *entry, refs = *refs[:3], refs[3:]
        cache_refs, refs = refs[:2], refs[2:]
        slot_refs, refs = (refs[:2], refs[2:]) if has_slots else (None, refs)
        length_ref, filled_ref, *out_refs = refs
        row_head, part = wg_lib.divided(lax.axis_index("program"), parts)
        row, head = wg_lib.divided(row_head, num_kv_heads)
        if has_entry:
            of_key = pl.ds(behind // matvec.BLOCK, num_kv_heads * head_dim // matvec.BLOCK)
            of_both = pl.ds(behind // head_dim, 2 * num_kv_heads)
            entry = [entry[0].at[row, of_key], entry[1].at[row, of_both], entry[2]]
        given = Given(raw_blocks.at[row], raw.at[row], query_norm, key_norm, cos, sin, *entry, **size)
        place, count = length_ref[0], filled_ref[0]
        last = part == parts - 1
        blocks = lax.div(place + (BLOCK - 1), jnp.int32(BLOCK))
        first = lax.div(blocks * part, jnp.int32(parts))
        blocks = lax.div(blocks * (part + 1), jnp.int32(parts)) - first

        def load(number):
            stage = lax.rem(number, jnp.int32(STAGES))
            places = pl.ds((first + number) * BLOCK, BLOCK)
            for i, ref in enumerate(cache_refs):
                plgpu.copy_gmem_to_smem(ref.at[row, head, places], ring.at[stage, i], loaded.at[stage])

        for number in range(STAGES):
            pl.when(number < blocks)(functools.partial(load, jnp.int32(number)))
        # All that is computed from the projections comes first, behind the loads. What the end needs of it waits in
        # shared memory: there the reads would have nothing to hide behind.
        new = [given.own(head)]
        if has_entry:
            new.insert(0, given.entry(head))
        for i, one in enumerate(new):
            for j, halves in enumerate(one):
                _store_row(new_ref.at[2 * i + j], halves, jnp.float32)
        own_logits = []
        for g, query in enumerate(given.queries(head)):
            _store_row(vectors.at[g], query, jnp.float32)
            logits = [jnp.sum(key[0] * query[0] + key[1] * query[1]) for key, _ in new]
            own_logits.append([jnp.where(last, logit, -jnp.inf) for logit in logits])
        plgpu.commit_smem()
        queries = [plgpu.load(vectors.at[g], layout=OF_COLUMNS, optimized=False) for g in range(group)]
        streams = [_Stream.empty() for _ in range(group)]
        if has_slots:

            def slot_loop(i, streams):
                tiles = [
                    [
                        _wide(ref.at[row, head, pl.ds(i * SLOT_ROWS + begin, ROWS)])
                        for begin in range(0, SLOT_ROWS, ROWS)
                    ]
                    for ref in slot_refs
                ]
                return _seen(streams, queries, *tiles, count - i * SLOT_ROWS)

            turns = jnp.where(last, lax.div(count + (SLOT_ROWS - 1), jnp.int32(SLOT_ROWS)), 0)
            streams = lax.fori_loop(0, turns, slot_loop, streams)

        def block_loop(number, streams):
            stage = lax.rem(number, jnp.int32(STAGES))
            plgpu.commit_smem()  # every warp has left the stage that is loaded next
            refill = number + (STAGES - 1)
            pl.when(jnp.logical_and(number > 0, refill < blocks))(functools.partial(load, refill))
            plgpu.barrier_wait(loaded.at[stage])
            tiles = [
                [_wide(ring.at[stage, i, pl.ds(begin, ROWS)]) for begin in range(0, BLOCK, ROWS)] for i in range(2)
            ]
            return _seen(streams, queries, *tiles, place - (first + number) * BLOCK)

        streams = lax.fori_loop(0, blocks, block_loop, streams)
        new = [[_halves(new_ref.at[2 * i + j]) for j in range(2)] for i in range(len(new))]
        values = [value for _, value in new]
        for g, (stream, logits) in enumerate(zip(streams, own_logits, strict=True)):
            out, lse = _finish(stream, logits, values, streams_ref)
            n = row * num_heads + head * group + g
            if parts == 1:
                store(out_refs[0], (n,), out, dtype)
            else:
                store(out_refs[0], (n, part), out, jnp.float32)
                out_refs[1][n, part] = out[0] * 0.0 + lse

        @pl.when(last)
        def _write():
            for ref, halves in zip(cache_refs, new[-1], strict=True):
                _store_row(ref.at[row, head, place], halves, dtype)
            for i, one in enumerate(new if has_slots else ()):
                for ref, halves in zip(slot_refs, one, strict=True):
                    _store_row(ref.at[row, head, count + i], halves, dtype)

    heads = batch * num_heads
    padded = -(-parts // one_row.ROWS) * one_row.ROWS
    whole = jax.ShapeDtypeStruct((heads, 2, HALF), dtype)
    in_parts = (
        jax.ShapeDtypeStruct((heads, padded, 2, HALF), jnp.float32),
        jax.ShapeDtypeStruct((heads, padded, HALF), jnp.float32),
    )
    found = plgpu.kernel(
        body,
        out_type=(whole,) if parts == 1 else in_parts,
        grid=(batch * num_kv_heads * parts,),
        grid_names=("program",),
        scratch_types=list(scratch(dtype, group, has_entry).values()),
        kernel_name=f"moda_token_rows_B{batch}_N{num_heads}_K{num_kv_heads}_P{parts}",
        **options,
    )(*operands, *references, *counts)
    if parts > 1:
        found = plgpu.kernel(
            functools.partial(one_row.merge, parts),
            out_type=(whole,),
            grid=(heads,),
            grid_names=("head",),
            kernel_name=f"moda_token_rows_merge_B{batch}_N{num_heads}_P{parts}",
            **options,
        )(*found)
    arrays = [jax.freeze(ref) for ref in references]
    return found[0].reshape(batch, -1), tuple(arrays[:2]), tuple(arrays[2:]) or None


@jax.tree_util.register_pytree_node_class
class _Stream:
    """The 16 softmaxes of a query head, of rows 16 apart: maximum and sum [16], outputs [16, H], not divided yet."""

    def __init__(self, peak, total, out) -> None:
        self.peak, self.total, self.out = peak, total, out

    @classmethod
    def empty(cls) -> _Stream:
        vector = functools.partial(wg_lib.full, (ROWS,), layout=OF_ROWS)
        return cls(vector(LOWEST), vector(0.0), wg_lib.full((ROWS, HEAD_DIM), 0.0, LAYOUT))

    def tree_flatten(self):
        return (self.peak, self.total, self.out), None

    @classmethod
    def tree_unflatten(cls, _, leaves) -> _Stream:
        return cls(*leaves)


def _seen(streams: list[_Stream], queries: list, keys: list, values: list, count) -> list[_Stream]:
    """The streams with tiles [16, H] of keys and values, whose rows below `count` are seen."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_ROWS)
    found = []
    for stream, query in zip(streams, queries, strict=True):
        wide = _spread(query, 1)
        logits = [
            jnp.where(row < count - i * ROWS, jnp.sum(wide * key, axis=1), -jnp.inf) for i, key in enumerate(keys)
        ]
        peak = functools.reduce(jnp.maximum, logits, stream.peak)
        scale = jnp.exp2(stream.peak - peak)
        total, out = stream.total * scale, stream.out * _spread(scale, 0)
        for logit, value in zip(logits, values, strict=True):
            weight = jnp.exp2(logit - peak)
            total, out = total + weight, out + _spread(weight, 0) * value
        found.append(_Stream(peak, total, out))
    return found


def _finish(stream: _Stream, logits: list, values: list, streams_ref) -> tuple[list, jax.Array]:
    """What a head's streams and the new entries, by logit and value, come to: halves of the output, and the base-2
    log-sum-exp."""
    peak = functools.reduce(jnp.maximum, logits, jnp.max(stream.peak, axis=0))
    scale = jnp.exp2(stream.peak - peak)
    total = jnp.sum(stream.total * scale, axis=0)
    plgpu.commit_smem()  # the head before has been read
    streams_ref[...] = stream.out * _spread(scale, 0)
    plgpu.commit_smem()
    halves = [streams_ref.at[:, pl.ds(i * HALF, HALF)] for i in range(2)]
    out = [jnp.sum(plgpu.load(ref, layout=one_row.LAYOUT, optimized=False), axis=0) for ref in halves]
    for logit, value in zip(logits, values, strict=True):
        weight = jnp.exp2(logit - peak)
        total += weight
        out = [o + weight * half for o, half in zip(out, value, strict=True)]
    inverse = 1.0 / jnp.maximum(total, 1e-30)
    return [half * inverse for half in out], peak + jnp.log2(total)


def _wide(ref) -> jax.Array:
    return plgpu.load(ref, layout=LAYOUT, optimized=False).astype(jnp.float32)


def _halves(ref) -> list:
    """A row of shared memory as `token_attention` has it."""
    halves = [ref.at[pl.ds(i * HALF, HALF)] for i in range(2)]
    return [plgpu.load(half, layout=one_row.OF_COLUMNS, optimized=False).astype(jnp.float32) for half in halves]


def _store_row(ref, halves: list, dtype) -> None:
    for i, half in enumerate(halves):
        ref[pl.ds(i * HALF, HALF)] = half.astype(dtype)


def _spread(vector, dimension: int):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (ROWS, HEAD_DIM), (dimension,)), LAYOUT)
