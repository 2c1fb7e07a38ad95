"""One run of a plan in a process of its own: train, evaluate, probe, write result.json.

    python -m experiments.worker DIRECTORY [PARENT]

DIRECTORY is the run's (an ordinary one) and holds order.json, see `experiments.runner`. Whatever of the work is done
already is not done again. PARENT is the process to end with, see `experiments.lifeline`. The exit code is train.py's:
FINISHED says that result.json is written.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

from experiments.lifeline import end_with
from moda_jax.config import Config, TransformerConfig
from moda_jax.data.cache import cache_directory
from moda_jax.data.pipeline import validation_batches
from moda_jax.data.token_store import open_tokens
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.exit_codes import ExitCode
from moda_jax.inference import depth_probes
from moda_jax.inference.decode import inference_params
from moda_jax.inference.load import LoadedRun, restore_params
from moda_jax.interop.start import starting_params
from moda_jax.model.accounting import param_count
from moda_jax.model.function import model_function
from moda_jax.tasks.language import LanguageObjective
from moda_jax.training import runtime
from moda_jax.training.checkpoint import newest_good_step
from moda_jax.training.console import user_errors
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.signals import stops_before_training
from moda_jax.training.train_step import make_eval_step
from moda_jax.training.trainer import TrainingRun
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY

ORDER_FILE = "order.json"
TRAINING_FILE = "training.json"
RESULT_FILE = "result.json"
_RECORDED_VERSIONS = ("jax", "jaxlib", "flax", "optax")
_VALIDATION = "validation/"

_logger = logging.getLogger("moda_jax.experiments")


def main() -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("moda_jax").setLevel(logging.INFO)
    if len(sys.argv) > 2 and not end_with(int(sys.argv[2])):
        return ExitCode.STOPPED
    directory = Path(sys.argv[1])
    order = json.loads((directory / ORDER_FILE).read_text())
    with user_errors(), stops_before_training():
        config = Config.from_dict(order["config"])
        runtime.prepare(cache_directory(config.data), deterministic=config.train.deterministic)
        runtime.require_device()
        run = TrainingRun(config, directory, starting_params)
    if not run.is_finished:
        began = time.monotonic()
        result = run.train()
        if result.exit_code != ExitCode.FINISHED:
            return result.exit_code
        memory = jax.devices()[0].memory_stats() or {}
        _write(directory / TRAINING_FILE, {
            "peak_bytes": memory.get("peak_bytes_in_use"), "seconds": time.monotonic() - began,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        })  # fmt: skip
    config = run.config
    del run  # and with it the optimizer's state on the device
    began = time.monotonic()
    evaluation, probes = {}, None
    if order["evaluation"]:
        loaded = _load(directory, config)
        evaluation = evaluate(loaded, order["evaluation"])
        _logger.info("evaluated in %.1f s", time.monotonic() - began)
    if order["probes"] and order["evaluation"] and config.model.has_depth_probes:
        began = time.monotonic()
        batches = depth_probes.probe_batches(loaded, order["probe_tokens"])
        loaded = dataclasses.replace(loaded, params=inference_params(loaded.params, config.model))
        probes = depth_probes.probe(loaded, batches)
        _logger.info("probed in %.1f s", time.monotonic() - began)
    _write(directory / RESULT_FILE, result_of(directory, order, config, evaluation, probes))
    return ExitCode.FINISHED


def _load(directory: Path, config: Config) -> LoadedRun:
    """The run with float32 parameters, as training evaluates them: the compiled evaluation is training's."""
    step, _ = newest_good_step(directory / CHECKPOINT_DIRECTORY)
    params = restore_params(directory / CHECKPOINT_DIRECTORY / str(step), config, padded=True)
    return LoadedRun(directory, config, model_function(config.model), params, load_tokenizer(config.data), step)


def evaluate(run: LoadedRun, sets: dict[str, str]) -> dict[str, Any]:
    """Loss on each evaluation set, whole, in rows as in training; "validation" is all of the validation sets.

    Args:
        run: with float32 parameters.
        sets: name -> directory of tokens.

    Returns:
        name -> {"loss": nats per target, "targets": their number}.
    """
    config = run.config
    eval_step = jax.jit(make_eval_step(LanguageObjective(run.model), config.train))
    results, total, targets = {}, 0.0, 0.0
    for name, directory in sets.items():
        dataset = open_tokens(Path(directory), run.tokenizer)
        batches = validation_batches(dataset, config.data, batch_size=config.train.batch_size)
        sums = [eval_step(run.params, batch) for batch in batches]
        loss, count = (sum(float(getattr(s, field)) for s in sums) for field in ("loss", "num_targets"))
        results[name] = {"loss": round(loss / max(count, 1.0), 6), "targets": round(count)}
        if name.startswith(_VALIDATION):
            total, targets = total + loss, targets + count
    results["validation"] = {"loss": round(total / max(targets, 1.0), 6), "targets": round(targets)}
    return results


def result_of(
    directory: Path, order: dict[str, Any], config: Config, evaluation: dict[str, Any], probes: dict[str, Any] | None
) -> dict[str, Any]:
    """What is kept of a run: small, and without a path of this machine."""
    training = json.loads((directory / TRAINING_FILE).read_text()) if (directory / TRAINING_FILE).is_file() else {}
    entries = read_metrics(directory)
    values = config.to_dict()
    for field in ("source", "tokenizer", "cache_dir"):
        values["data"].pop(field)
    device = jax.devices()[0]
    return {
        "plan": order["plan"],
        "arm": order["arm"],
        "seed": config.train.seed,
        "budget": order["budget"],
        "corpus": order["corpus"],
        "config": values,
        "steps": config.train.num_steps,
        "tokens": config.train.num_steps * config.train.batch_size * config.data.sequence_length,
        "parameters": param_count(config.model),
        "decode": decode_bytes(config.model),
        "tokens_per_second": _median(entries, "tokens_per_second"),
        "mfu": _median(entries, "mfu"),
        "skipped_updates": entries[-1]["skipped_updates"] if entries else None,
        "loss_spikes": entries[-1]["loss_spikes"] if entries else None,
        "peak_bytes": training.get("peak_bytes"),
        "train_seconds": training.get("seconds"),
        "finished": training.get("finished"),
        "evaluation": evaluation,
        "curve": [[entry["step"], _rounded(entry["loss"])] for entry in entries],
        "validation_curve": [[e["step"], _rounded(e["validation_loss"])] for e in entries if "validation_loss" in e],
        "depth_mass": [[e["step"], _rounded(e["depth_mass"])] for e in entries if "depth_mass" in e],
        "probes": probes,
        "environment": {
            "device": device.device_kind,
            "python": platform.python_version(),
            "commit": order["commit"],
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            **{name: importlib.metadata.version(name) for name in _RECORDED_VERSIONS},
        },
    }


def decode_bytes(config: TransformerConfig) -> dict[str, int]:
    """Bytes that decoding keeps: for every token of the text, and for the token that is being decoded alone."""
    size = 4 if config.dtype == "float32" else 2
    numbers = 2 * config.num_kv_heads * config.head_dim
    slots = config.depth_slots * numbers * (size if config.moda.entry_dtype is None else 1)
    return {"cache_bytes_per_token": config.num_layers * numbers * size, "depth_bytes": slots}


def _median(entries: list[dict[str, Any]], key: str) -> float | None:
    """Of the second half of a run's lines: nothing of its start."""
    values = [entry[key] for entry in entries[len(entries) // 2 :] if entry.get(key) is not None]
    return float(f"{statistics.median(values):.6g}") if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _write(path: Path, values: dict[str, Any]) -> None:
    """All or nothing."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
