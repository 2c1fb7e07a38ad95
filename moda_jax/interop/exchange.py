"""Models to and from directories of config.json and model.safetensors.

A model that is OLMo 2 (`depth="none", norm="post", qk_norm=True`) is written as transformers saves an
`Olmo2ForCausalLM`, which its `from_pretrained` reads. Any other model has the same tensor names, the extra projections
of its depth mechanism beside them, and `model_type` "moda_jax" with our config's fields: transformers refuses it by
name instead of reading half of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from moda_jax.config import TransformerConfig, check_local
from moda_jax.interop.olmo2 import SINGLE_FILE, layers_of, load_olmo2, read_transformer, sources_of
from moda_jax.interop.olmo_core import is_olmo_core, load_olmo_core
from moda_jax.model.transformer import Transformer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
OWN_TYPE = "moda_jax"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def is_olmo2(config: TransformerConfig) -> bool:
    """Whether the model is one that transformers knows as OLMo 2."""
    plain = (config.norm_kind, config.ffn, config.biases, config.causal) == ("rms", "swiglu", False, True)
    normed = config.norm == "post" and config.qk_norm and not config.qk_norm_per_head
    return config.depth == "none" and normed and plain


def is_export(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds what `export_model` or transformers wrote: its config.json names the model's type."""
    try:
        values = json.loads((pathlib.Path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "model_type" in values


def export_model(
    config: TransformerConfig,
    params: Any,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    end_of_text_id: int | None = None,
    tokenizer_file: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Writes config.json and model.safetensors.

    Args:
        config: of the model.
        params: nested dicts, see `TrainState`.
        directory: created; must not hold a model yet.
        dtype: of the tensors, "float32", "bfloat16" or "float16".
        end_of_text_id: the token that ends a document, for transformers' `generate`.
        tokenizer_file: a tokenizer.json to copy beside the weights.

    Returns:
        The directory.

    Raises:
        ValueError: an unknown dtype, or a directory that holds a model or cannot be written.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {EXPORT_DTYPES}")
    check_local("directory", str(directory))
    directory = pathlib.Path(directory)
    for name in (CONFIG_FILE, SINGLE_FILE):
        if (directory / name).exists():
            raise ValueError(f"{directory}: holds {name} already; name another directory")
    tensors = {}
    for path, leaf in nnx.traversals.flatten_mapping(params).items():
        array = np.asarray(leaf, np.float32)
        sources = sources_of(path, array.shape, config)
        for source, layer in zip(sources, layers_of(array, sources), strict=True):
            tensors[source.name] = np.ascontiguousarray(source.store(layer)).astype(jnp.dtype(dtype))
    values = _olmo2_values(config) if is_olmo2(config) else _own_values(config)
    values |= {"dtype": dtype, "torch_dtype": dtype, "eos_token_id": end_of_text_id}
    values |= {"bos_token_id": None, "pad_token_id": None}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        weights = directory / SINGLE_FILE
        weights.touch()
        mode = weights.stat().st_mode  # as the umask says; the library makes its files for their owner alone
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(mode)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, directory / TOKENIZER_FILE)
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")  # last: a directory with it is complete
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error})") from error
    return directory


def load_model(
    directory: str | os.PathLike[str], *, dtype: str | None = None, attention_implementation: str | None = None
) -> tuple[TransformerConfig, Transformer]:
    """A model from what `export_model`, transformers (OLMo 2) or OLMo-core wrote.

    Arguments, result and errors as in `load_olmo2` and `load_olmo_core`.
    """
    directory = pathlib.Path(directory)
    options = {"dtype": dtype, "attention_implementation": attention_implementation}
    everything = _config_values(directory / CONFIG_FILE)
    if is_olmo_core(everything):
        return load_olmo_core(directory, **options)
    if everything.get("model_type") != OWN_TYPE:
        return load_olmo2(directory, **options)
    values = everything.get(OWN_TYPE)
    if not isinstance(values, dict):
        raise ValueError(f"{directory / CONFIG_FILE}: {OWN_TYPE}={values!r}: expected an object, the model's config")
    try:
        config = TransformerConfig.from_dict(values | options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: not a model of this version of moda_jax ({error})") from error
    return config, read_transformer(directory, config)


def _config_values(path: pathlib.Path) -> dict[str, Any]:
    """The file's object; {} of a file without one, whose error is `load_olmo2`'s."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: holds no {CONFIG_FILE}; expected a directory of config.json and safetensors")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _olmo2_values(config: TransformerConfig) -> dict[str, Any]:
    """config.json of an Olmo2ForCausalLM: the rotary base stands where transformers 4 looks and where 5 does."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _own_values(config: TransformerConfig) -> dict[str, Any]:
    """config.json of any other model: TransformerConfig's fields, less what belongs to the machine."""
    fields = dataclasses.asdict(config)
    for field in ("dtype", "attention_implementation"):
        del fields[field]
    return {"architectures": ["MoDATransformer"], "model_type": OWN_TYPE, OWN_TYPE: fields}
