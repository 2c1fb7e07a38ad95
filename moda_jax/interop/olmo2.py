"""OLMo 2 checkpoints: reads what transformers saves for an `Olmo2ForCausalLM`, without torch.

A checkpoint is a directory with config.json and either model.safetensors or model.safetensors.index.json and the
files that it names. The model is `TransformerConfig(depth="none", norm="post", qk_norm=True)`.

A linear layer's weight is stored as [outputs, inputs], ours is the transpose, with the heads as an axis of their own:
the query projection [N * H, D] becomes [D, N, H], the output projection [D, N * H] becomes [N, H, D]. Rotary pairs are
(i, i + H/2) on both sides, so no channel moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp  # also registers NumPy's bfloat16, without which safetensors cannot read one
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from moda_jax.config import TransformerConfig
from moda_jax.data.damage import is_lfs_pointer
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.function import abstract_model
from moda_jax.model.transformer import Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Files = dict[str, tuple[pathlib.Path, Any]]  # a tensor's name to its file and that file's open reader
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names

# Our parameter: (tensor in the file, leading axes of our array that are the linear layer's inputs; 0: stored as it is).
OUTER_TENSORS = {
    "embedding.table": ("model.embed_tokens.weight", 0),
    "final_norm.scale": ("model.norm.weight", 0),
    "final_norm.bias": ("model.norm.bias", 0),
    "head.kernel": ("lm_head.weight", 1),
}
# The same inside a layer; in the file behind "model.layers.<i>.".
LAYER_TENSORS = {
    "attention.query.kernel": ("self_attn.q_proj.weight", 1),
    "attention.key.kernel": ("self_attn.k_proj.weight", 1),
    "attention.value.kernel": ("self_attn.v_proj.weight", 1),
    "attention.output.kernel": ("self_attn.o_proj.weight", 2),
    "attention.query_norm.scale": ("self_attn.q_norm.weight", 0),
    "attention.key_norm.scale": ("self_attn.k_norm.weight", 0),
    "attention_norm.scale": ("post_attention_layernorm.weight", 0),
    "ffn.gate.kernel": ("mlp.gate_proj.weight", 1),
    "ffn.up.kernel": ("mlp.up_proj.weight", 1),
    "ffn.down.kernel": ("mlp.down_proj.weight", 1),
    "ffn_norm.scale": ("post_feedforward_layernorm.weight", 0),
    # Of models that are not OLMo 2.
    "attention.query.bias": ("self_attn.q_proj.bias", 0),
    "attention.key.bias": ("self_attn.k_proj.bias", 0),
    "attention.value.bias": ("self_attn.v_proj.bias", 0),
    "attention.output.bias": ("self_attn.o_proj.bias", 0),
    "attention_norm.bias": ("post_attention_layernorm.bias", 0),
    "ffn.up.bias": ("mlp.up_proj.bias", 0),
    "ffn.down.bias": ("mlp.down_proj.bias", 0),
    "ffn_norm.bias": ("post_feedforward_layernorm.bias", 0),
}


# Fields of config.json that change the function, in OLMo 2's relatives and descendants: values that leave it as it is.
OTHER_FUNCTIONS: dict[str, tuple[tuple, str]] = {
    "clip_qkv": ((None,), "null, queries, keys and values are not clipped"),
    "attn_logit_softcapping": ((None,), "null, attention's logits are not capped"),
    "final_logit_softcapping": ((None,), "null, the logits are not capped"),
    "query_pre_attn_scalar": ((None,), "null, the scale of attention is head_dim ** -0.5"),
    "attention_multiplier": ((None,), "null, the scale of attention is head_dim ** -0.5"),
    "embedding_multiplier": ((None, 1), "1, the embedding is not scaled"),
    "scale_embeddings": ((None, False), "false, the embedding is not scaled"),
    "residual_multiplier": ((None, 1), "1, a sub-layer's output is not scaled"),
    "logits_scaling": ((None, 1), "1, the logits are not scaled"),
    "logit_scale": ((None, 1), "1, the logits are not scaled"),
    "mlp_bias": ((None, False), "false, this model has no biases"),
    "use_qk_norm": ((None, True), "true, queries and keys are normalised"),
    "qk_norm": ((None, True), "true, queries and keys are normalised"),
    "alibi": ((None, False), "false, positions are rotations"),
    "num_experts": ((None,), "null, this model has no experts"),
    "num_local_experts": ((None,), "null, this model has no experts"),
    "use_bidirectional_attention": ((None, False), "false, attention is causal"),
    "is_causal": ((None, True), "true, attention is causal"),
}


def load_olmo2(
    directory: str | os.PathLike[str], *, dtype: str | None = None, attention_implementation: str | None = None
) -> tuple[TransformerConfig, Transformer]:
    """A model with the weights of a transformers `Olmo2ForCausalLM`.

    Args:
        directory: holds config.json and the safetensors.
        dtype: compute dtype, see `TransformerConfig`. The parameters are float32 whatever dtype the files have.
        attention_implementation: see `TransformerConfig`.

    Returns:
        The config (`depth="none"`) and the model.

    Raises:
        FileNotFoundError: config.json or the safetensors are not there.
        ValueError: the config asks for something that this model does not have (the field is named), or a tensor is
            missing, unknown, of another shape than the config says, or not of a floating dtype (the tensor is named).
    """
    directory = pathlib.Path(directory)
    config = dataclasses.replace(
        _read_config(directory / "config.json"), dtype=dtype, attention_implementation=attention_implementation
    )
    return config, read_transformer(directory, config)


def read_transformer(
    directory: pathlib.Path,
    config: TransformerConfig,
    *,
    open_files: Callable[[pathlib.Path, contextlib.ExitStack], Files] | None = None,
    rename: Callable[[str], str] = str,
) -> Transformer:
    """A model of `config` with the weights of the directory's files.

    Args:
        directory: of the checkpoint.
        config: of the model.
        open_files: finds the tensors of a directory; None: `open_safetensors`.
        rename: what a tensor is called there, from its name in an OLMo 2 file.

    Raises:
        FileNotFoundError, ValueError: as `load_olmo2`, for the tensors.
    """
    model, params = abstract_model(config)
    shapes = {path: parameter.shape for path, parameter in nnx.traversals.flatten_mapping(params).items()}
    sources = {
        path: [dataclasses.replace(tensor, name=rename(tensor.name)) for tensor in sources_of(path, shape, config)]
        for path, shape in shapes.items()
    }
    with contextlib.ExitStack() as stack:
        files = (open_files or open_safetensors)(directory, stack)
        if config.tie_embeddings:
            _drop_copied_head(files)
        _check_tensors(directory, files, [tensor for tensors in sources.values() for tensor in tensors])
        # One parameter at a time, so that the peak is the model and one of its (stacked) parameters.
        arrays = {path: jnp.asarray(_read(files, sources[path], shape)) for path, shape in shapes.items()}
    return model.module(nnx.traversals.unflatten_mapping(arrays))


# The config.


def _read_config(path: pathlib.Path) -> TransformerConfig:
    """The TransformerConfig that config.json describes."""
    values = read_json(path)
    where = f"{path}: "
    for field, default, known, expected in (
        ("model_type", None, ("olmo2",), "'olmo2'"),
        ("hidden_act", "silu", ("silu",), "'silu'"),
        ("attention_bias", False, (False,), "False, this model has no biases"),
        ("attention_dropout", 0.0, (0.0,), "0, this model has no dropout"),
        ("partial_rotary_factor", None, (None, 1.0), "1, all channels are rotated"),
        ("quantization_config", None, (None,), "none, this model reads floating-point weights"),
        ("tie_word_embeddings", False, (False, True), "True or False"),
        *((field, known[0], known, expected) for field, (known, expected) in OTHER_FUNCTIONS.items()),
    ):
        if values.get(field, default) not in known:
            raise ValueError(f"{where}{field}={values.get(field)!r}: expected {expected}")
    _check_windows(values, where)

    def size(field: str, default: int | None = None) -> int:
        return positive_int(values, field, where, default)

    width, num_heads = size("hidden_size"), size("num_attention_heads")
    fields = {
        "vocab_size": size("vocab_size"),
        "num_layers": size("num_hidden_layers"),
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": size("num_key_value_heads", default=num_heads),
        "head_dim": size("head_dim", default=width // num_heads),
        "ffn_width": size("intermediate_size"),
        "rope_theta": _rope_theta(values, where),
        "norm_epsilon": positive_number(values, "rms_norm_eps", where),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "max_sequence_length": size("max_position_embeddings"),
    }
    try:
        return TransformerConfig(norm="post", depth="none", depth_ffn_kv=False, qk_norm=True, **fields)
    except ValueError as error:  # names our field; say which file led there
        raise ValueError(f"{where}{error}") from error


def _check_windows(values: Mapping[str, Any], where: str) -> None:
    """Every layer sees all tokens before it; a window that is switched off or no shorter than the context is none."""
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        raise ValueError(f"{where}layer_types={kinds!r}: expected 'full_attention' for every layer")
    for field in ("sliding_window", "attention_window", "local_attention_window", "attention_chunk_size"):
        window, longest = values.get(field), values.get("max_position_embeddings")
        whole = type(window) is int and type(longest) is int and window >= longest
        if window is None or whole or values.get("use_sliding_window") is False:
            continue
        raise ValueError(f"{where}{field}={window!r}: expected null, every token sees all before it")


def _rope_theta(values: Mapping[str, Any], where: str) -> float:
    """The rotary base, from `rope_theta` (transformers 4) or `rope_parameters` (5); scaled rotations are refused."""
    found = {}
    if values.get("rope_theta") is not None:
        found["rope_theta"] = positive_number(values, "rope_theta", where)
    for field in ("rope_parameters", "rope_scaling"):
        parameters = values.get(field)
        if parameters is None:
            continue
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{where}{field}={parameters!r}: expected an object")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{where}{field}.rope_type={kind!r}: expected 'default', rotations without scaling")
        if parameters.get("partial_rotary_factor") not in (None, 1.0):
            share = parameters["partial_rotary_factor"]
            raise ValueError(f"{where}{field}.partial_rotary_factor={share!r}: expected 1, all channels are rotated")
        if parameters.get("rope_theta") is not None:
            found[f"{field}.rope_theta"] = positive_number(parameters, "rope_theta", f"{where}{field}.")
    if not found:
        raise ValueError(f"{where}rope_theta: absent, expected it there or in rope_parameters")
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{field}={value!r}" for field, value in found.items())
        raise ValueError(f"{where}{listed}: expected one value")
    return next(iter(found.values()))


def positive_int(values: Mapping[str, Any], field: str, where: str, default: int | None = None) -> int:
    """values[field], or the default where it is absent or null; a ValueError, `where` before the field, if none is."""
    value = default if values.get(field) is None else values[field]
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}{field}={value!r}: expected a positive integer")
    return value


def positive_number(values: Mapping[str, Any], field: str, where: str) -> float:
    """values[field] as a float; a ValueError, `where` before the field, if it is no positive number."""
    value = values.get(field)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where}{field}={value!r}: expected a positive number")
    return float(value)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError, naming the file, if there is none."""
    content = path.read_bytes()
    if is_lfs_pointer(content):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


