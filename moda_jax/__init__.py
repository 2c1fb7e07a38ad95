"""Mixture-of-Depths Attention (arXiv 2603.15619) in JAX: layers, models and training."""

import importlib
from typing import TYPE_CHECKING, Any

from moda_jax.config import TransformerConfig
from moda_jax.model.accounting import (
    forward_flops,
    image_forward_flops,
    image_param_count,
    param_count,
    train_flops_per_token,
)
from moda_jax.model.attention_cache import AttentionCache
from moda_jax.model.depth.cut_layer import PartedBlock
from moda_jax.model.depth.loop import depth_scan
from moda_jax.model.depth.stream import DepthStream
from moda_jax.model.moda_attention import MoDAAttention
from moda_jax.model.transformer import Transformer
from moda_jax.model.vision_transformer import VisionTransformer

if TYPE_CHECKING:
    from moda_jax.inference.language_model import LanguageModel, load

__version__ = "0.1.0"

__all__ = [
    "AttentionCache",
    "DepthStream",
    "LanguageModel",
    "MoDAAttention",
    "PartedBlock",
    "Transformer",
    "TransformerConfig",
    "VisionTransformer",
    "depth_scan",
    "forward_flops",
    "image_forward_flops",
    "image_param_count",
    "load",
    "param_count",
    "train_flops_per_token",
]

# Imported when they are asked for: whoever uses a layer needs no checkpoints, tokenizers and data.
_LATER = {"LanguageModel": "moda_jax.inference.language_model", "load": "moda_jax.inference.language_model"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
