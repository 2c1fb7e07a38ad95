"""Runs the warp-level code of `pallas_kernels.mosaic_gpu.depth.warp_mma` in NumPy, one warpgroup at a time.

The Pallas interpreter cannot run PTX. This emulator does, for the few instructions that `warp_mma` emits: every MLIR
value becomes an array over the 128 threads, shared and global memory are byte arrays, and the matrix instructions
follow the PTX ISA's fragment tables. So the addresses, swizzles, masks and operand orders of the chip are tested
without one.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np

THREADS = 128
LANE = np.arange(THREADS) % 32
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Memory:
    """Byte-addressed memory: shared memory from address 0, each global array from its own multiple of 2**32."""

    def __init__(self, shared_bytes: int) -> None:
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)  # NaN in every format
        self.used = 0
        self.arrays: list[np.ndarray] = []

    def share(self, size: int) -> SimpleNamespace:
        """Allocates shared memory at a multiple of 1024."""
        ref = SimpleNamespace(address=self.used, size=size)
        self.used += -(-size // 1024) * 1024
        if self.used > self.shared.size:
            raise ValueError(f"shared memory: {self.used} bytes, expected at most {self.shared.size}")
        return ref

    def place(self, array: np.ndarray) -> SimpleNamespace:
        """Puts a contiguous array into global memory; stores change the array itself."""
        self.arrays.append(array.reshape(-1).view(np.uint8))
        return SimpleNamespace(address=len(self.arrays) << 32)

    def _cells(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        (number,) = set((address >> 32).tolist())
        offset = (address & 0xFFFFFFFF)[:, None] + np.arange(size)
        if (address % size).any():
            raise ValueError(f"misaligned access of {size} bytes")
        memory = self.shared if number == 0 else self.arrays[number - 1]
        if offset.max() >= memory.size:
            raise ValueError(f"access to byte {offset.max()} of {memory.size}")
        return memory, offset

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size]."""
        memory, cells = self._cells(np.asarray(address, np.int64), size)
        return memory[cells]

    def store(self, address: np.ndarray, data: np.ndarray) -> None:
        """data: uint8 [n, size]."""
        memory, cells = self._cells(np.asarray(address, np.int64), data.shape[1])
        memory[cells] = data


def _wide(x: np.ndarray, dtype: object) -> np.ndarray:
    return np.broadcast_to(np.asarray(x), (THREADS,)).astype(dtype)


def _words(parts: list[np.ndarray]) -> np.ndarray:
    """One or more 4-byte values of each thread as uint8 [128, 4 * n]."""
    columns = [np.ascontiguousarray(_wide(p, np.asarray(p).dtype)).view(np.uint8).reshape(THREADS, 4) for p in parts]
    return np.concatenate(columns, axis=1)


