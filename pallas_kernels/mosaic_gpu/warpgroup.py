"""What the kernels of this package share: accumulators, layouts, and the few lines that differ under the interpreter.

The Pallas GPU interpreter (CPU) takes neither preset `wgmma` accumulators nor an A operand in registers. Kernels
therefore go through `accumulate` and `wgmma_registers`; nothing else in a kernel's body knows that it is interpreted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# A masked logit, and the running maximum of a row that saw no key yet: no finite logit can be taken for either. What a
# row subtracts from its logits is always finite, so that no difference of two is NaN.
HIDDEN = float("-inf")
LOWEST = float(np.finfo(np.float32).min)

TILE = plgpu.Layout.WGMMA  # [64 * n, columns] over the 128 threads of a warpgroup
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of TILE
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value per column of TILE


H200_MULTIPROCESSORS = 132
INTERPRETED_PROGRAMS = 2  # of a persistent kernel under the interpreter, which runs every warp in Python


@functools.cache
def multiprocessors() -> int:
    """Of the default GPU; an H200's when there is none (lowering and interpreting)."""
    if jax.default_backend() != "gpu":
        return H200_MULTIPROCESSORS
    return jax.devices()[0].core_count


def default_interpret() -> bool:
    """True where there is no GPU to run on: the kernel is then interpreted on the CPU."""
    return jax.default_backend() != "gpu"


def interpret_params(interpret: bool) -> Any:
    """`interpret=` argument of `plgpu.kernel`."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None


def compiler_params() -> plgpu.CompilerParams:
    """Explicit layouts and hardware exp2; barriers between a warpgroup's own SMEM accesses are written by hand."""
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=6144,
    )


def tiled_smem(shape: Sequence[int], dtype: Any, *, boxed: bool = False) -> Any:
    """SMEM in the layout that both TMA and `wgmma` want: rows of 128 bytes, swizzled.

    boxed: also as TMA fills it with one box of whole rows, for arrays of any number of rows, where tiles of 8 rows have
    to be whole. Where rows are of 128 bytes that is the same memory, byte for byte; `named` gives both.
    """
    swizzle = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)
    tiled = plgpu.SMEM(tuple(shape), dtype, transforms=transforms)
    if not boxed:
        return tiled
    return plgpu.RefUnion(tiled, plgpu.SMEM(tuple(shape), dtype, transforms=transforms[1:]))


def takes_boxes(dtype: Any, head_dim: int, *tokens: int) -> bool:
    """Whether arrays [B, T, heads, H] of such T are to be copied as `boxed` memory: TMA's tiled boxes would need T
    rounded up to 8, and that a copy of the array. (T < 8 is one short tile.)"""
    return head_dim * jnp.dtype(dtype).itemsize == 128 and any(t % 8 for t in tokens)


def shared_bytes(scratch: dict[str, Any]) -> int:
    """Bytes of shared memory that a kernel's scratch types ask for: arrays from multiples of 1024, and barriers."""
    total = 0
    for entry in scratch.values():
        if isinstance(entry, plgpu.Barrier):
            total += 8 * math.prod(entry.num_barriers)
        elif entry is not None:
            total += -(-math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize // 1024) * 1024
    return total


def positive_scale(query: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """The same logits with a scale above zero: the running maximum is taken before scaling."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (jnp.zeros_like(query), 1.0)


def pad_tokens(x: jax.Array) -> jax.Array:
    """[B, T, heads, H] -> T rounded up to 8 rows: TMA's tiled boxes need it. Other ragged ends are clipped by TMA."""
    missing = -x.shape[1] % 8
    return x if not missing else jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))


def full(shape: Sequence[int], value: float, layout: Any) -> jax.Array:
    """A float32 constant held in registers."""
    return plgpu.layout_cast(jnp.full(tuple(shape), value, jnp.float32), layout)


