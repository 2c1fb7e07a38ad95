"""How every benchmark here measures time: interleaved rounds in one process, medians, inputs that do not fit the cache.

A round calls every contestant once, so that a change of clocks or temperature meets all of them. Before it is timed a
contestant is compiled and run twice. Each timed call sees another set of inputs, so many sets that together they are
several times the L2 cache: nothing is read from there that a training step would have to fetch from memory.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

CACHE_BYTES = 4 * 60 * 2**20  # four times an H200's L2
MAX_INPUT_SETS = 8


def input_sets(make: Callable[[jax.Array], Any], seed: int = 0) -> list[Any]:
    """Enough sets of inputs to overflow the cache, at most `MAX_INPUT_SETS`; `make(key)` draws one."""
    first = jax.block_until_ready(make(jax.random.key(seed)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    count = min(MAX_INPUT_SETS, 1 + math.ceil(CACHE_BYTES / size))
    return [first, *(jax.block_until_ready(make(jax.random.key(seed + i))) for i in range(1, count))]


def median_seconds(
    contestants: dict[str, Callable[..., Any]] | dict[str, concurrent.futures.Future],
    inputs: Sequence[Any],
    *,
    rounds: int = 15,
    calls_seconds: float = 0.02,
) -> dict[str, float | str]:
    """Median time of one call of each contestant, in seconds.

    Args:
        contestants: name -> function of one input set; jitted here; or what `compile_ahead` made of such functions.
        inputs: from `input_sets`; each a tuple of arguments.
        rounds: timed rounds.
        calls_seconds: a timed stretch repeats short calls until it is about so long, to bury the cost of dispatch.

    Returns:
        name -> seconds, or the error's text for a contestant that cannot run: a benchmark goes on to its other rows.
    """
    results: dict[str, float | str] = {}
    jitted, repeats = {}, {}
    for name, contestant in contestants.items():
        try:
            ahead = isinstance(contestant, concurrent.futures.Future)
            run = contestant.result() if ahead else _compiled(contestant, inputs[0])
            jax.block_until_ready(run(*inputs[0]))
            began = time.perf_counter()
            jax.block_until_ready(run(*inputs[-1]))
        except (NotImplementedError, ValueError, RuntimeError) as error:
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        repeats[name] = max(1, math.ceil(calls_seconds / max(time.perf_counter() - began, 1e-6)))
        jitted[name] = run
    times: dict[str, list[float]] = {name: [] for name in jitted}
    for _ in range(rounds):
        for name, run in jitted.items():
            began = time.perf_counter()
            for i in range(repeats[name]):
                out = run(*inputs[i % len(inputs)])
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - began) / repeats[name])
    return results | {name: statistics.median(values) for name, values in times.items()}


def compile_ahead(
    contestants: dict[str, Callable[..., Any]], arguments: Sequence[Any], pool: concurrent.futures.Executor
) -> dict[str, concurrent.futures.Future]:
    """Starts the compilers of a case, given its arguments' shapes. Wait for all cases before anything is timed."""
    return {name: pool.submit(_compiled, function, arguments) for name, function in contestants.items()}


def _compiled(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    return jax.jit(function).lower(*arguments).compile()


def copy_bytes_per_second(size: int) -> float:
    """Bytes read and written per second by the framework's own copy of an array of `size` bytes."""
    array = jnp.arange(size // 4, dtype=jnp.float32)
    seconds = median_seconds({"copy": lambda x: jnp.copy(x)}, [(array,)], rounds=9)["copy"]
    if isinstance(seconds, str):
        raise RuntimeError(f"the copy that measures memory bandwidth failed: {seconds}")
    return 2 * array.nbytes / seconds


def environment() -> dict[str, str]:
    """What a committed result names: device, versions, date."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version.strip().replace("\n", ", "),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
