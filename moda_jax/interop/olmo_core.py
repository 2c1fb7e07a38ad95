"""OLMo-core checkpoints: reads config.json and state dict, of DepthBench's MoDA models (arXiv 2609.32534) too.

A checkpoint is a directory with the experiment's config.json, whose section `model` describes the model, and weights:
model.safetensors (or an index and files), or model.pt, a state dict as torch saves it, for which torch is needed. What
OLMo-core itself stores, model_and_optim, torch makes one file of:

    python -m torch.distributed.checkpoint.format_utils dcp_to_torch CHECKPOINT/model_and_optim CHECKPOINT/model.pt

Of the blocks, these are known: `default` (pre-norm), `post_norm` (norm(x + f(x))) and `reordered_norm` (OLMo 2's), and
with mixture-of-depths attention `moda` (pre-norm) and `post_norm_moda`. There a depth key is stored before rotation,
behind the writing layer's key norm where the model has one: `moda.key="writer_norm"`, which without a QK-norm is the
projection itself. The query meets it rotated, and the FFN writes an entry too.

A linear layer's weight is stored as in OLMo 2's files (see `olmo2`), and rotary pairs are (i, i + H/2) there too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from moda_jax.config import TransformerConfig
from moda_jax.depth_config import MoDASection
from moda_jax.interop.olmo2 import (
    Files,
    open_safetensors,
    positive_int,
    positive_number,
    read_json,
    read_transformer,
)
from moda_jax.model.transformer import Transformer

TORCH_FILE = "model.pt"
DISTRIBUTED = "model_and_optim"
PREFIX = "model."  # of the model's tensors in a state dict that holds an optimizer's too

# Block -> (model.norm, model.depth).
BLOCKS = {
    "default": ("pre", "none"),
    "post_norm": ("post_sum", "none"),
    "reordered_norm": ("post", "none"),
    "moda": ("pre", "moda"),
    "post_norm_moda": ("post_sum", "moda"),
}
# Name in an OLMo 2 file -> name here. A MoDA block holds attention and FFN in one more module, {0} and {1}.
OUTER_NAMES = {
    "model.embed_tokens.weight": "embeddings.weight",
    "model.norm.weight": "lm_head.norm.weight",
    "lm_head.weight": "lm_head.w_out.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj.weight": "attention.{0}w_q.weight",
    "self_attn.k_proj.weight": "attention.{0}w_k.weight",
    "self_attn.v_proj.weight": "attention.{0}w_v.weight",
    "self_attn.o_proj.weight": "attention.{0}w_out.weight",
    "self_attn.q_norm.weight": "attention.{0}q_norm.weight",
    "self_attn.k_norm.weight": "attention.{0}k_norm.weight",
    "post_attention_layernorm.weight": "attention_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.{1}w1.weight",
    "mlp.up_proj.weight": "feed_forward.{1}w3.weight",
    "mlp.down_proj.weight": "feed_forward.{1}w2.weight",
    "post_feedforward_layernorm.weight": "feed_forward_norm.weight",
    "depth.ffn_kv_proj.weight": "feed_forward.kv_proj.weight",
}
TORCH_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch's name, safetensors'

# Fields that change the function: by the section's place below `model`, (value if absent, values that leave it as it
# is, what is expected). OLMo-core writes no field whose value is null.
NO_BIAS = (True, (False,), "false, this model has no biases")
FUNCTIONS: dict[str, dict[str, tuple[Any, tuple, str]]] = {
    "": {
        "name": ("default", ("default",), "'default'"),
        "embedding_norm": (None, (None,), "null, the embedding is not normalised"),
        "embed_scale": (None, (None, 1), "null, the embedding is not scaled"),
        "block_pattern": (None, (None,), "null, all blocks are alike"),
    },
    "block.": {
        "name": (None, tuple(BLOCKS), f"one of {tuple(BLOCKS)}"),
        "dropout": (None, (None, 0), "0, this model has no dropout"),
        "attention_residual_alpha": (None, (None, 1), "1, a sub-layer's output is not scaled"),
        "feed_forward_residual_alpha": (None, (None, 1), "1, a sub-layer's output is not scaled"),
        "residual_scaling_base_depth": (None, (None,), "null, a sub-layer's output is not scaled"),
        "attnres_block_size": (None, (None,), "null, without Attention Residuals"),
        "hyper_connections": (None, (None,), "null, without hyper-connections"),
        "feed_forward_moe": (None, (None,), "null, this model has no experts"),
    },
    "block.sequence_mixer.": {
        "name": ("default", ("default",), "'default'"),
        "bias": NO_BIAS,
        "gate": (None, (None,), "null, attention has no gate"),
        "clip_qkv": (None, (None,), "null, queries, keys and values are not clipped"),
        "dropout": (None, (None, 0), "0, this model has no dropout"),
        "sliding_window": (None, (None,), "null, every token sees all before it"),
    },
    "block.sequence_mixer.rope.": {
        "name": ("default", ("default",), "'default', pairs (i, i + H/2)"),
        "scaling": (None, (None,), "null, rotations without scaling"),
        "no_global_rope": (False, (False,), "false, every layer rotates"),
    },
    "block.feed_forward.": {
        "name": ("default", ("default",), "'default', SwiGLU"),
        "bias": NO_BIAS,
        "activation": ("silu", ("silu",), "'silu'"),
    },
    "lm_head.": {"name": ("default", ("default",), "'default'"), "bias": NO_BIAS},
}
NORM = {
    "name": ("default", ("rms", "fused_rms"), "'rms'"),
    "bias": NO_BIAS,
    "elementwise_affine": (True, (True,), "true, norms have a scale"),
}
MODA = {
    "extra_ffn_kv_proj": (True, (True,), "true, else empty slots would take part in the softmax"),
    "extra_attn_kv_proj": (False, (False,), "false"),
}


def is_olmo_core(values: Mapping[str, Any]) -> bool:
    """Whether these are the contents of an OLMo-core experiment's config.json."""
    return isinstance(values.get("model"), Mapping) and "d_model" in values["model"]