def rows(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """[M] -> [M, columns]."""
    return lax.broadcast_in_dim(x, tuple(shape), [0])


def columns(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """[columns] -> [M, columns]."""
    return lax.broadcast_in_dim(x, tuple(shape), [1])


def divided(x: Any, divisor: int) -> tuple[Any, Any]:
    """(quotient, remainder) of an int32 that is not negative."""
    quotient = lax.div(x, jnp.int32(divisor))
    return quotient, x - quotient * divisor


def hide_unseen(
    logits: jax.Array, spec: Any, keys: Any, diagonal: Any, row_values: list, column_values: list, *, interpret: bool
) -> jax.Array:
    """logits [64 queries, keys of a block], float32 of layout TILE, with HIDDEN where a key is not visible.

    Args:
        spec: what of the mask is compiled in.
        keys: of the block, and behind it, that exist, int32. diagonal: causal: the last of them that the first query
            sees, int32.
        row_values, column_values: of explicit masks: the queries' and the keys' channels, int32 [64] and [keys].
    """
    row = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=ROW)
    last = row * 0 + (keys - 1)
    if spec.causal and not spec.positions:
        last = jnp.minimum(last, row + diagonal)
    logits = hide_behind(logits, last, interpret=interpret)
    channel = 0
    if spec.positions:
        visible = columns(column_values[0], logits.shape) <= rows(row_values[0], logits.shape)
        logits, channel = jnp.where(visible, logits, HIDDEN), 1
    if spec.segments:
        visible = columns(column_values[channel], logits.shape) == rows(row_values[channel], logits.shape)
        logits = jnp.where(visible, logits, HIDDEN)
    return logits


def hide_behind(x: jax.Array, last: jax.Array, *, interpret: bool) -> jax.Array:
    """x [64, columns] of layout TILE with HIDDEN in each row's columns behind `last`, int32 [64] of layout ROW.

    Two numbers a thread, one for each of its rows, are compared with constants. A comparison of column numbers would be
    the same; but the compiler takes those, one for each element, out of the loop over blocks, has no registers for them
    and reads them again and again from memory.
    """
    if interpret:
        column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=TILE)
        return jnp.where(column <= rows(last, x.shape), x, HIDDEN)

    @plgpu.inline_mgpu(arg_types=(TILE, ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TILE))
    def hide(ctx, x, last):
        del ctx
        return hide_registers(x, last)

    return hide(x, last)


