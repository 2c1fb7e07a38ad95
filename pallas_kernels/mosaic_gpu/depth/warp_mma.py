"""Warp-level matrix instructions for kernels whose tiles belong to one warp each.

`wgmma` multiplies 64 rows that 4 warps share; the depth kernels' tiles (one token and KV head: up to 16 query heads
against its slots) are smaller, independent of each other, and fit the warp-level `mma.m16n8k16` exactly when the
slots stand on the M side and the heads on the N side. Pallas has no per-warp view of that instruction, so the
functions here emit PTX from inside `plgpu.inline_mgpu`. They work on MLIR values of one thread: i32 (addresses,
packed pairs of 16-bit numbers) and f32.

Fragments, with r = lane // 4 and c = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
    A [16, 16]: four i32, the pairs (r, 2c), (r + 8, 2c), (r, 2c + 8), (r + 8, 2c + 8)
    B [16, 8]: two i32, the pairs (2c, r), (2c + 8, r), running down K
    C [16, 8]: four f32, (r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1)

Tiles lie in shared memory as TMA writes them with a 128-byte swizzle: rows of 128 bytes (64 elements), the 16-byte
chunk number exclusive-or'ed with the row number modulo 8; tiles start at multiples of 1024 bytes. Entries of 8 bits:
see `entry_tiles`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

Value = Any

ROW_BYTES = 128
COLUMNS = 64  # elements of a row


def i32() -> Any:
    """The type of a 32-bit integer."""
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    """The type of a 64-bit integer."""
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    """The type of a float32."""
    return ir.F32Type.get()


def integer(value: int) -> Value:
    """An i32 constant."""
    return arith.constant(i32(), value)


def real(value: float) -> Value:
    """An f32 constant."""
    return arith.constant(f32(), value)


def _as_value(x: Value | int) -> Value:
    return integer(x) if isinstance(x, int) else x


def add(x: Value, y: Value | int) -> Value:
    """x + y, i32."""
    return x if isinstance(y, int) and y == 0 else arith.addi(x, _as_value(y))


def subtract(x: Value, y: Value | int) -> Value:
    """x - y, i32."""
    return arith.subi(x, _as_value(y))


def multiply(x: Value, y: Value | int) -> Value:
    """x * y, i32."""
    return arith.muli(x, _as_value(y))


def bit_and(x: Value, y: Value | int) -> Value:
    """x & y."""
    return arith.andi(x, _as_value(y))


def bit_or(x: Value, y: Value) -> Value:
    """x | y."""
    return arith.ori(x, y)


def bit_xor(x: Value, y: Value | int) -> Value:
    """x ^ y."""
    return x if isinstance(y, int) and y == 0 else arith.xori(x, _as_value(y))


def shift_left(x: Value, bits: int) -> Value:
    """x << bits."""
    return arith.shli(x, integer(bits))


def shift_right(x: Value, bits: int) -> Value:
    """x >> bits, zeros coming in."""
    return arith.shrui(x, integer(bits))


def divide(x: Value, y: int) -> Value:
    """x // y for x >= 0."""
    return x if y == 1 else arith.divui(x, integer(y))


def remainder(x: Value, y: int) -> Value:
    """x % y for x >= 0."""
    return integer(0) if y == 1 else arith.remui(x, integer(y))


def less(x: Value, y: Value | int) -> Value:
    """x < y, signed."""
    return arith.cmpi(arith.CmpIPredicate.slt, x, _as_value(y))


def both(x: Value, y: Value) -> Value:
    """Logical and."""
    return arith.andi(x, y)


def select(condition: Value, x: Value, y: Value) -> Value:
    """x where the condition holds, else y."""
    return arith.select(condition, x, y)


def exp2(x: Value) -> Value:
    """2 ** x, approximately (2 ulp)."""
    return mgpu_utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=f32())


def log2(x: Value) -> Value:
    """Base-2 logarithm, approximately."""
    return mgpu_utils.inline_ptx("lg2.approx.ftz.f32 $0, $1;", x, result_types=f32())


def reciprocal(x: Value) -> Value:
    """1 / x, approximately."""
    return mgpu_utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", x, result_types=f32())


def maximum(x: Value, y: Value) -> Value:
    """The larger of two f32; the other one if one is NaN."""
    return mgpu_utils.inline_ptx("max.f32 $0, $1, $2;", x, y, result_types=f32())


def shuffle_xor(x: Value, distance: int) -> Value:
    """The f32 that the lane `lane ^ distance` holds."""
    return mgpu_utils.inline_ptx(
        f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;", x, result_types=f32(), convergent=True
    )


def reduce_rows(x: Value, combine: Any) -> Value:
    """Combines one f32 over the 8 lanes that hold the same columns of a C fragment."""
    for distance in (4, 8, 16):
        x = combine(x, shuffle_xor(x, distance))
    return x


