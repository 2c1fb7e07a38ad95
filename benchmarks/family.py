"""Times every depth mechanism on the paper's 700M model: a train step, a step of decoding, and their memory.

    python -m benchmarks.family [--names=none,moda,attnres,...] [--devices=all] [--batch=8] [--remat=none]
                                [--output=DIRECTORY]

A name is one of configs/family.py, here with 36 layers of the 700M model (Table 3, row 1), pre-norm, on rows of 4096
tokens. Each has a process of its own; several GPUs work beside each other, one process on each. It trains on random
tokens as `benchmarks.training` does, then decodes as `benchmarks.decode` does.

"/ none" is the step over that of `none`. "floor" is how long the step's traffic with the stream takes at the bandwidth
of a measured copy, if every read moves the slots that it meets once forward, and backward once more beside a gradient
that is read and written; "/ floor" is what the mechanism adds to the step of `none`, over that. Mechanisms without a
stream of slots (hc, mhc) have none. "stream" is what a token's slots take in 16 bits while it trains.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import queue
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import processes

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

RESULTS = Path(__file__).parent / "results"
BASE = "none"
TRAFFIC = 4  # bytes that move for a byte that is read: forward, backward, and the gradient there and back
TOY = {
    "vocab_size": 300, "num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "ffn_width": 32, "max_sequence_length": 128,
}  # fmt: skip


def model_fields(name: str, *, toy: bool) -> dict[str, Any]:
    """What `name` changes in row 1 of configs/moda_700m.py."""
    from configs.family import NAMES

    return {"norm": "pre"} | NAMES[name] | (TOY if toy else {})


def stream_bytes(config: TransformerConfig) -> tuple[int, int]:
    """Of one token, computed in 16 bits: (all its slots, what its reads move forward, summed over the layers)."""
    import jax
    import jax.numpy as jnp

    from moda_jax.model.depth.registry import find_mechanism
    from moda_jax.model.initial_keys import InitialKeys

    mechanism = find_mechanism(config.depth)

    def begin() -> Any:
        last = mechanism.build(config, last=True, rngs=InitialKeys(jax.random.key(0)))
        return last.begin(config, jnp.zeros((1, 1, config.width), jnp.bfloat16))[1].buffers

    slots = mechanism.slots(config)
    held = sum(buffer.size * buffer.dtype.itemsize for buffer in jax.eval_shape(begin))
    return held, held // slots * mechanism.slots_read(config) if slots else 0


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one mechanism in this process, on the first device."""
    import jax

    from benchmarks import decode, timing, training
    from configs import moda_700m
    from moda_jax.config import Config

    fields = model_fields(name, toy=arguments.toy)
    given = argparse.Namespace(
        model=json.dumps(fields), sequence_length=arguments.sequence_length, data=None, steps=arguments.steps,
        rounds=arguments.rounds, profile=False, kernels=None,
    )  # fmt: skip
    result = training.run_case(training.Case("row1", arguments.batch, arguments.remat), given)
    values = moda_700m.get_config("row1").to_dict()
    values["model"] |= {"dtype": "bfloat16"} | fields
    values["data"] |= {"sequence_length": arguments.sequence_length}
    config = Config.from_dict(values).model
    held, read = stream_bytes(config)
    bandwidth = timing.copy_bytes_per_second(2**31 if jax.default_backend() == "gpu" else 2**24)
    result |= {
        "case": name, "stream_bytes": held, "stream_bytes_read": read, "copy_bytes_per_second": bandwidth,
        "floor_seconds": TRAFFIC * read * arguments.batch * arguments.sequence_length / bandwidth,
    }  # fmt: skip
    if not arguments.decode_batch:
        return result
    try:
        size = decode.Size({name: config}, arguments.prompt, arguments.decode_steps, (arguments.decode_batch,))
        only = (decode.implementations()[-1],)
        (row,) = decode.measure(size, arguments.decode_batch, "unroll", only, arguments.rounds, bandwidth)
        result["decode"] = row
    except jax.errors.JaxRuntimeError as error:  # the train step stands, whatever decoding takes
        result["decode_error"] = str(error).splitlines()[0][:200]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """What a person reads."""
    base = next((r for r in results if r["case"] == BASE and "error" not in r), None)
    lines = [
        f"{'mechanism':26} {'ms/step':>8} {'/ none':>7} {'tokens/s':>9} {'floor ms':>9} {'/ floor':>8} {'peak GiB':>9} "
        f"{'stream B':>9} {'decode ms':>10} {'cache B':>8}"
    ]
    for r in results:
        if "error" in r:
            lines.append(f"{r['case']:26} {r['error']}")
            continue
        seconds = statistics.median(r["seconds_per_step"])
        before = statistics.median(base["seconds_per_step"]) if base else float("nan")
        floor = r["floor_seconds"]
        of_floor = f"{(seconds - before) / floor:.2f}" if floor and base else "-"
        peak = f"{r['peak_bytes'] / 2**30:.1f}" if r["peak_bytes"] else "-"
        row = r.get("decode")
        decoding = f"{row['milliseconds_per_step']:.2f}" if row else "-"
        cache = f"{row['cache_bytes_per_token']}" if row and "cache_bytes_per_token" in row else "-"
        lines.append(
            f"{r['case']:26} {1e3 * seconds:8.1f} {seconds / before:7.2f} {r['tokens_per_second']:9.0f} "
            f"{1e3 * floor:9.1f} {of_floor:>8} {peak:>9} {r['stream_bytes']:>9,} {decoding:>10} {cache:>8}"
        )
    lines += [f"{r['case']}: no decoding: {r['decode_error']}" for r in results if "decode_error" in r]
    return "\n".join(lines)