def hide_registers(x: Any, last: Any) -> Any:
    """`hide_behind` on the registers of a thread: what runs on the chip."""
    i32 = ir.IntegerType.get_signless(32)
    hidden = arith.constant(x.mlir_dtype, ir.FloatAttr.get(x.mlir_dtype, HIDDEN))

    def integer(number):
        return arith.constant(i32, ir.IntegerAttr.get(i32, number))

    # Columns of a thread: 8 j + 2 (thread % 4) + 0 or 1; its rows: thread / 4, and 8 further.
    first = arith.muli(arith.andi(mgpu_utils.thread_idx(), integer(3)), integer(2))
    ends = [arith.subi(_only(last.registers[0, 0, half, 0, 0]), first) for half in range(2)]
    registers = np.empty_like(x.registers)
    for index, register in np.ndenumerate(x.registers):
        for i in range(2):
            place = ir.DenseI64ArrayAttr.get([i])
            value = vector.extract(register, dynamic_position=[], static_position=place)
            seen = arith.cmpi(arith.CmpIPredicate.sge, ends[index[4]], integer(8 * index[1] + i))
            value = arith.select(seen, value, hidden)
            register = vector.insert(value, register, dynamic_position=[], static_position=place)
        registers[index] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def keep_before(x: jax.Array, place: Any, layout: Any = TILE, *, interpret: bool) -> None:
    """Keeps the computation of x, float32, before the next wait for `wgmma`.

    A number that depends on all of x is stored to `place`, int32 [128] in shared memory, where nobody reads it. Without
    that ptxas moves the wait up, before everything that does not need it, and nothing runs beside the products that are
    waited for. (Seen in the machine code: MUFU.EX2 behind the last WARPGROUP.DEPBAR. A branch instead of a store makes
    it wait for every single product.)
    """
    if interpret:
        return

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(ctx, x, place):  # a store of Pallas' own would bring two barriers of the warpgroup
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        (size,) = ir.VectorType(x.registers.flat[0].type).shape
        words = [vector.bitcast(ir.VectorType.get((size,), i32), register) for register in x.registers.flat]
        word = functools.reduce(arith.xori, words)
        numbers = [
            vector.extract(word, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
            for i in range(size)
        ]
        thread = arith.andi(mgpu_utils.thread_idx(), arith.constant(i32, ir.IntegerAttr.get(i32, 127)))
        number = functools.reduce(arith.xori, numbers)
        memref.store(number, place, [arith.index_cast(ir.IndexType.get(), thread)])

    store(x, place)


def _only(register: Any) -> Any:
    """The number of a register that holds one."""
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


class Turns:
    """Work items that persistent CTAs share out among each other: one each in every turn, every other turn backwards.

    Where the items go from the longest to the shortest the sums then differ by little, and nobody has to count what is
    taken. With B = 8, T = 4096, N = 16 (causal) the last CTA is 2 % behind their mean, 3 % if all turns go forwards.
    """

    def __init__(self, program: Any, programs: int, items: int) -> None:
        self.program, self.programs = program, programs
        whole, left_over = divmod(items, programs)
        place = self._place(whole)
        self.count = whole + (place < left_over).astype(jnp.int32)

    def _place(self, turn: Any) -> Any:
        backwards = turn % 2 == 1 if isinstance(turn, int) else lax.rem(turn, jnp.int32(2)) == 1
        return jnp.where(backwards, self.programs - 1 - self.program, self.program)

    def item(self, turn: Any) -> Any:
        """The number of this CTA's item in a turn below `count`."""
        return turn * self.programs + self._place(turn)


class BlockRange(NamedTuple):
    """The blocks [first, end) that a warpgroup walks, of which [full_start, full_end) need no mask.

    `masked_head`, `masked_tail`: whether there can be masked blocks before and behind the full ones; the loops that
    cannot run are not compiled.
    """

    first: Any
    full_start: Any
    full_end: Any
    end: Any
    masked_head: bool
    masked_tail: bool


def walk_blocks(blocks: BlockRange, step: Callable[[Any, Any, bool], Any], carry: Any) -> Any:
    """Runs `carry = step(block, carry, masked)` over a range of blocks."""
    start, full_start, full_end, end, masked_head, masked_tail = blocks
    full_start = jnp.clip(full_start, start, end) if masked_head else start
    full_end = jnp.clip(full_end, full_start, end) if masked_tail else end
    if masked_head:
        carry = lax.fori_loop(start, full_start, lambda i, c: step(i, c, True), carry)
    carry = lax.fori_loop(full_start, full_end, lambda i, c: step(i, c, False), carry)
    if masked_tail:
        carry = lax.fori_loop(full_end, end, lambda i, c: step(i, c, True), carry)
    return carry


class Images:
    """The rows of the batch that a CTA takes one after the other: [first, first + count).

    With one there is no loop, and what is each warpgroup's own has one buffer; with more it has two.

    Args:
        most: of a CTA; the grid's axis "batch" has one step for so many.
        batch: of all.
    """

    def __init__(self, most: int, batch: int) -> None:
        self.most = most
        self.first = lax.axis_index("batch") * most
        self.count = 1 if most == 1 else jnp.minimum(jnp.int32(most), batch - self.first)

    def of(self, step: Any, steps: Any) -> Any:
        """The image (from 0) of a step of the CTA, with so many steps for each."""
        return 0 if self.most == 1 else lax.div(step, steps)

    def within(self, step: Any, steps: Any) -> Any:
        """The step of its image."""
        return step if self.most == 1 else lax.rem(step, steps)

    def buffer(self, warpgroup: Any, image: Any) -> Any:
        """Of what is a warpgroup's own."""
        return warpgroup if self.most == 1 else 2 * warpgroup + lax.rem(image, jnp.int32(2))

    def walk(self, load: Callable[[Any], None], compute: Callable[[Any], None]) -> None:
        """A warpgroup's work: `load` of the next image is issued before `compute` of one, which stores through the
        buffer that the one after the next will be loaded to."""
        load(0)
        if self.most == 1:
            compute(0)
            return

        @pl.loop(0, self.count)
        def _image(image):
            plgpu.wait_smem_to_gmem(0)

            @pl.when(image + 1 < self.count)
            def _next():
                load(image + 1)

            compute(image)


def produce(fetch: Callable[..., None], total: Any, stages: int, consumed: Callable[[Any], None]) -> None:
    """A producer's work: fetch(step, wait) for all its steps, and to observe every phase of a barrier before it goes,
    as the interpreter insists."""
    warm = jnp.minimum(jnp.int32(stages), total)
    pl.loop(0, warm)(lambda step: fetch(step, wait=False))
    pl.loop(warm, total)(lambda step: fetch(step, wait=True))
    drain = jnp.maximum(total - stages, 0)
    pl.loop(drain, total)(lambda step: consumed(lax.rem(step, jnp.int32(stages))))


def accumulate(
    body: Callable[..., Any],
    accumulators: Sequence[jax.Array | tuple[int, int]],
    carry: Any = (),
    *,
    interpret: bool,
) -> tuple[list[jax.Array], Any]:
    """Runs `body(*accumulator_refs) -> new_carry` and waits for its `wgmma`s.

    Args:
        body: issues `wgmma` on the references it is given; returns the new carry (values, same structure as `carry`).
        accumulators: float32 values to start from, or a shape, which starts from zero.
        carry: values that `body` replaces (it reads the old ones from its own closure).
        interpret: whether the kernel is interpreted; presets are then added after the fact.

    Returns:
        (final accumulator values, new carry)
    """
    leaves, tree = jax.tree.flatten(carry)
    zero = [isinstance(a, tuple) for a in accumulators]
    if interpret:

        def scoped(*refs):
            new = body(*refs)
            return [r[...] if z else r[...] + a for r, z, a in zip(refs, zero, accumulators, strict=True)], new

        shapes = [a if z else a.shape for a, z in zip(accumulators, zero, strict=True)]
        return pl.run_scoped(scoped, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])

    def stateful(refs):
        accumulator_refs, carry_refs = refs
        new_leaves, new_tree = jax.tree.flatten(body(*accumulator_refs))
        if new_tree != tree:
            raise ValueError(f"carry came back as {new_tree}, expected {tree}")
        for ref, value in zip(carry_refs, new_leaves, strict=True):
            ref[...] = value

    presets = [full(a, 0.0, TILE) if z else a for a, z in zip(accumulators, zero, strict=True)]
    values, out = pl.run_state(stateful)(([plgpu.ACC.init(a) for a in presets], list(leaves)))
    return list(values), jax.tree.unflatten(tree, out)