def warp_barrier() -> None:
    """All lanes of the warp arrive; their shared-memory accesses are ordered."""
    mgpu_utils.warp_barrier()


def element(dtype: Any) -> str:
    """PTX name of a 16-bit float."""
    return {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]


def pack(low: Value, high: Value, dtype: Any) -> Value:
    """Two float32 rounded to `dtype`, as one i32."""
    return mgpu_utils.inline_ptx(f"cvt.rn.{element(dtype)}x2.f32 $0, $1, $2;", high, low, result_types=i32())


def unpack(pair: Value, dtype: Any) -> tuple[Value, Value]:
    """(low, high) float32 of a packed pair."""
    if element(dtype) == "bf16":
        low = shift_left(pair, 16)
        high = bit_and(pair, integer(-65536))
        return arith.bitcast(f32(), low), arith.bitcast(f32(), high)
    return mgpu_utils.inline_ptx(
        "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }",
        pair,
        result_types=(f32(), f32()),
    )


def mma_k16(c: Sequence[Value], a: Sequence[Value], b: Sequence[Value], dtype: Any) -> tuple[Value, ...]:
    """c + a @ b with A [16, 16], B [16, 8]."""
    t = element(dtype)
    return mgpu_utils.inline_ptx(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, "
        "{$10, $11, $12, $13};",
        *a,
        *b,
        *c,
        result_types=(f32(),) * 4,
        convergent=True,
    )


def mma_k8(c: Sequence[Value], a: Sequence[Value], b: Value, dtype: Any) -> tuple[Value, ...]:
    """c + a @ b with A [16, 8] (two i32), B [8, 8] (one i32)."""
    t = element(dtype)
    return mgpu_utils.inline_ptx(
        f"mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{$4, $5}}, {{$6}}, "
        "{$7, $8, $9, $10};",
        *a,
        b,
        *c,
        result_types=(f32(),) * 4,
        convergent=True,
    )


def load_matrices(address: Value, *, transpose: bool = False) -> tuple[Value, ...]:
    """Four 8 x 8 matrices; lane 8 j + i gives the address of row i of matrix j."""
    trans = ".trans" if transpose else ""
    return mgpu_utils.inline_ptx(
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        address,
        result_types=(i32(),) * 4,
        has_side_effects=True,
        convergent=True,
    )


def store_matrices(address: Value, pairs: Sequence[Value], *, transpose: bool = False) -> None:
    """The reverse of `load_matrices`."""
    trans = ".trans" if transpose else ""
    mgpu_utils.inline_ptx(
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [$0], {{$1, $2, $3, $4}};",
        address,
        *pairs,
        has_side_effects=True,
        convergent=True,
    )


def transpose_matrix(pair: Value) -> Value:
    """Transposes an 8 x 8 matrix of 16-bit numbers held by the warp."""
    return mgpu_utils.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pair, result_types=i32(), convergent=True
    )


def shared_address(ref: Value) -> Value:
    """i32 address of a shared-memory reference."""
    return llvm.ptrtoint(i32(), mgpu_utils.memref_ptr(ref))


def global_address(ref: Value) -> Value:
    """i64 address of a global-memory reference."""
    return llvm.ptrtoint(i64(), mgpu_utils.memref_ptr(ref))


def advance(address: Value, index: Value, scale: int) -> Value:
    """i64 address + index * scale, the index widened first."""
    return arith.addi(address, arith.muli(arith.extsi(i64(), index), arith.constant(i64(), scale)))


def load_shared(address: Value) -> Value:
    """One f32."""
    return mgpu_utils.inline_ptx("ld.shared.f32 $0, [$1];", address, result_types=f32(), has_side_effects=True)


def load_shared_16_bytes(address: Value) -> tuple[Value, ...]:
    """Four i32."""
    return mgpu_utils.inline_ptx(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address, result_types=(i32(),) * 4, has_side_effects=True
    )


def load_shared_8_bytes(address: Value) -> tuple[Value, ...]:
    """Two i32."""
    return mgpu_utils.inline_ptx(
        "ld.shared.v2.b32 {$0, $1}, [$2];", address, result_types=(i32(),) * 2, has_side_effects=True
    )


def store_shared_word(address: Value, word: Value) -> None:
    """One i32."""
    mgpu_utils.inline_ptx("st.shared.b32 [$0], $1;", address, word, has_side_effects=True)


def bytes_of(low: Value, high: Value, places: int) -> Value:
    """Four bytes of two i32, of which `low` has bytes 0 to 3; places: a digit for each, the last byte's first."""
    return mgpu_utils.inline_ptx(f"prmt.b32 $0, $1, $2, 0x{places:04x};", low, high, result_types=i32())


