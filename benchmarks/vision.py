"""Images per second of a vision transformer's train step, and of the host that feeds it.

    python -m benchmarks.vision [--cases=SIZE:NAME:BATCH:REMAT,...] [--data=FOLDER] [--rounds=3] [--steps=10]

A case is DeiT `tiny` or `small`, an argument of its config (none, moda, moda_64l), images of a step and the layer
loop's `remat`. Synthetic images stay on the device: the step alone. With `--data`, a folder of `train` and `val` with
class folders of JPEGs, the same steps are fed by the training pipeline with DeiT's whole recipe; and the pipeline is
timed without a step, which says what the host could feed. One device. MFU is of the GPU's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from configs import deit_small, deit_tiny
from moda_jax.config import Config
from moda_jax.data.image_pipeline import ImageBatch, image_layout
from moda_jax.model.accounting import image_param_count, image_train_flops
from moda_jax.parallel.batches import RowShare
from moda_jax.training.peak_flops import peak_flops
from moda_jax.training.program import Program

CONFIGS = {"tiny": deit_tiny.get_config, "small": deit_small.get_config}
CASES = (
    "tiny:none:512:none",
    "tiny:moda:512:none",
    "tiny:moda_64l:128:ffn",
    "small:none:256:none",
    "small:moda:256:none",
)


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


def run_case(config: Config, case: str, data: str | None, rounds: int, steps: int) -> dict[str, Any]:
    """Measures one case, whose config it is.

    Returns:
        Images per second of the step, of the step that the pipeline feeds and of the pipeline alone (None without
        `data`), MFU, and what they were measured on.
    """
    program = Program(config, devices=jax.devices()[:1])
    state = program.initialize()
    compiled = program.trace_train_step().lower().compile()
    holder = [state]

    def feed(batches: Iterator[Any]) -> Callable[[], Any]:
        def one() -> Any:
            holder[0], metrics = compiled(holder[0], next(batches), program.plan)
            return metrics

        return one

    synthetic = jax.device_put(random_batch(config))
    found = {"step": _images_per_second(feed(iter(lambda: synthetic, None)), config, rounds, steps)}
    found |= {"fed_step": None, "pipeline": None}
    if data:
        with program.task.open_data(RowShare(0, 1)).train_batches(0) as batches:
            found["fed_step"] = _images_per_second(feed(batches), config, rounds, steps)
            found["pipeline"] = _images_per_second(lambda: next(batches).row_mask, config, rounds, steps)
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, "bfloat16")
    return {
        "case": case,
        "images_per_second": found,
        "mfu": found["step"] * image_train_flops(config.model) / peak if peak else None,
        "parameters": image_param_count(config.model),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "environment": timing.environment(),
    }


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
    """The command line: a JSON line for each case, and all of them in `--output`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="SIZE:NAME:BATCH:REMAT, separated by commas")
    parser.add_argument("--data", help="a folder of class folders of JPEGs")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches; 0: threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--model", default="{}", help="JSON: other fields of the model")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    results = []
    for case in options.cases.split(","):
        config = case_config(case, options.data, options.workers, json.loads(options.model))
        results.append(run_case(config, case, options.data, options.rounds, options.steps))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "environment"}), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
