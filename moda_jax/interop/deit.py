"""DeiT and plain vision transformers from safetensors in the layout of timm (PyTorch image models).

Names there, with the shapes of a model of width D, patches of P x P, T tokens and L blocks:

    cls_token [1, 1, D], pos_embed [1, T, D], patch_embed.proj.weight [D, channels, P, P] and .bias
    blocks.0 to blocks.L-1: norm1, norm2 (.weight, .bias), attn.qkv [3 D, D], attn.proj, mlp.fc1, mlp.fc2
    norm, head [classes, D]

A linear layer's weight has its outputs first. Query, key and value stand in one matrix, one after the other.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp  # also registers NumPy's bfloat16, without which safetensors cannot read one
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from moda_jax.config import TransformerConfig, check_local
from moda_jax.data.damage import is_lfs_pointer
from moda_jax.interop.olmo2 import SINGLE_FILE
from moda_jax.model.vision_transformer import VisionTransformer
from moda_jax.vision_config import ImageModelSection

Tensors = Mapping[str, np.ndarray]

_HEAD_DIM = 64  # of every published DeiT; the file does not say it
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_OTHER_MODELS = {
    "dist_token": "a distilled DeiT, which has a second token and head",
    "head_dist.weight": "a distilled DeiT, which has a second token and head",
    "reg_token": "a model with register tokens",
    "fc_norm.weight": "a model that pools before its last norm",
    "norm_pre.weight": "a model with a norm before its blocks",
    "blocks.0.ls1.gamma": "a model with layer scale",
    "blocks.0.gamma_1": "a model with layer scale",
    "blocks.0.attn.q_norm.weight": "a model with query and key norms",
}


def is_deit(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file, or a directory whose model.safetensors has the patches of a vision transformer."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return path.is_file()
    try:
        with safe_open(path / SINGLE_FILE, "numpy") as file:
            return "patch_embed.proj.weight" in set(file.keys())
    except (OSError, SafetensorError):
        return False


def load_deit(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    dtype: str | None = None,
    attention_implementation: str | None = None,
) -> tuple[TransformerConfig, VisionTransformer]:
    """A vision transformer with the weights of a checkpoint in timm's layout.

    Args:
        path: the safetensors, or a directory with model.safetensors.
        num_heads: N; None: heads of 64 channels, as every published DeiT has.
        dtype: compute dtype, see `TransformerConfig`. The parameters are float32 whatever dtype the file has.
        attention_implementation: see `TransformerConfig`.

    Returns:
        The config (`depth="none"`) and the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not readable, or holds another model: what is missing, not known or of another shape is named.
    """
    check_local("path", str(path))
    path = pathlib.Path(path)
    path = path / SINGLE_FILE if path.is_dir() else path
    tensors = _read(path)
    config = _config(path, tensors, num_heads, dtype, attention_implementation)
    params = _params(path, tensors, config)
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return config, nnx.merge(graph, state)


def _read(path: pathlib.Path) -> Tensors:
    with path.open("rb") as file:
        if is_lfs_pointer(file.read(256)):
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float64, np.float32, np.float16, jnp.bfloat16):
            raise ValueError(f"{path}: tensor {name} has dtype {tensor.dtype}, expected floats")
    return tensors


def _config(
    path: pathlib.Path, tensors: Tensors, num_heads: int | None, dtype: str | None, implementation: str | None
) -> TransformerConfig:
    """The model that the tensors' shapes describe."""
    for name, what in _OTHER_MODELS.items():
        if name in tensors:
            raise ValueError(f"{path}: holds {name}, so it is {what}; expected a plain vision transformer")

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{path}: holds no tensor {name}; expected a vision transformer in timm's layout")
        found = tensors[name].shape
        if len(found) != rank:
            raise ValueError(f"{path}: tensor {name} has shape {found}, expected {rank} dimensions")
        return found

    width, channels, patch, _ = shape("patch_embed.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    grid = round((tokens - 1) ** 0.5)
    if grid**2 + 1 != tokens:
        raise ValueError(f"{path}: pos_embed has {tokens} tokens, expected a class token and a square of patches")
    ffn_width, classes = shape("blocks.0.mlp.fc1.weight", 2)[0], shape("head.weight", 2)[0]
    if num_heads is None and width % _HEAD_DIM:
        raise ValueError(
            f"{path}: has width {width}, no multiple of {_HEAD_DIM}, the channels of a DeiT's head; name num_heads"
        )
    heads = width // _HEAD_DIM if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ValueError(f"num_heads={num_heads}: expected a divisor of the width {width}")
    layers = 1 + max(int(match[1]) for name in tensors if (match := _BLOCK.match(name)))
    image = ImageModelSection(size=grid * patch, patch_size=patch, channels=channels, num_classes=classes)
    return TransformerConfig(
        num_layers=layers, width=width, num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
        ffn_width=ffn_width, norm="pre", norm_kind="layer", ffn="gelu", biases=True, qk_norm=False, rope_theta=None,
        causal=False, depth="none", image=image, dtype=dtype, attention_implementation=implementation,
    )  # fmt: skip


def _params(path: pathlib.Path, tensors: Tensors, config: TransformerConfig) -> dict[str, Any]:
    """Nested dicts of float32 arrays; every tensor of the file is used."""
    D, N, H, F, image = config.width, config.num_heads, config.head_dim, config.ffn_width, config.image
    left = dict(tensors)

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in left:
            raise ValueError(f"{path}: holds no tensor {name}; expected a vision transformer in timm's layout")
        tensor = left.pop(name)
        if tensor.shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {tensor.shape}, expected {shape}")
        return tensor.astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": take(f"{name}.weight", D), "bias": take(f"{name}.bias", D)}

    def linear(name: str, inputs: int, outputs: int, reshape: Callable[[np.ndarray], np.ndarray] = lambda a: a) -> dict:
        return {"kernel": reshape(take(f"{name}.weight", outputs, inputs).T), "bias": take(f"{name}.bias", outputs)}

    def block(number: int) -> dict[str, Any]:
        place = f"blocks.{number}"
        weight = take(f"{place}.attn.qkv.weight", 3 * D, D).T.reshape(D, 3, N, H)
        bias = take(f"{place}.attn.qkv.bias", 3 * D).reshape(3, N, H)
        attention: dict[str, Any] = {
            name: {"kernel": weight[:, i], "bias": bias[i]} for i, name in enumerate(("query", "key", "value"))
        }
        attention["output"] = linear(f"{place}.attn.proj", D, D, lambda kernel: kernel.reshape(N, H, D))
        return {
            "attention": attention,
            "attention_norm": norm(f"{place}.norm1"),
            "ffn": {"up": linear(f"{place}.mlp.fc1", D, F), "down": linear(f"{place}.mlp.fc2", F, D)},
            "ffn_norm": norm(f"{place}.norm2"),
        }

    P, C = image.patch_size, image.channels
    patches = take("patch_embed.proj.weight", D, C, P, P).transpose(2, 3, 1, 0).reshape(image.pixels, D)
    *first, last = (block(number) for number in range(config.num_layers))
    params = {
        "patches": {"kernel": patches, "bias": take("patch_embed.proj.bias", D)},
        "class_token": take("cls_token", 1, 1, D).reshape(D),
        "position_table": take("pos_embed", 1, image.tokens, D)[0],
        "last_layer": last,
        "final_norm": norm("norm"),
        "head": linear("head", D, image.num_classes),
    }
    if first:
        params["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *first)
    if left:
        some = ", ".join(sorted(left)[:8]) + (", ..." if len(left) > 8 else "")
        raise ValueError(f"{path}: {len(left)} tensors that this model does not have: {some}")
    return params
