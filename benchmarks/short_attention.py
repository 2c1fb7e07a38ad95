"""Attention over the tokens of an image, forward and backward, by the tiles of its kernels, and cuDNN's beside them.

    python -m benchmarks.short_attention [--batch=512] [--tokens=197] [--heads=3] [--rounds=9] [--only="dq 2x64x4",...]

A tile is warpgroups x block x stages, as in `pallas_kernels.mosaic_gpu.sequence.tiles`; p: two CTAs on a
multiprocessor; k: K in registers; iN: a CTA takes N images one after the other. The first of each list is what long
sequences get. Compiles first, all at once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels.mosaic_gpu.sequence.backward import sequence_backward
from pallas_kernels.mosaic_gpu.sequence.forward import sequence_forward
from pallas_kernels.mosaic_gpu.sequence.tiles import BackwardTiles, ForwardTiles
from pallas_kernels.operands import Call, Upstream

HEAD_DIM = 64
SCALE = HEAD_DIM**-0.5
FORWARD = {
    "3x128x4": ForwardTiles(3, 128, 4), "2x128x2": ForwardTiles(2, 128, 2), "2x64x4": ForwardTiles(2, 64, 4),
    "2x128x4": ForwardTiles(2, 128, 4), "1x64x4p": ForwardTiles(1, 64, 4, paired=True),
    "1x64x4": ForwardTiles(1, 64, 4), "1x128x4": ForwardTiles(1, 128, 4), "2x64x6": ForwardTiles(2, 64, 6),
    "3x64x6": ForwardTiles(3, 64, 6), "1x128x2p": ForwardTiles(1, 128, 2, paired=True),
}  # fmt: skip
DQ = {
    "3x64x4": (3, 64, 4), "2x64x4": (2, 64, 4), "1x64x4": (1, 64, 4), "2x64x4i8": (2, 64, 4, False, 8),
    "3x64x4i8": (3, 64, 4, False, 8), "2x64x4i24": (2, 64, 4, False, 24),
}  # fmt: skip
DKV = {
    "2x64x4k": (2, 64, 4, True), "2x64x4": (2, 64, 4), "1x64x4k": (1, 64, 4, True), "2x64x4ki8": (2, 64, 4, True, 8),
    "2x64x4i8": (2, 64, 4, False, 8), "2x64x4ki24": (2, 64, 4, True, 24),
}  # fmt: skip


def draw(shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, ...]:
    """query, key, value, dout, lse, delta."""
    keys = jax.random.split(key, 4)
    arrays = [jax.random.normal(k, shape, jnp.bfloat16) for k in keys]
    return *arrays, jnp.full(shape[:3], 6.0, jnp.float32), jnp.zeros(shape[:3], jnp.float32)


def forward(tiles: ForwardTiles, query, key, value, dout, lse, delta):
    """out and lse."""
    return sequence_forward(Call(query, key, value, scale=SCALE), tiles=tiles)[:2]


def backward(only: slice, dq, dkv, query, key, value, dout, lse, delta):
    """The gradients in `only`: of the others nothing is computed."""
    gradients = sequence_backward(
        Call(query, key, value, scale=SCALE), Upstream(dout, lse, delta), dq_tiles=dq, dkv_tiles=dkv
    )
    return gradients[only]


def cudnn(query, key, value, dout, lse, delta):
    """Its forward."""
    return jax.nn.dot_product_attention(query, key, value, scale=SCALE, implementation="cudnn")


def cudnn_both(query, key, value, dout, lse, delta):
    """Its forward and backward."""
    run = functools.partial(jax.nn.dot_product_attention, scale=SCALE, implementation="cudnn")
    out, pull = jax.vjp(run, query, key, value)
    return out, pull(dout)


def main(arguments: list[str] | None = None) -> None:
    """The command line: a line for each contestant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.short_attention", description=__doc__.split("\n")[0])
    for name, default in (("batch", 512), ("tokens", 197), ("heads", 3), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="contestants by name, separated by commas; default: all")
    options = parser.parse_args(arguments)
    first, default = BackwardTiles(3, 64, 4), BackwardTiles(2, 64, 4, True)
    contestants = {f"forward {name}": functools.partial(forward, tiles) for name, tiles in FORWARD.items()}
    contestants |= {
        f"dq {name}": functools.partial(backward, slice(0, 1), BackwardTiles(*t), default) for name, t in DQ.items()
    }
    contestants |= {
        f"dkv {name}": functools.partial(backward, slice(1, 3), first, BackwardTiles(*t)) for name, t in DKV.items()
    }
    contestants |= {"cudnn forward": cudnn, "cudnn forward and backward": cudnn_both}
    if options.only:
        wanted = options.only.split(",")
        if unknown := [name for name in wanted if name not in contestants]:
            parser.error(f"--only={','.join(unknown)}: expected some of {', '.join(contestants)}")
        contestants = {name: contestants[name] for name in wanted}
    print(timing.environment(), flush=True)
    make = functools.partial(draw, (options.batch, options.tokens, options.heads, HEAD_DIM))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = timing.compile_ahead(contestants, jax.eval_shape(make, jax.random.key(0)), pool)
        concurrent.futures.wait(list(futures.values()))
    seconds = timing.median_seconds(futures, timing.input_sets(make), rounds=options.rounds)
    for name, took in seconds.items():
        print(f"{name:32}{took if isinstance(took, str) else f'{1e6 * took:10.1f} us'}", flush=True)


if __name__ == "__main__":
    main()
