"""Images per second of a vision transformer's train step, and of the host that feeds it.

    python -m benchmarks.vision [--cases=SIZE:NAME:BATCH:REMAT,...] [--data=FOLDER] [--rounds=3] [--steps=10]
    python -m benchmarks.vision --peer[=PYTHON] [--cases=...]      beside timm's DeiT in PyTorch, in the same call
    python -m benchmarks.vision --make-images=FOLDER:COUNT         JPEGs of smooth noise for --data
    python -m benchmarks.vision --profile --kernels=DIRECTORY      each case's slowest kernels, and its program

A case is DeiT `tiny` or `small`, an argument of its config (none, moda, moda_64l), images of a step and the layer
loop's `remat`. Each runs in a process of its own, on one device. Synthetic images stay on the device: the step alone,
with the config's optimizer and averaged weights. With `--data`, a folder of `train` and `val` with class folders of
JPEGs, the training pipeline is timed with DeiT's whole recipe, first alone, which says what the host can feed, and then
feeding the same steps. Both are steady states: batches are taken as fast as they come until every one that a worker
could have made ahead has passed (`read_ahead_batches`), then timed in whole turns of all workers, which end their
batches together, for `FED_SECONDS` at least. The steps come next and find nothing buffered. MFU is of the GPU's dense
bfloat16 peak.

With `--peer` plain DeiT also runs in PyTorch, as timm has it, under torch.compile (`benchmarks.vision_peer`), once for
every size and batch size of the cases, on synthetic images; "/ peer" is images/s over its, "/ none" over those of our
plain model of the same size, batch and remat. PYTHON is an interpreter with torch and timm, by default this one.
Results are written after every case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import processes, profile, random_images, timing
from configs import deit_small, deit_tiny
from moda_jax.config import Config
from moda_jax.data.cache import cache_directory
from moda_jax.data.image_pipeline import ImageBatch, image_layout
from moda_jax.model.accounting import image_param_count, image_train_flops
from moda_jax.parallel.batches import RowShare
from moda_jax.training import runtime
from moda_jax.training.peak_flops import peak_flops
from moda_jax.training.program import Program
from moda_jax.vision_config import NORMALISATIONS

CONFIGS = {"tiny": deit_tiny.get_config, "small": deit_small.get_config}
CASES = (
    "tiny:none:512:none",
    "tiny:moda:512:none",
    "tiny:moda_64l:128:ffn",
    "small:none:256:none",
    "small:moda:256:none",
)
FED_SECONDS = 10.0  # of the pipeline, and of the steps that it feeds, that count
PEER = processes.Peer("benchmarks.vision_peer", "torch and timm")


def case_config(case: str, data: str | None, workers: int = 8, changes: dict[str, Any] | None = None) -> Config:
    """The config of SIZE:NAME:BATCH:REMAT.

    Args:
        case: see above.
        data: a folder, or None.
        workers: processes that make batches.
        changes: of the model's fields.
    """
    size, name, batch_size, remat = case.split(":")
    values = CONFIGS[size](name).to_dict()
    values["model"] |= {"remat": remat} | (changes or {})
    values["train"] |= {"batch_size": int(batch_size), "accumulation_steps": 1}
    values["data"] |= {"source": data or "imagenet", "train_split": "train", "validation_split": "val"}
    values["data"]["images"] |= {"workers": workers}
    values["eval"] |= {"interval_steps": 0}
    return Config.from_dict(values)


def run_case(
    config: Config, case: str, data: str | None, rounds: int, steps: int, profiled: bool, kernels: Path | None = None
) -> dict[str, Any]:
    """Measures one case, whose config it is, in this process. kernels: a directory for a profiled case's tables.

    Returns:
        Images per second of the step, of the step that the pipeline feeds and of the pipeline alone (None without
        `data`), MFU, with `profiled` where a step's time goes, and what they were measured on.
    """
    program = Program(config, devices=jax.devices()[:1])
    state = program.initialize()
    began = time.perf_counter()
    compiled = program.trace_train_step().lower().compile()
    compile_seconds = time.perf_counter() - began
    holder = [state]

    def feed(batches: Iterator[Any]) -> Callable[[], Any]:
        def one() -> Any:
            holder[0], metrics = compiled(holder[0], next(batches), program.plan)
            return metrics

        return one

    synthetic = jax.device_put(random_batch(config))
    on_device = feed(iter(lambda: synthetic, None))
    found = {"step": _images_per_second(on_device, config, rounds, steps)}
    found |= {"fed_step": None, "pipeline": None}
    if data:
        with program.task.open_data(RowShare(0, 1)).train_batches(0) as batches:
            turn, ahead = max(config.data.images.workers, 1), read_ahead_batches(config)
            for name, one, skipped in (
                ("pipeline", lambda: next(batches).row_mask, ahead), ("fed_step", feed(batches), turn),
            ):  # fmt: skip
                found[name] = config.train.batch_size * steady_calls_per_second(one, skipped, turn)
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, "bfloat16")
    result = {
        "case": case,
        "images_per_second": found,
        "mfu": found["step"] * image_train_flops(config.model) / peak if peak else None,
        "parameters": image_param_count(config.model),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
        "environment": timing.environment(),
    }
    if profiled and device.platform == "gpu":
        traced, text = profile.launches(on_device), compiled.as_text()
        seconds = profile.kernel_seconds(traced)
        result["seconds_by_category"] = profile.seconds_by_category(seconds, text)
        if kernels is not None:
            kernels.mkdir(parents=True, exist_ok=True)
            path = kernels / f"{case.replace(':', '_')}.txt"
            path.write_text(profile.kernel_table(seconds, text) + profile.idle_table(traced), encoding="utf-8")
            path.with_suffix(".hlo").write_text(text, encoding="utf-8")
    return result


def peer_name(case: str) -> str:
    """Of the peer's result that a case is compared with: one for each size and batch size."""
    size, _, batch_size, _ = case.split(":")
    return f"peer:{size}:{batch_size}"


