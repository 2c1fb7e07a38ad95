"""A decode step's attention of one row on Hopper: from the raw projections to the softmax's output, in two kernels.

Equations (one token at place n of the cache; KV head k, its G query heads g; one softmax over all keys):
    query = rotate(norm(raw query)), key = rotate(norm(raw key)), each norm over all heads of its projection together
    out[g] = softmax(scale * query[g] . keys[k]) @ values[k];   of the cache's places [0, n), the depth slots that are
    filled, the entry of the layer before, if there is one, and the token's own key and value
    cache[n] = the token's own;   slots[filled:] = the entry, the token's own

Grid of the first kernel: (K * (P + 1),), one warpgroup each: P parts of the cache of `PART` places, and the token's own
    slots. A program computes its heads' queries itself. Each part is normalised by itself.
Grid of the second: (N,): a head's parts are merged.
Blocks: a key or value row of H channels as two halves of 32, since rotary pairs stand 32 apart: 8 lanes hold a half, a
    warp 4 rows, a program 16 rows at a time; all rows of a part are loaded at once, before anything is computed.
Writes in place: cache and slots are references. The program whose part has place n writes it; others do not read it,
    and that one hides it. Slots are written by the program of their head that alone reads them.
Arithmetic: float32 on CUDA cores, exponentials to base 2; query and key are rounded where the model rounds them.
Bytes: 2 K n H 2 of the cache; the rest is small. Bound: memory; n = 2048, K = 8, H = 64: 4.2 MB, 1 us at 4.2 TB/s.
Benchmark: python -m benchmarks.decode --layouts=packed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import matvec
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib

DTYPES = ("bfloat16", "float16")
HEAD_DIM = 64
HALF = HEAD_DIM // 2
LANE_COLUMNS = 4  # of a half; sums over warps take no more float32 numbers of a lane
ROWS = 4 * 32 * LANE_COLUMNS // HALF  # of a program at a time
PART = 128
MOST_PARTS = 255  # all parts of a head are merged at once: 16 rows of a lane
LOWEST = wg_lib.LOWEST

LAYOUT = plgpu.Layout.TILED(
    fragmented_array.Tiling(((ROWS, HALF), (ROWS // 4, HALF), (LANE_COLUMNS,))), (-5,), (-3, -2), -1
)
OF_COLUMNS = LAYOUT.reduce(0)
OF_ROWS = LAYOUT.reduce(1)


class Token(NamedTuple):
    """The operands of `token_attention` that are read.

    Attributes:
        raw: [(N + 2K) H]: query, key and value as projected.
        query_norm, key_norm: [N H] and [K H] float32, of the norms.
        rotation: cos and sin [H / 2] float32.
        entry: [2 K H]: key and value of an entry as projected; None: there is none.
        entry_norm: [K H] float32, of its key.
    """

    raw: jax.Array
    query_norm: jax.Array
    key_norm: jax.Array
    rotation: tuple[jax.Array, jax.Array]
    entry: jax.Array | None = None
    entry_norm: jax.Array | None = None


def check_supported(
    *, dtype: jnp.dtype, rows: int, num_heads: int, num_kv_heads: int, head_dim: int, capacity: int
) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a step.

    Args:
        dtype: of projections, cache and slots.
        rows: of the batch.
        num_heads, num_kv_heads, head_dim: N, K, H.
        capacity: places of the cache.
    """
    kind = jnp.dtype(dtype).name
    if kind not in DTYPES:
        raise NotImplementedError(f"token attention: dtype={kind}: expected {' or '.join(DTYPES)}")
    if rows != 1:
        raise NotImplementedError(f"token attention: {rows} rows: expected 1")
    if head_dim != HEAD_DIM:
        raise NotImplementedError(f"token attention: head_dim={head_dim}: expected {HEAD_DIM}")
    for name, heads in (("heads", num_heads), ("kv_heads", num_kv_heads)):
        if heads * head_dim % matvec.BLOCK:
            raise NotImplementedError(
                f"token attention: num_{name}={heads}: expected a multiple of {matvec.BLOCK // head_dim}"
            )
    if capacity % PART or capacity > PART * MOST_PARTS:
        raise NotImplementedError(
            f"token attention: a cache of {capacity} places: expected a multiple of {PART} up to {PART * MOST_PARTS}"
        )