def load_olmo_core(
    directory: str | os.PathLike[str], *, dtype: str | None = None, attention_implementation: str | None = None
) -> tuple[TransformerConfig, Transformer]:
    """A model with the weights of an OLMo-core checkpoint.

    Args:
        directory: holds config.json and model.safetensors or model.pt, see the module.
        dtype: compute dtype, see `TransformerConfig`. The parameters are float32 whatever dtype the files have.
        attention_implementation: see `TransformerConfig`.

    Returns:
        The config and the model.

    Raises:
        FileNotFoundError: config.json or the weights are not there.
        ValueError: the config asks for something that this model does not have (the field is named), a tensor is
            missing, unknown, of another shape than the config says, or not of a floating dtype (the tensor is named),
            or the weights need torch and it is not installed.
    """
    directory = pathlib.Path(directory)
    config = dataclasses.replace(
        _read_config(directory / "config.json"), dtype=dtype, attention_implementation=attention_implementation
    )

    def opened(directory: pathlib.Path, stack: contextlib.ExitStack) -> Files:
        files = _state(_open(directory, stack))
        # Nobody reads what the last layer writes; DepthBench's models lack its projection.
        files.pop(f"blocks.{config.num_layers - 1}.feed_forward.kv_proj.weight", None)
        return files

    modules = ("attention.", "feed_forward.") if config.depth == "moda" else ("", "")

    def renamed(name: str) -> str:
        if name in OUTER_NAMES:
            return OUTER_NAMES[name]
        number, own = name.removeprefix("model.layers.").split(".", 1)
        return f"blocks.{number}.{LAYER_NAMES[own].format(*modules)}"

    return config, read_transformer(directory, config, open_files=opened, rename=renamed)


# The config.