def plain_name(case: str) -> str:
    """The case without depth of the same size, batch size and remat."""
    size, _, *rest = case.split(":")
    return ":".join((size, "none", *rest))


def peer_request(case: str, config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """What `benchmarks.vision_peer` is asked for: plain DeiT of the case's size, batch size and images."""
    image, mean_and_deviation = config.model.image, NORMALISATIONS[config.data.images.normalisation]
    return {
        "model": f"deit_{case.split(':')[0]}_patch16_224",
        "arguments": {"num_classes": image.num_classes, "drop_path_rate": config.model.stochastic_depth},
        "batch_size": config.train.batch_size, "shape": [image.channels, image.size, image.size],
        "num_classes": image.num_classes, "label_smoothing": config.data.images.label_smoothing,
        "mean": mean_and_deviation[0], "deviation": mean_and_deviation[1], "ema_decay": config.optimizer.ema_decay,
        "steps": steps, "rounds": rounds, "seed": 0,
    }  # fmt: skip


def run_peer(python: str, case: str, config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """The peer's result in the form of ours, or {"case", "error"}."""
    result = PEER.run(python, peer_name(case), peer_request(case, config, rounds, steps))
    if "error" in result:
        return result
    speed = config.train.batch_size / statistics.median(result["seconds_per_step"])
    peak = peak_flops(result["device"], "bfloat16")
    mfu = speed * image_train_flops(case_config(plain_name(case), None).model) / peak if peak else None
    return result | {"images_per_second": {"step": speed, "fed_step": None, "pipeline": None}, "mfu": mfu}


def table(results: list[dict[str, Any]]) -> str:
    """What a person reads."""
    speeds = {r["case"]: r["images_per_second"]["step"] for r in results if "error" not in r}
    lines = [
        f"{'case':24} {'images/s':>9} {'ms/step':>8} {'MFU':>6} {'peak GiB':>9} {'compile s':>9} {'fed':>8} "
        f"{'pipeline':>8} {'/ none':>7} {'/ peer':>7}"
    ]
    for r in results:
        case = r["case"]
        if "error" in r:
            lines.append(f"{case:24} {r['error']}")
            continue
        speed, mfu, peak = speeds[case], r["mfu"], r["peak_bytes"]
        fed, pipeline = (r["images_per_second"][key] for key in ("fed_step", "pipeline"))
        ours = not case.startswith("peer:")
        peer, plain = (speeds.get(name(case)) if ours else None for name in (peer_name, plain_name))
        cells = (
            (f"{1e3 * int(case.split(':')[2]) / speed:.1f}", 8), (f"{100 * mfu:.1f}%" if mfu else "-", 6),
            (f"{peak / 2**30:.1f}" if peak else "-", 9), (f"{r['compile_seconds']:.1f}", 9),
            (f"{fed:.0f}" if fed else "-", 8), (f"{pipeline:.0f}" if pipeline else "-", 8),
            (f"{speed / plain:.3f}" if plain else "-", 7), (f"{speed / peer:.3f}" if peer else "-", 7),
        )  # fmt: skip
        lines.append(f"{case:24} {speed:9.0f} " + " ".join(f"{text:>{width}}" for text, width in cells))
    profiled = [r for r in results if "seconds_by_category" in r]
    if profiled:
        names = list(dict.fromkeys(name for r in profiled for name in r["seconds_by_category"]))
        lines += ["", f"{'ms of one step':28}" + "".join(f"{r['case']:>24}" for r in profiled)]
        for name in names:
            cells = "".join(f"{1e3 * r['seconds_by_category'].get(name, 0.0):24.1f}" for r in profiled)
            lines.append(f"{name:28}{cells}")
    return "\n".join(lines)


def random_batch(config: Config) -> ImageBatch:
    """Noise with labels."""
    source, layout = np.random.default_rng(0), image_layout(config.train.batch_size, config.model.image)
    rows = config.train.batch_size
    labels = source.integers(0, config.model.image.num_classes, (rows, 1), dtype=np.int32)
    return ImageBatch(
        images=source.integers(0, 256, layout.images.shape, dtype=np.uint8),
        labels=np.repeat(labels, 2, axis=1),
        label_shares=np.tile(np.float32([1, 0]), (rows, 1)),
        row_mask=np.ones(rows, np.float32),
        seeds=np.arange(rows, dtype=np.uint32),
    )


def read_ahead_batches(config: Config) -> int:
    """At most so many batches lie ready, or are being made, when nobody takes any: of every worker what it reads ahead,
    what it waits to hand over, and what stands between the processes."""
    return max(config.data.images.workers, 1) * (config.data.prefetch_batches + 2)


def steady_calls_per_second(one: Callable[[], Any], skipped: int, turn: int) -> float:
    """Of calls that wait for what others make ahead of them.

    Args:
        one: a call; its result is waited for at the end of a turn.
        skipped: calls before the first that counts: what was made ahead.
        turn: calls of one turn of all who make something.
    """
    for _ in range(skipped):
        last = one()
    jax.block_until_ready(last)
    began, calls, seconds = time.perf_counter(), 0, 0.0
    while seconds < FED_SECONDS:
        for _ in range(turn):
            last = one()
        jax.block_until_ready(last)
        calls, seconds = calls + turn, time.perf_counter() - began
    return calls / seconds


def _images_per_second(one: Callable[[], Any], config: Config, rounds: int, steps: int) -> float:
    """The median over the rounds, after two steps that do not count."""
    for _ in range(2):
        jax.block_until_ready(one())
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            last = one()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - began) / steps)
    return config.train.batch_size / statistics.median(seconds)