# The tensors.


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint, which becomes a parameter or one layer of a stacked parameter."""

    name: str
    shape: tuple[int, ...]  # in our layout, padding left out
    input_axes: int  # leading axes of `shape` that the file has last, as one; 0: stored as it is

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        if not self.input_axes:
            return self.shape
        return math.prod(self.shape[self.input_axes :]), math.prod(self.shape[: self.input_axes])

    def convert(self, stored: np.ndarray) -> np.ndarray:
        """The file's array in our layout, float32."""
        stored = stored.astype(np.float32)
        return stored.T.reshape(self.shape) if self.input_axes else stored

    def store(self, array: np.ndarray) -> np.ndarray:
        """Our array in the file's layout: what `convert` undoes."""
        return array.reshape(self.stored_shape[::-1]).T if self.input_axes else array


def sources_of(path: tuple[str, ...], shape: tuple[int, ...], config: TransformerConfig) -> list[Tensor]:
    """The tensors that fill one parameter: one, or one per layer for the stacked first L-1 layers.

    A depth mechanism names its own. Of a parameter that is padded in some layers, the file has what they use.
    """
    if path[0] not in ("layers", "last_layer"):
        name, input_axes = OUTER_TENSORS[".".join(path)]
        return [Tensor(name, shape, input_axes)]
    last = config.num_layers - 1
    layers, shape = ([last], shape) if path[0] == "last_layer" else (range(last), shape[1:])
    if path[1] != "depth":
        name, input_axes = LAYER_TENSORS[".".join(path[1:])]
        return [Tensor(f"model.layers.{i}.{name}", shape, input_axes) for i in layers]
    mechanism, own = find_mechanism(config.depth), ".".join(path[2:])
    name, input_axes = mechanism.tensors.get(own, (own, 0))
    return [
        Tensor(f"model.layers.{i}.depth.{name}", mechanism.used_sizes(config, own, i) or shape, input_axes)
        for i in layers
    ]