def _in_process(name: str, device: str, argv: list[str]) -> dict[str, Any]:
    environment = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    return processes.run_case("benchmarks.family", name, [*argv, f"--names={name}"], environment)


def measure(
    names: list[str], devices: list[str], argv: list[str], write: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Every name; each device has one process at a time. `write` gets all results so far, in the order of the names."""
    results: dict[str, dict[str, Any]] = {}
    free: queue.Queue[str] = queue.Queue()
    writing = threading.Lock()
    for device in devices:
        free.put(device)

    def one(name: str) -> None:
        device = free.get()
        try:
            result = _in_process(name, device, argv)
        finally:
            free.put(device)
        print(table([result]).splitlines()[1], flush=True)
        with writing:
            results[name] = result
            write([results[name] for name in names if name in results])

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(one, names))


def main() -> None:
    """Runs the mechanisms and writes family_700m.json and family_700m.txt."""
    from configs.family import NAMES
    from experiments.runner import find_devices

    parser = argparse.ArgumentParser(description="Times every depth mechanism on the 700M model.")
    parser.add_argument("--names", default=",".join(NAMES), help="of configs/family.py, comma-separated")
    parser.add_argument("--devices", default="all", help="all, a number of GPUs, or cpu")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a train step")
    parser.add_argument("--remat", default="none", help="as model.remat")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5, help="steps of a timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--decode-batch", type=int, default=64, help="rows that decode together; 0: none, which is sooner done"
    )
    parser.add_argument("--decode-steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before the decoded ones")
    parser.add_argument("--toy", action="store_true", help="a toy model, which proves the script on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = arguments.names.split(",")
    for name in names:
        if name not in NAMES:
            parser.error(f"--names: unknown mechanism {name!r}; known: {', '.join(NAMES)}")
    if processes.is_child():
        from moda_jax.config import DataConfig
        from moda_jax.data.cache import cache_directory
        from moda_jax.training import runtime

        runtime.prepare(cache_directory(DataConfig()), deterministic=False)
        print(json.dumps(run(names[0], arguments)))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "family_700m.json"

    def write(results: list[dict[str, Any]]) -> None:
        environment = next((r["environment"] for r in results if "environment" in r), {})
        path.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
        path.with_suffix(".txt").write_text(f"{environment}\n{table(results)}\n")

    measure(names, find_devices(arguments.devices), sys.argv[1:], write)
    print(f"\n{path.with_suffix('.txt').read_text()}\nwritten to {path}")


if __name__ == "__main__":
    main()