def main(arguments: list[str] | None = None) -> None:
    """The command line: a table as the cases end, and all of it in `--output`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="SIZE:NAME:BATCH:REMAT, separated by commas")
    parser.add_argument("--data", help="a folder of class folders of JPEGs")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches; 0: threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--model", default="{}", help="JSON: other fields of the model")
    parser.add_argument("--profile", action="store_true", help="also say where a step's time goes (on a GPU)")
    parser.add_argument("--kernels", type=Path, metavar="DIRECTORY",
                        help="with --profile: write each case's slowest kernels there, and its HLO")  # fmt: skip
    parser.add_argument("--peer", nargs="?", const=sys.executable, metavar="PYTHON",
                        help="also time timm's DeiT in PyTorch, with this interpreter")  # fmt: skip
    parser.add_argument("--make-images", metavar="FOLDER:COUNT", help="write random JPEGs for --data, and end")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    if options.kernels and not options.profile:
        parser.error("--kernels: expected --profile beside it")
    if options.make_images:
        try:
            print(random_images.write_splits(*random_images.parse_request(options.make_images)))
        except ValueError as error:
            parser.error(f"--make-images={options.make_images}: {error}")
        return
    cases, changes = options.cases.split(","), json.loads(options.model)
    configs = {case: case_config(case, options.data, options.workers, changes) for case in cases}
    if processes.is_child():
        if options.profile:  # a kernel in a command buffer does not say which instruction launched it
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
        (case,) = cases
        runtime.prepare(cache_directory(configs[case].data))
        result = run_case(
            configs[case], case, options.data, options.rounds, options.steps, options.profile, options.kernels
        )
        print(json.dumps(result))
        return
    if options.peer:
        try:
            print(f"peer: {PEER.check(options.peer)}", flush=True)
        except ValueError as error:
            parser.error(str(error))
    results: list[dict[str, Any]] = []

    def add(result: dict[str, Any]) -> None:
        if not any("environment" in r for r in results) and "environment" in result:
            print(result["environment"], flush=True)
        results.append(result)
        print(table(results).splitlines()[len(results)], flush=True)
        if options.output is not None:
            _write(options.output, results)

    print(table([]), flush=True)
    for case in cases:
        if options.peer and peer_name(case) not in {r["case"] for r in results}:
            add(run_peer(options.peer, case, configs[case], options.rounds, options.steps))
        add(processes.run_case("benchmarks.vision", case, [*arguments, f"--cases={case}"]))
    print(f"\n{table(results)}")


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    """All results so far, at once: a file that is there is whole."""
    environment = next((r["environment"] for r in results if "environment" in r), {})
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    main()
