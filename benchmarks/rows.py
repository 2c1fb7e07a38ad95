"""What goes over rows: LayerNorm, RMSNorm's backward and GELU's, kernel against XLA, at the widths of models.

    python -m benchmarks.rows [--rounds=11] [--cases=layer_norm:100864:192,...]

A case is an operation, rows and columns, in bfloat16. GB/s counts every operand once: what the kernels read and write.
100864 rows are 512 images of 197 tokens. Compiles first, all at once; then times, interleaved (`benchmarks.timing`).

Every call is a program of its own, so that a row takes no less than the host needs for that: 0.04 to 0.1 ms, by what
else the host does. What a kernel of less than 0.2 ms takes in a step, its profile says (`benchmarks.vision --kernels`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels import biased_gelu, layer_norm, norm

CASES = (
    "layer_norm:100864:192", "layer_norm_backward:100864:192", "layer_norm:100864:384",
    "layer_norm_backward:100864:384", "layer_norm:32768:1024", "layer_norm_backward:32768:1024",
    "rms_norm_backward:32768:1024", "rms_norm_backward:100864:192", "rms_norm_backward:524288:64",
    "rms_norm_backward:16384:2048", "rms_norm_backward:8192:8192", "gelu_backward:100864:768",
    "gelu_backward:50432:1536",
)  # fmt: skip
OPERATIONS: dict[str, tuple[Callable[..., Any], int]] = {  # and how many arrays of rows go in and out
    "layer_norm": (lambda x, dy, scale, how: layer_norm.layer_norm(x, scale, scale, epsilon=1e-6, **how), 2),
    "layer_norm_backward": (
        lambda x, dy, scale, how: layer_norm.layer_norm_backward(x, dy, scale, epsilon=1e-6, **how), 3,
    ),
    "rms_norm_backward": (lambda x, dy, scale, how: norm.rms_norm_backward(x, dy, scale, epsilon=1e-6, **how), 3),
    "gelu_backward": (lambda x, dy, scale, how: biased_gelu.biased_gelu_backward(x, scale, dy, **how), 3),
}  # fmt: skip


def draw(rows: int, columns: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, dy and a vector of the columns."""
    keys = jax.random.split(key, 3)
    x, dy = (jax.random.normal(k, (rows, columns), jnp.bfloat16) for k in keys[:2])
    return x, dy, jax.random.normal(keys[2], (columns,), jnp.float32)


def contestants(operation: str) -> dict[str, Callable[..., Any]]:
    """By implementation, and the kernels as they are not called today."""
    function, _ = OPERATIONS[operation]
    found = {
        name: functools.partial(lambda how, *arrays: function(*arrays, how), {"implementation": name})
        for name in norm.IMPLEMENTATIONS
    }
    kernels = importlib.import_module("pallas_kernels.mosaic_gpu.layer_norm")
    if operation == "layer_norm":
        found["2 sets"] = lambda x, dy, scale: kernels.layer_norm(x, scale, scale, epsilon=1e-6, sets=2)
    if operation == "layer_norm_backward":
        found["1188 programs"] = functools.partial(kernels.layer_norm_backward, epsilon=1e-6, programs=1188)
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line: a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="OPERATION:ROWS:COLUMNS, separated by commas")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    cases = [
        (name, int(rows), int(columns)) for name, rows, columns in (c.split(":") for c in options.cases.split(","))
    ]
    print(timing.environment(), flush=True)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = []
        for name, rows, columns in cases:
            specs = jax.eval_shape(functools.partial(draw, rows, columns), jax.random.key(0))
            made.append(timing.compile_ahead(contestants(name), specs, pool))
        concurrent.futures.wait([future for futures in made for future in futures.values()])
    print(f"{'case':32}us (GB/s) of each, and XLA's time over the kernel's")
    for (name, rows, columns), futures in zip(cases, made, strict=True):
        inputs = timing.input_sets(functools.partial(draw, rows, columns))
        seconds = timing.median_seconds(futures, inputs, rounds=options.rounds)
        size, cells = OPERATIONS[name][1] * rows * columns * 2, []
        for contestant, took in seconds.items():
            text = took if isinstance(took, str) else f"{1e6 * took:8.1f} ({size / took / 1e9:5.0f})"
            cells.append(f"{contestant} {text}")
        both = [seconds[name] for name in norm.IMPLEMENTATIONS]
        ratio = "" if any(isinstance(took, str) for took in both) else f"{both[0] / both[1]:6.2f}"
        print(f"{f'{name}:{rows}:{columns}':32}{'  '.join(cells)}{ratio}", flush=True)


if __name__ == "__main__":
    main()
