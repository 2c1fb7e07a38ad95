"""Times alternative tiles of the Triton kernels on the card at hand.

    python -m benchmarks.autotune_triton [--head-dim=64] [--tokens=16384] [--group=8] [--slots=64] [--output=DIRECTORY]

Every kernel is timed alone, with everything else as it is: its own choice (`pallas_kernels/triton/tiles.py`) and those
around it that fit into the card's shared memory. What does not compile is named with its error. The table is written
with the card's name and versions. A better row is a change of `tiles.py`, in which no card has a name: the choice
depends on head_dim and on the shared memory of a thread block.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream

RESULTS = Path(__file__).parent / "results"
KERNELS = ("depth forward", "depth backward", "sequence forward", "sequence dq", "sequence dkv")
SIDES, KEYS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)
SLOTS, DEPTH_WARPS = (16, 32, 64), (1, 2, 4)


def alternatives(kernel: str, chosen: Any) -> Iterator[Any]:
    """The chosen tiles first, then those of the grid that are not it."""
    yield chosen
    if kernel.startswith("depth"):
        for slots, warps, stages in itertools.product(SLOTS, DEPTH_WARPS, STAGES):
            other = dataclasses.replace(chosen, slots=slots, warps=warps, stages=stages)
            if other != chosen:
                yield other
        return
    for rows, keys, warps, stages in itertools.product(SIDES, KEYS, WARPS, STAGES):
        other = dataclasses.replace(chosen, rows=rows, keys=keys, warps=warps, stages=stages)
        if other != chosen and rows * keys <= 128 * 128 // (2 if kernel == "sequence forward" else 1):
            yield other


def contestant(kernel: str, call: Call, tiles: Any) -> Callable[..., Any]:
    """A function of (call, upstream) that runs one kernel with given tiles."""
    from pallas_kernels.triton import depth, sequence
    from pallas_kernels.triton import tiles as tiles_module

    part, name = kernel.split()
    choice = "depth_tiles" if part == "depth" else "sequence_tiles"
    as_it_is = getattr(tiles_module, choice)
    window = jnp.int32([0, call.slots])

    def run(call: Call, upstream: Upstream) -> Any:
        def choose(which: str, *arguments: Any) -> Any:
            return tiles if which == name else as_it_is(which, *arguments)

        with unittest.mock.patch.object(tiles_module, choice, choose):
            if part == "depth":
                if name == "forward":
                    return depth.forward(call, window, with_rest=True)
                return depth.backward(call, window, upstream, None, None)
            if name == "forward":
                return sequence.forward(call, None, with_rest=True)
            dquery, dkey, dvalue = sequence.backward(call, upstream)
            return dquery if name == "dq" else (dkey, dvalue)  # XLA leaves the other kernel out

    return run


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, printed as they come."""
    from pallas_kernels.triton import call as calls
    from pallas_kernels.triton import tiles as tiles_module

    capability = calls.capability()
    kv_heads, tokens, head_dim = arguments.kv_heads, arguments.tokens, arguments.head_dim
    query = (1, tokens, kv_heads * arguments.group, head_dim)
    key, depth = (1, tokens, kv_heads, head_dim), (1, tokens, arguments.slots, kv_heads, head_dim)

    def draw(seed: jax.Array) -> tuple[Call, Upstream]:
        keys = iter(jax.random.split(seed, 6))
        q, k, v, dk, dv, dout = (
            jax.random.normal(next(keys), s, jnp.bfloat16) for s in (query, key, key, depth, depth, query)
        )
        statistics = jnp.full(query[:3], 5.0, jnp.float32)
        return Call(q, k, v, Mask(True), DepthKV(dk, dv), head_dim**-0.5), Upstream(dout, statistics, 0 * statistics)

    inputs = timing.input_sets(jax.jit(draw))
    rows = []
    print(f"{timing.environment()}\n{'kernel':18} {'ms':>9}  tiles")
    for kernel in arguments.kernels:
        part, name = kernel.split()
        if part == "depth":
            chosen = tiles_module.depth_tiles(name, head_dim, arguments.slots, arguments.group)
        else:
            chosen = tiles_module.sequence_tiles(name, head_dim, tokens, arguments.group, capability)
        for tiles in itertools.islice(alternatives(kernel, chosen), arguments.most):
            contestants = {"kernel": contestant(kernel, inputs[0][0], tiles)}
            seconds = timing.median_seconds(contestants, inputs, rounds=arguments.rounds)["kernel"]
            rows.append(
                {"kernel": kernel, "tiles": dataclasses.asdict(tiles), "chosen": tiles == chosen, "seconds": seconds}
            )
            shown = f"{seconds * 1e3:9.3f}" if isinstance(seconds, float) else f"{'-':>9}"
            print(f"{kernel:18} {shown}  {tiles}{' (chosen)' if tiles == chosen else ''}", flush=True)
            if isinstance(seconds, str):
                print(f"    {seconds}")
    shape = {
        "tokens": tokens,
        "group": arguments.group,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "slots": arguments.slots,
    }
    return {"environment": timing.environment(), "capability": capability, "shape": shape, "rows": rows}


def main() -> None:
    """Times the kernels' tiles and writes autotune_triton_CAPABILITY_hHEAD_DIM.json."""
    parser = argparse.ArgumentParser(description="Times alternative tiles of the Triton kernels.")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--group", type=int, default=8, help="query heads of a KV head")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=None, help="time at most so many tiles of a kernel")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = run(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"autotune_triton_sm{''.join(map(str, result['capability']))}_h{arguments.head_dim}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