def open_safetensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> Files:
    """Tensor name to (file, its open reader), for all tensors of the checkpoint."""
    if (directory / SINGLE_FILE).exists():
        names = [SINGLE_FILE]
    elif (directory / INDEX_FILE).exists():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{directory / INDEX_FILE}: expected weight_map, an object of tensor names to file names")
        names = sorted(set(weight_map.values()))
    else:
        raise FileNotFoundError(f"{directory}: found neither {SINGLE_FILE} nor {INDEX_FILE}")
    tensors: Files = {}
    for name in names:
        path = directory / name
        try:
            reader = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            with path.open("rb") as file:
                if is_lfs_pointer(file.read(256)):
                    raise ValueError(
                        f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
                    ) from error
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        held = reader.keys()
        for tensor in held:
            if tensor in tensors:
                raise ValueError(f"tensor {tensor}: stands in both {tensors[tensor][0].name} and {name}")
            tensors[tensor] = (path, reader)
    return tensors


def _drop_copied_head(files: Files) -> None:
    """Takes the output projection of a tied checkpoint for the copy of the embedding that it is, if it is one."""
    head, table = OUTER_TENSORS["head.kernel"][0], OUTER_TENSORS["embedding.table"][0]
    if head not in files or table not in files:
        return
    slices = [files[name][1].get_slice(name) for name in (head, table)]
    if len({(tuple(part.get_shape()), part.get_dtype()) for part in slices}) > 1:
        return
    pairs = (files[name][1].get_tensor(name) for name in (head, table))
    if np.array_equal(*pairs, equal_nan=True):
        del files[head]


