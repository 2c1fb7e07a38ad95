"""Triton kernels compiled for a card that is not there: what would be started is recorded, and goes through the whole
compiler, the assembler included. No GPU is needed; Triton's wheel brings its assembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.triton import implementation
from pallas_kernels.triton.call import Launch, record

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
MULTIPLE_OF_16 = [["tt.divisibility", 16]]  # as jax-triton says of every array's address


class Resources(NamedTuple):
    """What a kernel takes of a card: registers of a thread, bytes of a thread that spill to memory, and bytes of shared
    memory of a thread block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def launches(
    capability: tuple[int, int],
    *,
    head_dim: int,
    dtype: str = "bfloat16",
    tokens: int = 4096,
    keys: int | None = None,
    group: int = 8,
    slots: int = 64,
    explicit: bool = False,
    buffers: str | None = None,
    scale: float = 0.125,
) -> list[Launch]:
    """What forward and backward of a causal call start on a card: depth forward, sequence forward, dq, dkv and depth
    backward. `explicit`: with segment ids, positions and key lengths. `buffers`: dtype of the gradient buffers."""
    keys = tokens if keys is None else keys
    batch, kv_heads = 2, 2

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    key = array(batch, keys, kv_heads, head_dim)
    depth = array(batch, tokens, slots, kv_heads, head_dim)
    query = array(batch, tokens, kv_heads * group, head_dim)
    statistics = array(*query.shape[:3], dtype="float32")
    of_queries, of_keys = array(batch, tokens, dtype="int32"), array(batch, keys, dtype="int32")
    marks = (of_queries, of_keys) * 2
    mask = Mask(True, *marks, key_length=array(batch, dtype="int32")) if explicit else Mask(True)
    call = Call(query, key, key, mask, DepthKV(depth, depth, length=array(dtype="int32")), scale)
    given = None if buffers is None else (array(*depth.shape, dtype=buffers),) * 2

    def run(call: Call, upstream: Upstream, buffers: tuple | None) -> tuple:
        return implementation.forward(call, with_rest=True), implementation.backward(call, upstream, buffers)

    with record(capability) as recorded:
        jax.eval_shape(run, call, Upstream(query, statistics, statistics), given)
    return recorded


def compile_for(launch: Launch, capability: tuple[int, int]) -> Resources:
    """Compiles a kernel as jax-triton would: array addresses are multiples of 16, a length of 1 is a constant."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, shape in enumerate(launch.operands):
        signature[names[i]], attributes[(i,)] = f"*{NAMES[shape.dtype.name]}", MULTIPLE_OF_16
    for i, length in enumerate(launch.lengths, len(launch.operands)):
        signature[names[i]] = "constexpr" if length == 1 else "i32"
        if length == 1:
            constants[names[i]] = 1
    for i, shape in enumerate(launch.outputs, len(launch.operands) + len(launch.lengths)):
        signature[names[i]], attributes[(i,)] = f"*{NAMES[jnp.dtype(shape.dtype).name]}", MULTIPLE_OF_16
    for name, value in launch.constants.items():
        signature[name], constants[name] = "constexpr", value
    major, minor = capability
    with tempfile.TemporaryDirectory() as directory, knobs.cache.scope():
        knobs.cache.dir = directory  # jax-triton, once imported, has Triton's cache in the working directory
        kernel = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", 10 * major + minor, 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
        path, shared = Path(directory, "kernel.cubin"), kernel.metadata.shared
        path.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Resources(registers, stack, shared)