def _split(data: np.ndarray, dtype: object) -> tuple[np.ndarray, ...]:
    return tuple(np.ascontiguousarray(data[:, 4 * i : 4 * i + 4]).view(dtype)[:, 0] for i in range(data.shape[1] // 4))


def _halves(word: np.ndarray, dtype: object) -> np.ndarray:
    """[128, 2] of 16-bit numbers."""
    return np.ascontiguousarray(_wide(word, np.int32)).view(np.uint16).reshape(THREADS, 2).view(dtype)


def _join(halves: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(halves).view(np.int32).reshape(THREADS)


def _matrices(words: list[np.ndarray], dtype: object) -> np.ndarray:
    """Pairs of each thread as [warp, matrix, 8, 8]: lane 4 r + c holds columns 2c and 2c + 1 of row r."""
    return np.stack([_halves(w, dtype).reshape(4, 8, 8) for w in words], axis=1)


class Emulator:
    """Stands in for `mgpu_utils`, `arith` and `llvm` inside `warp_mma`; `install` puts it there."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def install(self, monkeypatch: object, warp_mma: object, modules: list[object]) -> None:
        """Patches `warp_mma`, and the functions of `modules` that pass values in and out of inlined code."""
        utils = SimpleNamespace(
            warp_idx=lambda sync: np.arange(THREADS, dtype=np.int32) // 32,
            thread_idx=lambda: np.arange(THREADS, dtype=np.int32),
            warp_barrier=lambda: None,
            memref_ptr=lambda ref: ref,
            inline_ptx=self.run,
        )
        patches = {
            "mgpu_utils": utils,
            "arith": _arith(),
            "llvm": SimpleNamespace(ptrtoint=lambda dtype, ref: _wide(ref.address, dtype)),
            "i32": lambda: np.int32,
            "i64": lambda: np.int64,
            "f32": lambda: np.float32,
            "when": _when,
        }
        for name, patch in patches.items():
            monkeypatch.setattr(warp_mma, name, patch)
        inline = SimpleNamespace(
            inline_mgpu=lambda **_: lambda f: lambda *args: f(None, *args),
            RefType=lambda *_: None,
            ShapeDtypeStruct=lambda *_: None,
            Layout=SimpleNamespace(WG_STRIDED=lambda *_, **__: None),
        )
        for module in modules:
            monkeypatch.setattr(module, "plgpu", inline)
            monkeypatch.setattr(module, "scalar", lambda x: _wide(x, np.int32))
            monkeypatch.setattr(module, "thread_values", lambda x: list(x))
            monkeypatch.setattr(module, "thread_array", lambda x: list(x))

    def run(self, ptx, *args, result_types=None, predicate=None, has_side_effects=False, convergent=False):
        """One instruction. Arguments come in the order of the PTX operands, without the results."""
        del result_types, has_side_effects, convergent
        memory, active = self.memory, np.ones(THREADS, bool) if predicate is None else _wide(predicate, bool)
        simple = {
            "ex2.approx.ftz.f32": lambda x: np.exp2(x),
            "lg2.approx.ftz.f32": lambda x: np.log2(x),
            "rcp.approx.ftz.f32": lambda x: 1 / x,
            "max.f32": lambda x, y: np.fmax(x, y),
        }
        name = ptx.split()[0]
        with np.errstate(all="ignore"):
            if name in simple:
                return simple[name](*(_wide(a, np.float32) for a in args)).astype(np.float32)
            if name == "shfl.sync.bfly.b32":
                distance = int(re.search(r"\$1, (\d+),", ptx)[1])
                return _wide(args[0], np.float32)[np.arange(THREADS) ^ distance]
            if name.startswith("cvt.rn."):
                high, low = (_wide(a, np.float32).astype(DTYPES[name.split(".")[2][:-2]]) for a in args)
                return _join(np.stack([low, high], axis=1))
            if name.startswith("mul.rn."):
                dtype = DTYPES[name.split(".")[2][:-2]]
                left, right = (_halves(a, dtype).astype(np.float32) for a in args)
                return _join((left * right).astype(dtype))
            if ptx.startswith("{ .reg .b16"):
                pair = _halves(args[0], np.float16).astype(np.float32)
                return pair[:, 0].copy(), pair[:, 1].copy()
            if name.startswith("mma.sync"):
                return self._mma(DTYPES[name.split(".")[-2]], "m16n8k16" in name, args)
            if name.startswith(("ldmatrix", "stmatrix", "movmatrix")):
                return self._move(name, args)
        if name == "prmt.b32":
            places = [int(digit, 16) for digit in reversed(ptx.rstrip(";").split("0x")[1])]
            data = np.concatenate([_halves(a, np.uint16).view(np.uint8) for a in args], axis=1)
            return np.ascontiguousarray(data[:, places]).view(np.int32)[:, 0]
        if name == "ld.shared.v2.b32":
            return _split(memory.load(_wide(args[0], np.int64), 8), np.int32)
        if name == "ld.shared.f32":
            return _split(memory.load(_wide(args[0], np.int64), 4), np.float32)[0]
        if name == "ld.shared.v4.b32":
            return _split(memory.load(_wide(args[0], np.int64), 16), np.int32)
        if ptx.startswith("{ mov.b32 $0, 0;"):
            active, result = _wide(args[1], bool), np.zeros((THREADS, 16), np.uint8)
            if active.any():
                result[active] = memory.load(_wide(args[0], np.int64)[active], 16)
            return _split(result, np.int32)
        if name in ("st.shared.v4.b32", "st.global.v4.b32", "st.shared.v2.f32", "st.shared.b32", "st.global.f32"):
            if active.any():
                memory.store(_wide(args[0], np.int64)[active], _words(list(args[1:]))[active])
            return None
        raise NotImplementedError(ptx)

    def _mma(self, dtype, wide, args):
        count = 4 if wide else 2
        a, b, c = args[:count], args[count : count + count // 2], args[count + count // 2 :]
        a = _matrices(list(a), dtype).astype(np.float32)  # [warp, (row half) + 2 * (K half), 8, 8]
        left = np.concatenate(
            [np.concatenate([a[:, 2 * k], a[:, 2 * k + 1]], axis=1) for k in range(count // 2)], axis=2
        )
        right = np.concatenate(
            list(np.moveaxis(_matrices(list(b), dtype).astype(np.float32), 1, 0)), axis=2
        )  # [w, N, K]
        product = np.einsum("wmk,wnk->wmn", left, right)
        values = []
        for i, x in enumerate(c):
            rows = LANE // 4 + 8 * (i // 2)
            values.append(_wide(x, np.float32) + product[np.arange(THREADS) // 32, rows, 2 * (LANE % 4) + i % 2])
        return tuple(v.astype(np.float32) for v in values)

    def _move(self, name, args):
        transpose = ".trans" in name
        if name.startswith("movmatrix"):
            m = np.swapaxes(_matrices([args[0]], np.uint16), 2, 3)
            return _join(m[:, 0].reshape(THREADS, 2))
        address = _wide(args[0], np.int64).reshape(4, 4, 8)  # [warp, matrix, row]
        if name.startswith("ldmatrix"):
            data = self.memory.load(address.reshape(-1), 16).view(np.uint16).reshape(4, 4, 8, 8)
            data = np.swapaxes(data, 2, 3) if transpose else data
            return tuple(_join(np.ascontiguousarray(data[:, j]).reshape(THREADS, 2)) for j in range(4))
        data = _matrices(list(args[1:]), np.uint16)
        data = np.swapaxes(data, 2, 3) if transpose else data
        self.memory.store(address.reshape(-1), np.ascontiguousarray(data).reshape(-1, 8).view(np.uint8))
        return None


def _when(condition, compute, otherwise):
    (value,) = set(_wide(condition, bool).tolist())
    return compute() if value else list(otherwise)


def _arith() -> SimpleNamespace:
    def integer(f):
        def apply(x, y):
            with np.errstate(over="ignore"):
                return f(np.asarray(x), np.asarray(y))

        return apply

    def real(f):
        def apply(x, y):
            with np.errstate(all="ignore"):
                return f(_wide(x, np.float32), _wide(y, np.float32))

        return apply

    return SimpleNamespace(
        constant=lambda dtype, value: _wide(np.int64(value).astype(dtype) if dtype != np.float32 else value, dtype),
        addi=integer(np.add), subi=integer(np.subtract), muli=integer(np.multiply), andi=integer(np.bitwise_and),
        ori=integer(np.bitwise_or), xori=integer(np.bitwise_xor), shli=integer(np.left_shift),
        shrui=integer(lambda x, y: (x.view(np.uint32) >> y.astype(np.uint32)).view(np.int32)),
        divui=integer(np.floor_divide), remui=integer(np.remainder),
        addf=real(np.add), subf=real(np.subtract), mulf=real(np.multiply),
        cmpi=lambda predicate, x, y: {"slt": np.less}[predicate](x, y),
        CmpIPredicate=SimpleNamespace(slt="slt"),
        cmpf=lambda predicate, x, y: {"ogt": np.greater}[predicate](x, y),
        CmpFPredicate=SimpleNamespace(OGT="ogt"),
        select=lambda c, x, y: np.where(c, x, y),
        extsi=lambda dtype, x: _wide(x, dtype),
        bitcast=lambda dtype, x: np.ascontiguousarray(x).view(dtype),
    )  # fmt: skip
