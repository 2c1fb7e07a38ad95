"""A run's directory as training leaves it, with random parameters: what inference loads, without training."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from support.quick_compile import QUICK

from moda_jax.config import Config, TransformerConfig
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.inference.decode import inference_params
from moda_jax.inference.load import LoadedRun
from moda_jax.model.function import ModelFunction, model_function, parameter_kinds, split_model
from moda_jax.parallel.parameters import pad_vocabulary
from moda_jax.tasks.registry import make_task
from moda_jax.training.averaged import restarted_average
from moda_jax.training.checkpoint import Checkpoints
from moda_jax.training.program import state_maker
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY, write_config


def tiny_run_config(**sections) -> Config:
    """A byte model of 3 layers with a context of 64. `sections` override, field by field."""
    values = {
        "model": {
            "vocab_size": 257, "num_layers": 3, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
            "ffn_width": 48, "max_sequence_length": 64, "dtype": "float32", "initializer_range": 0.15,
        },
        "data": {"sequence_length": 32},
        "train": {"num_steps": 10},
        "optimizer": {"warmup_steps": 2},
    }  # fmt: skip
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return Config.from_dict(values)


def save_run(workdir: Path, config: Config, *, steps: tuple[int, ...] = (10,), seed: int = 0) -> dict:
    """Writes config.json and a checkpoint per step, all with the same parameters; returns them without padding. Their
    average, where the config has one, is twice as large."""
    write_config(workdir, config, [])
    initialize = functools.partial(state_maker(config, make_task(config)), seed)
    state = jax.jit(initialize, compiler_options=QUICK)()
    average = jax.tree.map(lambda leaf: 2.0 * leaf, state.params)
    state = dataclasses.replace(state, optimizer_state=restarted_average(state.optimizer_state, average))
    record = {
        "data_position": 0,
        "config": config.to_dict(),
        "dataset_fingerprint": "none",
        "tokenizer_fingerprint": load_tokenizer(config.data).fingerprint,
    }
    checkpoints = Checkpoints(workdir / CHECKPOINT_DIRECTORY, config.checkpoint)
    for step in steps:
        checkpoints.save(step, dataclasses.replace(state, step=np.int32(step)), record | {"step": step})
    checkpoints.close()
    return pad_vocabulary(state.params, parameter_kinds(config.model), config.model.vocab_size)


@functools.cache
def random_model(config: TransformerConfig, seed: int = 0) -> tuple[ModelFunction, dict]:
    """`split_model`, compiled as one program; the caller must not change the dicts."""
    params = jax.jit(lambda key: split_model(config, key)[1], compiler_options=QUICK)(jax.random.key(seed))
    return model_function(config), params


def loaded_run(config: Config, *, seed: int = 0) -> LoadedRun:
    """A run with random parameters as `load_run` gives it, without any file."""
    model, params = random_model(config.model, seed)
    params = inference_params(params, config.model)
    return LoadedRun(Path("runs/random"), config, model, params, load_tokenizer(config.data), 0)


def log_probs(run: LoadedRun, tokens: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities [n, V] after each of n tokens, from one plain forward pass over them.

    The pass is as long as the context, so that one compilation serves all: what stands behind a token is not seen.
    """
    padded = np.zeros((1, run.config.model.max_sequence_length), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(_forward(run.model, run.params, padded), np.float64)[0, : len(tokens)]
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _forward(model: ModelFunction, params: dict, tokens: jax.Array) -> jax.Array:
    return model(params, tokens)
