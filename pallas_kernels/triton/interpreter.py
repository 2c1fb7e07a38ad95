"""Kernels under Triton's interpreter, from inside a JAX program on a CPU: every line of a kernel, in NumPy.

Triton's interpreter wants tensors of PyTorch; it needs little of them, and `_HostTensor` gives it that over NumPy, so
that no PyTorch has to be installed. It keeps bfloat16 numbers as their bits and multiplies these as if they were
integers, it does not round to bfloat16 as a GPU does (to nearest, ties to even), and it takes one-element arrays for
Python numbers, which NumPy has given up: all three are mended here. And it replaces the functions of triton.language
anew for every call of every function, and takes every sum of integers twice to find an overflow: here it does not.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
_lock = threading.Lock()  # the interpreter replaces functions of triton.language while it runs


class _HostTensor:
    """A contiguous NumPy array with those attributes of a tensor that the interpreter asks for; its own storage."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = _NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _HostTensor:
        return self

    def cpu(self) -> _HostTensor:
        return self

    def new_empty(self, size: int, device: str) -> _HostTensor:
        return _HostTensor(np.empty(size, self.array.dtype))

    def set_(self, storage: _HostTensor, offset: int, size: Sequence[int], stride: Sequence[int]) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, other: _HostTensor) -> None:
        """Host and device are one."""


class _Builder(triton_interpreter.InterpreterBuilder):
    """The interpreter's operations, with bfloat16 as a GPU has it."""

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(_floats(a), _floats(b), dtype=d.data.dtype)
        return triton_interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return super().cast_impl(src, dst_type)
        wide = _floats(src).astype(np.float32)
        if dst_type.scalar == tl.bfloat16:
            data = wide.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            data = wide.astype(triton_interpreter._get_np_dtype(dst_type))
        return triton_interpreter.TensorHandle(data, dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return self.cast_impl(src, dst_type)


def _floats(handle: Any) -> np.ndarray:
    """A tensor's numbers; those of bfloat16 as float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return np.ascontiguousarray(handle.data).view(ml_dtypes.bfloat16).astype(np.float32)
    return handle.data


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """What the interpreter adds to `triton.language.tensor`."""
    _patch_tensor_as_it_is(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_language_once(function: Any) -> Any:
    """Replaces the functions of those language modules that `function` sees; they are not put back."""
    modules = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
    if modules not in _patched_modules:
        _patch_language(function)
        _patched_modules.add(modules)
    return triton_interpreter._LangPatchScope()


_patched_modules: set[frozenset[int]] = set()
_patch_language = triton_interpreter._patch_lang
triton_interpreter._patch_lang = _patch_language_once
_patch_tensor_as_it_is = triton_interpreter._patch_lang_tensor
triton_interpreter._patch_lang_tensor = _patch_tensor
triton_interpreter.interpreter_builder.__class__ = _Builder  # its operations are found by name, as methods
triton_interpreter.interpreter_builder.options = dataclasses.replace(
    triton_interpreter.interpreter_builder.options, sanitize_overflow=False
)


def call(
    kernel: Any,
    operands: Sequence[jax.Array],
    lengths: Sequence[int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    aliases: dict[int, int],
    constants: dict[str, Any],
) -> list[jax.Array]:
    """The outputs of a kernel; the arguments are those of `pallas_kernels.triton.call.launch`."""

    def run(*arrays: Any) -> list[np.ndarray]:
        results = [np.full(x.shape, np.nan, x.dtype) for x in outputs]  # what a kernel does not write is not defined
        inputs = [np.array(x) for x in arrays]
        for operand, output in aliases.items():
            inputs[operand] = results[output] = np.array(arrays[operand])
        with _lock, np.errstate(all="ignore"):
            kernel[(programs,)](*map(_HostTensor, inputs), *lengths, *map(_HostTensor, results), **constants)
        return results

    return jax.pure_callback(run, list(outputs), *operands)
