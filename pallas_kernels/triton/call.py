"""The one place that starts Triton kernels: through jax-triton on a GPU, under Triton's interpreter on a CPU.

A kernel's parameters are its operands, its lengths (int32 scalars), its outputs and its constants (by keyword), in this
order. `record` collects what would be started, for tests that compile it for a card that is not there.

Environment:
    TRITON_INTERPRET=1               Triton's own switch; it is read when `triton` is imported first.
    MODA_TRITON_CAPABILITY=8.0       compile for this compute capability, and run on the newer card that is there: its
                                     tiles and its instructions, since newer cards take older PTX. For tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import triton

CAPABILITY_VARIABLE = "MODA_TRITON_CAPABILITY"
INTERPRETED_CAPABILITY = (8, 0)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and all that is compiled into it.

    Attributes:
        kernel: a function under `triton.jit`.
        operands: shapes and dtypes of the arrays that it reads.
        lengths: int32 scalars.
        outputs: shapes and dtypes of the arrays that it writes.
        programs: size of the grid.
        warps, stages: of a program.
        aliases: operand index -> output index, arrays that are overwritten in place.
        constants: the kernel's constexpr parameters; None stands for an array that is not there.
    """

    kernel: Any
    operands: tuple[jax.ShapeDtypeStruct, ...]
    lengths: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    programs: int
    warps: int
    stages: int
    aliases: dict[int, int]
    constants: dict[str, Any]


@dataclasses.dataclass
class _Recording:
    capability: tuple[int, int]
    launches: list[Launch]


_recordings: list[_Recording] = []


@contextlib.contextmanager
def record(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Inside, kernels are not started but listed, with the tiles of `capability`; their results are not defined.

    To be used under `jax.eval_shape`.
    """
    recording = _Recording(capability, [])
    _recordings.append(recording)
    try:
        yield recording.launches
    finally:
        _recordings.remove(recording)


def interpreting() -> bool:
    """Whether Triton's interpreter is on."""
    return bool(triton.knobs.runtime.interpret)


def can_run() -> bool:
    """Whether there is anything that kernels can run on."""
    return bool(_recordings) or interpreting() or _on_gpu()


def capability() -> tuple[int, int]:
    """The compute capability for which tiles are chosen and kernels compiled.

    Raises:
        ValueError: the environment asks for one that is none, or that is newer than the card.
    """
    if _recordings:
        return _recordings[-1].capability
    if not _on_gpu():
        return INTERPRETED_CAPABILITY
    wanted, own = _override(), _of_device()
    if wanted is not None and wanted > own:
        raise ValueError(f"{CAPABILITY_VARIABLE}={wanted[0]}.{wanted[1]}: this card has {own[0]}.{own[1]} only")
    return wanted or own


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _of_device() -> tuple[int, int]:
    """Compute capability of the card."""
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return int(major), int(minor)


def _override() -> tuple[int, int] | None:
    """The capability that the environment asks for."""
    text = os.environ.get(CAPABILITY_VARIABLE)
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if match is None:
        raise ValueError(f"{CAPABILITY_VARIABLE}={text!r}: expected a compute capability, such as 8.0")
    return int(match[1]), int(match[2])


def launch(
    kernel: Any,
    operands: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    warps: int,
    stages: int,
    lengths: Sequence[int] = (),
    aliases: dict[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """The outputs of a kernel.

    Args:
        kernel, operands, lengths, outputs, programs, warps, stages, aliases: as in `Launch`.
        **constants: its constexpr parameters.
    """
    aliases = {} if aliases is None else aliases
    if _recordings:
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
        _recordings[-1].launches.append(
            Launch(kernel, shapes, tuple(lengths), tuple(outputs), programs, warps, stages, aliases, constants)
        )
        return [jax.lax.empty(x.shape, x.dtype) for x in outputs]
    if interpreting():
        from pallas_kernels.triton import interpreter

        return interpreter.call(kernel, operands, lengths, outputs, programs, aliases, constants)
    major, minor = _of_device()
    return _jax_triton().triton_call(
        *operands, *lengths, kernel=kernel, out_shape=list(outputs), grid=(programs,), name=kernel.fn.__name__,
        num_warps=warps, num_stages=stages, compute_capability=10 * major + minor, input_output_aliases=aliases,
        **constants,
    )  # fmt: skip


@functools.cache
def _jax_triton() -> ModuleType:
    """jax-triton, which can only be imported where JAX has its GPU plugin.

    Where the environment asks for another capability, jax-triton compiles PTX of that one, and the assembler makes of
    it what the card that is there runs.
    """
    import jax_triton
    from jax_triton import triton_lib

    compile_as_asked = triton_lib.compile_ttir_inplace

    def compile_for_wanted(ttir: Any, backend: Any, options: Any, number: int, platform: str) -> Any:
        wanted = _override()
        if wanted is not None:
            number = 10 * wanted[0] + wanted[1]
            backend, options = triton_lib.get_cuda_backend(0, number), dataclasses.replace(options, arch=f"sm{number}")
        return compile_as_asked(ttir, backend, options, number, platform)

    triton_lib.compile_ttir_inplace = compile_for_wanted
    return jax_triton