def padded_slots(slots: int) -> int:
    """Slots that the buffers must have for so many."""
    return -(-slots // ROWS) * ROWS


def slots_shape(rows: int, slots: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """[S, K, H] of the buffers for so many slots of the one row."""
    del rows
    return padded_slots(slots), num_kv_heads, head_dim


# Jitted, so that the layers of an unrolled model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
@in_default_modes
def token_attention(
    token: Token,
    cache: tuple[jax.Array, jax.Array],
    slots: tuple[jax.Array, jax.Array] | None,
    length: jax.Array,
    filled: jax.Array,
    *,
    epsilon: float,
    interpret: bool | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    """See the equations.

    Args:
        token: bfloat16 or float16, scales float32.
        cache: key and value [K, C, H]; written in place if the caller gives them away.
        slots: depth key and value [S, K, H], S as `padded_slots` says, the unfilled ones finite; None: the model has
            none. In place, too.
        length: int32 scalar, n.
        filled: int32 scalar, slots that are filled; constant where it is known, which costs no launch.
        epsilon: of the norms.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        [N H] in the operands' dtype; the cache, and the slots.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    num_kv_heads, capacity, head_dim = cache[0].shape
    num_heads = token.query_norm.size // head_dim
    check_supported(
        dtype=token.raw.dtype, rows=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        capacity=capacity,
    )  # fmt: skip
    interpret = wg_lib.default_interpret() if interpret is None else interpret
    parts = capacity // PART
    dtype = token.raw.dtype
    options = {
        "compiler_params": plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=4 * 32 * LANE_COLUMNS * 4,
            unsafe_no_auto_barriers=True,  # sums over warps bring theirs; what is written is not read again
        ),
        "interpret": wg_lib.interpret_params(interpret),
    }
    references = [jax.new_ref(x.reshape(*x.shape[:-1], 2, HALF)) for x in (*cache, *(slots or ()))]
    has_entry, has_slots = token.entry is not None, slots is not None
    operands = [
        token.raw.reshape(-1, matvec.BLOCK), token.raw.reshape(-1, 2, HALF), token.query_norm.reshape(-1, 2, HALF),
        token.key_norm.reshape(-1, 2, HALF), *token.rotation,
    ]  # fmt: skip
    if has_entry:
        operands += [token.entry.reshape(-1, matvec.BLOCK), token.entry.reshape(-1, 2, HALF)]
        operands += [token.entry_norm.reshape(-1, 2, HALF)]
    counts = (length.reshape(1), filled.reshape(1))
    padded = -(-(parts + 1) // ROWS) * ROWS
    size = dict(N=num_heads, K=num_kv_heads, parts=parts, epsilon=epsilon, dtype=dtype)

    def body(*refs):
        refs = list(refs)
        given = Given(*refs[:6], *(refs[6:9] if has_entry else (None,) * 3), **size)
        refs = refs[9 if has_entry else 6 :]
        cache_refs, refs = refs[:2], refs[2:]
        slot_refs, refs = (refs[:2], refs[2:]) if has_slots else (None, refs)
        length_ref, filled_ref, out_ref, lse_ref = refs
        program = lax.axis_index("program")
        head = lax.div(program, jnp.int32(parts + 1))
        part = program - head * (parts + 1)
        first = part * PART

        @pl.when(part < parts)
        def _cache():
            key, value = (_load(ref, (head, pl.ds(first, PART))) for ref in cache_refs)
            place = length_ref[0]
            _attend(given, head, part, key, value, place - first, (), out_ref, lse_ref)

            @pl.when(lax.div(place, jnp.int32(PART)) == part)
            def _own():
                for ref, halves in zip(cache_refs, given.own(head), strict=True):
                    store(ref, (head, place), halves, dtype)

        @pl.when(part == parts)
        def _slots():
            rows = None
            if has_slots:
                rows = [_load(ref, (pl.ds(0, ref.shape[0]), head)) for ref in slot_refs]
            new = [given.own(head)]
            if has_entry:
                new.insert(0, given.entry(head))
            count = filled_ref[0]
            _attend(given, head, part, *(rows or (None, None)), count, new, out_ref, lse_ref)
            for i, entry in enumerate(new if has_slots else ()):
                for ref, halves in zip(slot_refs, entry, strict=True):
                    store(ref, (count + i, head), halves, dtype)

    shape = (num_heads, padded, 2, HALF)
    out, lse = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((*shape[:2], HALF), jnp.float32)),
        grid=(num_kv_heads * (parts + 1),),
        grid_names=("program",),
        kernel_name=f"moda_token_attention_N{num_heads}_K{num_kv_heads}_P{parts}",
        **options,
    )(*operands, *references, *counts)
    merged = plgpu.kernel(
        functools.partial(merge, parts + 1),
        out_type=jax.ShapeDtypeStruct((num_heads, 2, HALF), dtype),
        grid=(num_heads,),
        grid_names=("head",),
        kernel_name=f"moda_token_merge_N{num_heads}_P{parts}",
        **options,
    )(out, lse)
    arrays = [jax.freeze(ref) for ref in references]
    arrays = [array.reshape(*array.shape[:-2], head_dim) for array in arrays]
    return merged.reshape(-1), tuple(arrays[:2]), tuple(arrays[2:]) or None


Halves = list  # of a row, two vectors [32] float32; of rows, two [rows, 32]


class Given(NamedTuple):
    """What a program reads besides keys and values; vectors of a head as `Halves`, the same in every warp."""

    raw_blocks: Any
    raw: Any
    query_norm: Any
    key_norm: Any
    cos: Any
    sin: Any
    entry_blocks: Any
    entry_raw: Any
    entry_norm: Any
    N: int
    K: int
    parts: int
    epsilon: float
    dtype: Any

    def queries(self, head) -> list[Halves]:
        """Of the KV head's query heads, with the softmax's scale and base in them."""
        group, inverse = self.N // self.K, self._inverse(self.raw_blocks, 0, self.N)
        found = []
        for g in range(group):
            n = head * group + g
            query = self._placed(_vector(self.raw, n), _vector(self.query_norm, n), inverse)
            found.append([half * (HEAD_DIM**-0.5 * wg_lib.LOG2E) for half in query])
        return found

    def own(self, head) -> tuple[Halves, Halves]:
        """The token's own key and value."""
        inverse = self._inverse(self.raw_blocks, self.N, self.K)
        key = self._placed(_vector(self.raw, self.N + head), _vector(self.key_norm, head), inverse)
        return key, _vector(self.raw, self.N + self.K + head)

    def entry(self, head) -> tuple[Halves, Halves]:
        """The entry's."""
        inverse = self._inverse(self.entry_blocks, 0, self.K)
        key = self._placed(_vector(self.entry_raw, head), _vector(self.entry_norm, head), inverse)
        return key, _vector(self.entry_raw, self.K + head)

    def _inverse(self, blocks, first_head: int, heads: int):
        """1 / rms of so many heads together."""
        begin, count = (n * HEAD_DIM // matvec.BLOCK for n in (first_head, heads))
        x = [
            plgpu.load(blocks.at[begin + i], layout=matvec.OF_COLUMNS, optimized=False).astype(jnp.float32)
            for i in range(count)
        ]
        total = jnp.sum(functools.reduce(jnp.add, [a * a for a in x]))
        return lax.rsqrt(total / (heads * HEAD_DIM) + self.epsilon)

    def _placed(self, x: Halves, scale: Halves, inverse) -> Halves:
        """Normed, rotated and rounded."""
        first, second = (s * (a * inverse) for s, a in zip(scale, x, strict=True))
        cos, sin = (plgpu.load(ref, layout=OF_COLUMNS, optimized=False) for ref in (self.cos, self.sin))
        rotated = first * cos - second * sin, second * cos + first * sin
        return [half.astype(self.dtype).astype(jnp.float32) for half in rotated]


def _attend(given: Given, head, part, key, value, count, new, out_ref, lse_ref) -> None:
    """A part of the softmax: of rows below `count` of key and value, if there are any, and of new entries."""
    group = given.N // given.K
    for g, query in enumerate(given.queries(head)):
        n = head * group + g
        logits = [jnp.sum(key_new[0] * query[0] + key_new[1] * query[1]) for key_new, _ in new]
        peak = functools.reduce(jnp.maximum, logits, jnp.float32(LOWEST))
        if key is not None:
            rows = jnp.sum(_spread(query[0], key[0], 1) * key[0] + _spread(query[1], key[1], 1) * key[1], axis=1)
            seen = plgpu.broadcasted_iota(jnp.int32, rows.shape, 0, layout=OF_ROWS) < count
            rows = jnp.where(seen, rows, -jnp.inf)
            peak = jnp.maximum(peak, jnp.max(rows, axis=0))
            weights = jnp.exp2(rows - peak)
            total = jnp.sum(weights, axis=0)
            wide = _spread(weights, key[0], 0)
            out = [jnp.sum(wide * half, axis=0) for half in value]
        else:
            total, out = jnp.float32(0.0), [half * 0.0 for half in query]
        for logit, (_, value_new) in zip(logits, new, strict=True):
            weight = jnp.exp2(logit - peak)
            total += weight
            out = [o + weight * half for o, half in zip(out, value_new, strict=True)]
        inverse = 1.0 / jnp.maximum(total, 1e-30)
        store(out_ref, (n, part), [half * inverse for half in out], jnp.float32)
        lse_ref[n, part] = out[0] * 0.0 + (peak + jnp.log2(total))


def merge(parts: int, out_ref, lse_ref, merged_ref) -> None:
    """One head's parts as one."""
    head = lax.axis_index("head")
    lse = plgpu.load(lse_ref.at[head], layout=LAYOUT, optimized=False)  # [padded, 32], the same in all columns
    real = plgpu.broadcasted_iota(jnp.int32, lse.shape, 0, layout=LAYOUT) < parts
    lse = jnp.where(real, lse, -jnp.inf)
    peak = jnp.max(lse, axis=0)  # finite: the token sees itself
    weights = jnp.exp2(lse - _spread(peak, lse, 1))
    total = jnp.sum(weights, axis=0)
    for half in range(2):
        out = plgpu.load(out_ref.at[head, :, half], layout=LAYOUT, optimized=False)
        merged = jnp.sum(jnp.where(real, out, 0.0) * weights, axis=0) / total
        merged_ref[head, half] = merged.astype(merged_ref.dtype)


def _load(ref, index) -> Halves:
    """Rows of a [..., 2, 32] as two [rows, 32], float32."""
    halves = [plgpu.load(ref.at[(*index, half)], layout=LAYOUT, optimized=False) for half in range(2)]
    return [half.astype(jnp.float32) for half in halves]


def _vector(ref, row) -> Halves:
    halves = [plgpu.load(ref.at[row, half], layout=OF_COLUMNS, optimized=False) for half in range(2)]
    return [half.astype(jnp.float32) for half in halves]


def store(ref, index, halves: Halves, dtype) -> None:
    """To a row of a [..., 2, 32]."""
    for i, half in enumerate(halves):
        ref[(*index, i)] = half.astype(dtype)


def _spread(vector, like, dimension: int):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, like.shape, (dimension,)), LAYOUT)