def _read_config(path: pathlib.Path) -> TransformerConfig:
    """The TransformerConfig that config.json describes."""
    values = read_json(path)
    if not is_olmo_core(values):
        raise ValueError(f"{path}: expected an OLMo-core experiment, with the section model and its d_model")
    where = f"{path}: model."
    for place, fields in FUNCTIONS.items():
        _check(_section(values, place, where), fields, f"{where}{place}")
    model, block = values["model"], _section(values, "block.", where)
    mixer = _section(values, "block.sequence_mixer.", where)
    norm, depth = BLOCKS[block["name"]]
    epsilon = _epsilon(block.get("layer_norm"), f"{where}block.layer_norm.")
    others = {"lm_head.layer_norm": model["lm_head"].get("layer_norm")}
    has_qk_norm = mixer.get("qk_norm") is not None
    if has_qk_norm:
        others["block.sequence_mixer.qk_norm"] = mixer["qk_norm"]
    for place, section in others.items():
        found = _epsilon(section, f"{where}{place}.")
        if found != epsilon:
            raise ValueError(f"{where}{place}.eps={found!r}: expected {epsilon!r}, that of all norms")
    attention = f"{where}block.sequence_mixer."
    width, heads = positive_int(model, "d_model", where), positive_int(mixer, "n_heads", attention)
    rope = mixer.get("rope")
    fields = {
        "vocab_size": positive_int(model, "vocab_size", where),
        "num_layers": positive_int(model, "n_layers", where),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": positive_int(mixer, "n_kv_heads", attention, default=heads),
        "head_dim": positive_int(mixer, "head_dim", attention, default=width // heads),
        "ffn_width": positive_int(block["feed_forward"], "hidden_size", f"{where}block.feed_forward."),
        "rope_theta": positive_number(rope, "theta", f"{attention}rope.") if rope else None,
        "max_sequence_length": _longest(values),
    }
    if depth == "moda":
        _check_moda(_section(values, "block.moda.", where), has_qk_norm, fields["head_dim"], f"{where}block.moda.")
    try:
        config = TransformerConfig(
            norm=norm, depth=depth, moda=MoDASection(key="writer_norm") if depth == "moda" else MoDASection(),
            norm_epsilon=epsilon, tie_embeddings=False, qk_norm=has_qk_norm,
            qk_norm_per_head=has_qk_norm and bool(mixer.get("use_head_qk_norm")), **fields,
        )  # fmt: skip
    except ValueError as error:  # names our field; say which file led there
        raise ValueError(f"{path}: {error}") from error
    _check_overrides(model, block, config.num_layers, where)
    return config


def _section(values: Mapping[str, Any], place: str, where: str) -> Mapping[str, Any]:
    """The section at a dotted place below `model`. Attention has an older name too, and need not have a rotation."""
    section = values["model"]
    for part in place.split(".")[:-1]:
        found = section.get(part)
        if part == "sequence_mixer" and found is None:
            found = section.get("attention")
        if part in ("rope", "moda") and found is None:
            return {}
        if not isinstance(found, Mapping):
            raise ValueError(f"{where}{place[:-1]}={found!r}: expected an object")
        section = found
    return section


def _check(values: Mapping[str, Any], fields: Mapping[str, tuple[Any, tuple, str]], where: str) -> None:
    for field, (absent, known, expected) in fields.items():
        if values.get(field, absent) not in known:
            raise ValueError(f"{where}{field}={values.get(field, absent)!r}: expected {expected}")


def _epsilon(section: Any, where: str) -> float:
    """A norm's epsilon."""
    if not isinstance(section, Mapping):
        raise ValueError(f"{where[:-1]}={section!r}: expected an object, the norm")
    _check(section, NORM, where)
    return positive_number({"eps": 1e-5} | dict(section), "eps", where)


def _check_moda(section: Mapping[str, Any], has_qk_norm: bool, head_dim: int, where: str) -> None:
    _check(section, MODA, where)
    if has_qk_norm and section.get("cache_post_norm_k", True) is not True:
        raise ValueError(
            f"{where}cache_post_norm_k={section['cache_post_norm_k']!r}: expected true, depth keys are stored behind "
            "the QK-norm"
        )
    scale = section.get("attention_scale")
    if scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ValueError(f"{where}attention_scale={scale!r}: expected null, the scale of attention is head_dim ** -0.5")


def _check_overrides(model: Mapping[str, Any], block: Mapping[str, Any], layers: int, where: str) -> None:
    """A block of its own may only lack the projection that nobody would read."""

    def plain(section: Mapping[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in section.items() if field != "moda_skip_ffn_kv" and value is not None}

    if block["name"].endswith("moda") and block.get("moda_skip_ffn_kv"):
        raise ValueError(
            f"{where}block.moda_skip_ffn_kv=True: expected false, all blocks but the last project an entry"
        )
    for number, own in (model.get("block_overrides") or {}).items():
        last = str(number) == str(layers - 1)
        if not isinstance(own, Mapping) or plain(own) != plain(block) or (own.get("moda_skip_ffn_kv") and not last):
            raise ValueError(
                f"{where}block_overrides.{number}: expected the block of all layers; only the last may have "
                "moda_skip_ffn_kv"
            )


def _longest(values: Mapping[str, Any]) -> int:
    """The tokens of a row in training; rotations have no bound of their own."""
    for section, field in (("train_module", "max_sequence_length"), ("dataset", "sequence_length")):
        found = (values.get(section) or {}).get(field)
        if type(found) is int and found > 0:
            return found
    return TransformerConfig.max_sequence_length


# The tensors.


def _state(files: Files) -> Files:
    """The model's tensors by name: of a state dict that holds an optimizer's too, those behind "model."."""
    if not any(name.startswith(PREFIX) for name in files):
        return dict(files)
    return {
        name.removeprefix(PREFIX): (path, _BehindPrefix(reader))
        for name, (path, reader) in files.items()
        if name.startswith(PREFIX)
    }


@dataclasses.dataclass(frozen=True)
class _BehindPrefix:
    """An open file whose tensors are asked for without "model." before their names."""

    reader: Any

    def get_slice(self, name: str) -> Any:
        """Shape and dtype of a tensor."""
        return self.reader.get_slice(PREFIX + name)

    def get_tensor(self, name: str) -> np.ndarray:
        """A tensor."""
        return self.reader.get_tensor(PREFIX + name)


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> Files:
    path = directory / TORCH_FILE
    if path.exists():
        return _open_torch(path)
    try:
        return open_safetensors(directory, stack)
    except FileNotFoundError as error:
        distributed = directory / DISTRIBUTED
        if not distributed.is_dir():
            raise FileNotFoundError(f"{error}, nor {TORCH_FILE}") from error
        raise ValueError(
            f"{distributed}: the weights are in torch's distributed format; make one file of them, where torch is "
            f"installed: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {distributed} {path}"
        ) from error


def _open_torch(path: pathlib.Path) -> Files:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path}: torch reads this file and is not installed; install it, or store the state dict as "
            "model.safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable state dict: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):  # beside an optimizer's
        state = state["model"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: got a {type(state).__name__}, expected a state dict")
    reader = _TorchReader(state)
    return {str(name): (path, reader) for name, value in state.items() if isinstance(value, torch.Tensor)}


@dataclasses.dataclass(frozen=True)
class _TorchReader:
    """A state dict, read as an open safetensors file is."""

    state: Mapping[str, Any]

    def get_slice(self, name: str) -> _TorchHeader:
        """Shape and dtype of a tensor."""
        return _TorchHeader(self.state[name])

    def get_tensor(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        return self.state[name].detach().float().numpy()


@dataclasses.dataclass(frozen=True)
class _TorchHeader:
    """What is known of a tensor without its data."""

    tensor: Any

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """As safetensors calls it."""
        name = str(self.tensor.dtype).removeprefix("torch.")
        return TORCH_DTYPES.get(name, name)