def multiply_pairs(pair: Value, factor: float, dtype: Any) -> Value:
    """Both 16-bit numbers of a packed pair times a number that the dtype holds."""
    half = int(np.asarray(factor, jnp.dtype(dtype)).view(np.uint16))
    factors = integer(half << 16 | half)
    return mgpu_utils.inline_ptx(f"mul.rn.{element(dtype)}x2 $0, $1, $2;", pair, factors, result_types=i32())


def store_shared_16_bytes(address: Value, words: Sequence[Value], predicate: Value) -> None:
    """Four i32, where the predicate holds."""
    mgpu_utils.inline_ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", address, *words, predicate=predicate)


def load_global_16_bytes(address: Value, predicate: Value) -> tuple[Value, ...]:
    """Zeros where the predicate does not hold."""
    return mgpu_utils.inline_ptx(
        "{ mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @$5 ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
        address,
        predicate,
        result_types=(i32(),) * 4,
        has_side_effects=True,
    )


def store_global_16_bytes(address: Value, words: Sequence[Value], predicate: Value) -> None:
    """Four i32, where the predicate holds."""
    mgpu_utils.inline_ptx("st.global.v4.b32 [$0], {$1, $2, $3, $4};", address, *words, predicate=predicate)


def store_global(address: Value, x: Value, predicate: Value) -> None:
    """One f32."""
    mgpu_utils.inline_ptx("st.global.f32 [$0], $1;", address, x, predicate=predicate)


def store_shared_pair(address: Value, pair: Sequence[Value]) -> None:
    """Two adjacent f32."""
    mgpu_utils.inline_ptx("st.shared.v2.f32 [$0], {$1, $2};", address, *pair, has_side_effects=True)


def as_real(word: Value) -> Value:
    """The f32 with the bits of an i32."""
    return arith.bitcast(f32(), word)


def as_word(x: Value) -> Value:
    """The bits of an f32."""
    return arith.bitcast(i32(), x)


def when(condition: Value, compute: Callable[[], Sequence[Value]], otherwise: Sequence[Value]) -> list[Value]:
    """`compute()` where the condition, the same for the whole warp, holds; else `otherwise`."""
    branch = scf.IfOp(condition, [x.type for x in otherwise], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(list(compute()))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(list(otherwise))
    return list(branch.results)


class Lane:
    """Where this thread stands: its warp, its lane, and the places that it gives to `load_matrices`."""

    def __init__(self) -> None:
        self.warp = bit_and(mgpu_utils.warp_idx(sync=True), 3)
        self.lane = bit_and(mgpu_utils.thread_idx(), 31)
        self.row = shift_right(self.lane, 2)  # r: row of a C fragment
        self.column = shift_left(bit_and(self.lane, 3), 1)  # 2c: column of a C fragment
        self._in_matrix = bit_and(self.lane, 7)
        self._matrix = shift_right(self.lane, 3)
        self._low = bit_and(self._matrix, 1)
        self._high = shift_right(self._matrix, 1)

    def place(self, row: Value, chunk: Value) -> Place:
        """Where `row` and 16-byte `chunk` of a tile lie."""
        return Place(shift_left(row, 7), shift_left(bit_xor(chunk, bit_and(row, 7)), 4))

    def a_operand(self) -> Place:
        """A [16, 16] stored [M rows, K columns], for `load_matrices`; or two C fragments side by side."""
        return self.place(add(self._in_matrix, shift_left(self._low, 3)), self._high)

    def a_transposed_operand(self) -> Place:
        """A [16, 16] stored [K rows, M columns], for `load_matrices(transpose=True)`."""
        return self.place(add(self._in_matrix, shift_left(self._high, 3)), self._low)

    def narrow_operand(self) -> tuple[Value, Value]:
        """(row, 16-byte chunk) of A [16, 32] of bytes, for `load_matrices`: of K along its rows or, transposed, down
        its columns."""
        return add(self._in_matrix, shift_left(self._low, 3)), self._high

    def wide_operand(self, first_row: Value | int = 0) -> Place:
        """8 rows x 32 columns from `first_row`: two K = 16 steps of B [N, K]; transposed, four B [K, N]."""
        return self.place(add(self._in_matrix, first_row), self._matrix)


@dataclasses.dataclass(frozen=True)
class Place:
    """Byte offset of a thread's row, and of its chunk in it, before a constant row and chunk are added."""

    row_bytes: Value
    chunk_bytes: Value


def chunk_address(base: Value, place: Place, row: int, chunk: int) -> Value:
    """Address of `chunk` (even for A, a multiple of 4 for wide operands) from `row` (a multiple of 8) on."""
    offset = add(place.row_bytes, row * ROW_BYTES)
    return add(add(base, offset), bit_xor(place.chunk_bytes, chunk * 16))
