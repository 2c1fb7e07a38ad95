"""Times decoding: tokens per second of MoDA and of the same model without depth, beside the memory-bandwidth floor.

    python -m benchmarks.decode [--size=700m|toy] [--batches=1,64] [--layouts=packed,fused,...] [--implementations=xla]

A decode step reads every weight once, and every filled place of the cache. The floor is the time in which these bytes
move at the bandwidth of a measured copy (a copy's bytes count as read and written); the depth stream, which MoDA writes
and reads anew in every step, is not in it, nor is anything that is computed. `of floor` is floor / measured time.

Every form in which a step can be compiled is timed (see `moda_jax.inference.decode`): `scan` cuts a layer's weights
and cache out of a stack, `unroll` compiles each layer, `packed` too, with its matrices side by side; the second word is
the implementation of attention over the cache. `fused`, which is timed where it is named, is `packed` with the whole
attention of a step by kernels of its own, whatever the rows (`fused=True` of `decode.decode`); `packed` has them where
they are the default. Parameters are random: the time does not depend on them. A timed call is one compiled loop over
`steps` tokens of every row, after a prompt of `prompt` tokens; within a layout models and implementations take turns,
and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import profile, timing
from configs import moda_700m
from moda_jax.config import Config, TransformerConfig
from moda_jax.inference import decode
from moda_jax.inference.sampling import GREEDY, row_keys
from moda_jax.model.function import ModelFunction, model_function, split_model
from pallas_kernels import dispatch

RESULTS = Path(__file__).parent / "results"
LAYOUTS = ("scan", "unroll", "packed")
FUSED = "fused"  # one layout more, not timed unless it is named: its kernels do not take every model


@dataclasses.dataclass(frozen=True)
class Size:
    """What is timed: two models that differ in depth alone, prompt and generated tokens, and rows."""

    models: dict[str, TransformerConfig]
    prompt: int
    steps: int
    batches: tuple[int, ...]


def sizes() -> dict[str, Size]:
    """By name; `toy` proves the script on a CPU."""
    paper = {row: Config.from_dict(moda_700m.get_config(row).to_dict()).model for row in ("row4", "row1")}
    toy = TransformerConfig(
        vocab_size=300, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=64,
        max_sequence_length=128,
    )  # fmt: skip
    return {
        "700m": Size({"row4 moda": paper["row4"], "row1 none": paper["row1"]}, 2048, 128, (1, 64)),
        "toy": Size({"moda": toy, "none": dataclasses.replace(toy, depth="none")}, 32, 8, (1, 4)),
    }


@dataclasses.dataclass
class Decoder:
    """A model in one layout, with a cache behind a prompt."""

    model: ModelFunction
    params: Any
    state: decode.DecodeState
    config: TransformerConfig
    prompt: int
    fused: bool | None

    @classmethod
    def start(cls, config: TransformerConfig, batch: int, size: Size, *, layout: str) -> tuple[Decoder, float]:
        """The decoder, and the seconds of a second prompt pass, compiled before."""
        model = model_function(config)
        draw = jax.jit(lambda key: decode.inference_params(split_model(config, key)[1], config))
        options = {"unroll": layout != "scan", "packed": layout in ("packed", FUSED)}
        params = decode.decode_params(draw(jax.random.key(0)), config, **options)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, size.prompt)).astype(np.int32)
        options = {"capacity": size.prompt + size.steps, "padded": False}
        begin = np.zeros(batch, np.int32)
        jax.block_until_ready(decode.prefill(model, params, tokens, begin, **options)[0])
        began = time.perf_counter()
        logits, cache = jax.block_until_ready(decode.prefill(model, params, tokens, begin, **options))
        seconds = time.perf_counter() - began
        keys = row_keys(jax.random.key(0), list(tokens))
        state = decode.start(logits, cache, keys, sampling=GREEDY, vocab_size=config.vocab_size)
        return cls(model, params, state, config, size.prompt, True if layout == FUSED else None), seconds

    def run(self, steps: int, implementation: str) -> float:
        """Seconds of one call of `steps` tokens; the next call starts behind the prompt again."""
        began = time.perf_counter()
        state, tokens = decode.decode(
            self.model, self.params, self.state, num_steps=steps, sampling=GREEDY, vocab_size=self.config.vocab_size,
            implementation=implementation, fused=self.fused,
        )  # fmt: skip
        jax.block_until_ready(tokens)
        seconds = time.perf_counter() - began
        cache = dataclasses.replace(state.cache, length=jnp.int32(self.prompt))
        self.state = dataclasses.replace(state, cache=cache)
        return seconds

    def bytes_per_step(self, steps: int) -> tuple[int, int]:
        """Bytes of weights and of filled cache that a step reads, the mean over the steps."""
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        if not self.config.tie_embeddings:  # one row of the table per token
            weights -= self.params["embedding"]["table"].nbytes
        filled = self.prompt + (steps - 1) / 2
        return weights, round(self.state.cache.nbytes * filled / self.state.cache.capacity)


def implementations() -> tuple[str, ...]:
    """Those that decoding may use on the default device, the best last."""
    return ("xla", *reversed(dispatch.preferred()))


def measure(
    size: Size, batch: int, layout: str, only: tuple[str, ...], rounds: int, bandwidth: float,
    kernels: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per model and implementation, at one batch and layout, of `LAYOUTS` or `FUSED`; `only`: these; `kernels`: a
    directory for the slowest kernels of each."""
    decoders, contestants = {}, {}
    for name, config in size.models.items():
        decoder, prefill = Decoder.start(config, batch, size, layout=layout)
        decoders[name] = decoder
        for implementation in only or implementations():
            began = time.perf_counter()
            decoder.run(size.steps, implementation)
            seconds = time.perf_counter() - began
            print(
                f"{name}, batch {batch}, {layout} {implementation}: first call {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )  # fmt: skip
            contestants[name, implementation] = {
                "model": name, "batch": batch, "form": f"{layout} {implementation}", "prefill_seconds": prefill,
                "compile_seconds": seconds, "seconds": [],
            }  # fmt: skip
    caches = {decoder.state.cache.nbytes for decoder in decoders.values()}
    if len(caches) != 1:
        raise RuntimeError(f"the caches differ in size, {caches} bytes: MoDA's must be plain attention's")
    for _ in range(rounds):
        for (name, implementation), row in contestants.items():
            row["seconds"].append(decoders[name].run(size.steps, implementation) / size.steps)
    for (name, implementation), row in contestants.items():
        if kernels is not None:
            traced = profile.launches(functools.partial(decoders[name].run, size.steps, implementation))
            file = f"decode_{name.split()[0]}_{batch}_{layout}_{implementation}.txt"
            text = profile.kernel_table(profile.kernel_seconds(traced), "") + profile.idle_table(traced)
            (kernels / file).write_text(text)
        weights, cache = decoders[name].bytes_per_step(size.steps)
        seconds = statistics.median(row["seconds"])
        floor = (weights + cache) / bandwidth
        row |= {
            "weight_bytes": weights, "cache_bytes": cache, "milliseconds_per_step": seconds * 1e3,
            "tokens_per_second": batch / seconds, "floor_milliseconds": floor * 1e3, "of_floor": floor / seconds,
            "cache_bytes_per_token": decoders[name].state.cache.nbytes // (batch * decoders[name].state.cache.capacity),
        }  # fmt: skip
    return list(contestants.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [
        f"{'model':10} {'batch':>5}  {'form':13} {'tokens/s':>10} {'ms/step':>9} {'floor ms':>9} {'of floor':>8} "
        f"{'weights GB':>10} {'cache GB':>9} {'prefill s':>9}"
    ]
    lines += [
        f"{r['model']:10} {r['batch']:>5}  {r['form']:13} {r['tokens_per_second']:>10.1f} "
        f"{r['milliseconds_per_step']:>9.3f} {r['floor_milliseconds']:>9.3f} {r['of_floor']:>8.1%} "
        f"{r['weight_bytes'] / 1e9:>10.3f} {r['cache_bytes'] / 1e9:>9.3f} {r['prefill_seconds']:>9.3f}"
        for r in rows
    ]
    return "\n".join(lines)


def run(
    name: str, rounds: int, layouts: tuple[str, ...] = LAYOUTS, names: tuple[str, ...] = (),
    batches: tuple[int, ...] = (), kernels: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All batches of a size, or `batches`; all implementations of the device, or `names`. Printed as they come."""
    on_gpu = jax.default_backend() == "gpu"
    bandwidth = timing.copy_bytes_per_second(2**31 if on_gpu else 2**24)
    size = sizes()[name]
    print(f"{timing.environment()}\ncopy bandwidth {bandwidth / 1e12:.3f} TB/s; {size.prompt} + {size.steps} tokens\n")
    rows = []
    for batch in batches or size.batches:
        for layout in layouts:  # one after the other: their caches need not stand in memory together
            new = measure(size, batch, layout, names, rounds, bandwidth, kernels)
            print(table(new), flush=True)
            rows += new
    return {
        "environment": timing.environment(), "size": name, "copy_bytes_per_second": bandwidth,
        "prompt_tokens": size.prompt, "steps": size.steps, "rounds": rounds, "rows": rows,
    }  # fmt: skip


def main() -> None:
    """Runs one size and writes decode_SIZE.json and decode_SIZE.txt."""
    parser = argparse.ArgumentParser(description="Times decoding beside the memory-bandwidth floor.")
    parser.add_argument("--size", choices=sizes(), default="700m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"comma-separated; also {FUSED}")
    parser.add_argument("--implementations", default="", help="comma-separated; by default all that the device runs")
    parser.add_argument("--batches", default="", help="comma-separated; by default the size's")
    parser.add_argument("--kernels", type=Path, default=None, help="profile each form; its slowest kernels go here")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    layouts, names, batches = (
        tuple(filter(None, text.split(",")))
        for text in (arguments.layouts, arguments.implementations, arguments.batches)
    )
    unknown = set(layouts) - {*LAYOUTS, FUSED}
    if unknown:
        parser.error(f"--layouts: got {sorted(unknown)}, expected some of {(*LAYOUTS, FUSED)}")
    for directory in filter(None, (arguments.output, arguments.kernels)):
        directory.mkdir(parents=True, exist_ok=True)
    result = run(arguments.size, arguments.rounds, layouts, names, tuple(map(int, batches)), arguments.kernels)
    path = arguments.output / f"decode_{arguments.size}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    header = "\n".join(f"{key}: {value}" for key, value in result["environment"].items())
    header += f"\ncopy bandwidth: {result['copy_bytes_per_second'] / 1e12:.3f} TB/s"
    header += f"\n{result['prompt_tokens']} prompt tokens, {result['steps']} generated, median of {result['rounds']}"
    path.with_suffix(".txt").write_text(f"{header}\n\n{table(result['rows'])}\n")
    print(f"\nwritten to {path} and {path.with_suffix('.txt')}")


if __name__ == "__main__":
    main()