def _check_tensors(directory: pathlib.Path, files: Files, wanted: list[Tensor]):
    """Every wanted tensor is there with its shape and a floating dtype, and no other. Before any data is read."""
    names = [tensor.name for tensor in wanted]
    missing = [name for name in names if name not in files]
    extra = sorted(set(files) - set(names))
    if missing or extra:
        problems = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        problems += [f"{len(extra)} that this model does not have: {_some(extra)}"] if extra else []
        raise ValueError(f"{directory}: the tensors do not fit config.json; {'; '.join(problems)}")
    for tensor in wanted:
        path, reader = files[tensor.name]
        header = reader.get_slice(tensor.name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != tensor.stored_shape:
            raise ValueError(f"{path}: tensor {tensor.name} has shape {shape}, expected {tensor.stored_shape}")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"{path}: tensor {tensor.name} has dtype {dtype}, expected one of {FLOAT_DTYPES}")


def _some(names: list[str], most: int = 8) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _read(files: Files, tensors: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """One parameter of shape `shape`, float32, from its tensors."""
    parameter = np.zeros(shape, np.float32)
    for layer, tensor in zip(layers_of(parameter, tensors), tensors, strict=True):
        _, reader = files[tensor.name]
        layer[...] = tensor.convert(reader.get_tensor(tensor.name))
    return parameter


def layers_of(parameter: np.ndarray, tensors: list[Tensor]) -> list[np.ndarray]:
    """The parts of a parameter that its tensors hold: views, padding left out."""
    stacked = parameter.ndim > len(tensors[0].shape)
    layers = parameter if stacked else parameter[None]
    return [layer[tuple(map(slice, tensor.shape))] for layer, tensor in zip(layers, tensors, strict=True)]