def wgmma_registers(accumulator: Any, a: jax.Array, b: Any, stage: Any) -> None:
    """`accumulator += a @ b` with A in registers, or through the SMEM `stage`, which is there when interpreting.

    The product reads the registers of A until it is waited for. LLVM takes them for free right after the instruction,
    and may give them to the next A of a loop: compute that one from values that passed `lax.optimization_barrier` after
    the wait, and not before. That ptxas spills none of the registers that a running `wgmma` reads is an assumption; the
    values that the tests find on the chip support it.
    """
    if stage is None:
        plgpu.wgmma(accumulator, a, b)
        return
    stage[...] = a
    plgpu.commit_smem()
    plgpu.wgmma(accumulator, stage, b)


def load_after(accumulator: Any, outstanding: int) -> jax.Array:
    """Accumulator value once at most `outstanding` later `wgmma` groups are in flight.

    The optimization barrier keeps the compiler from moving reads of the registers above the wait.
    """
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=outstanding))


def split_backward_refs(refs: Sequence[Any], spec: Any, outputs: int) -> tuple[Any, ...]:
    """(5 arrays, key length, (query rows, key rows, bounds), outputs), in `sequence_backward`'s order."""
    refs = list(refs)
    fixed, outs = refs[:5], refs[len(refs) - outputs :]
    rest = refs[5 : len(refs) - outputs]
    limit_ref = rest.pop(0) if spec.limit else None
    explicit = rest if spec.explicit else [None, None, None]
    return fixed, limit_ref, explicit, outs


def named(scratch: dict[str, Any]) -> Any:
    """Scratch references as attributes; each also as NAME_box, which is what TMA copies to and from."""
    both = {}
    for name, ref in scratch.items():
        is_boxed = isinstance(ref, jax.core.Tracer) and hasattr(jax.typeof(ref), "refs")  # a RefUnion
        both[name], both[f"{name}_box"] = ref if is_boxed else (ref, ref)
    return type("Scratch", (), both)
