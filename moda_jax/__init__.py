"""Mixture-of-Depths Attention (arXiv 2603.15619) in JAX: layers, models and training."""

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

__all__ = [
    "AttentionCache",
    "DepthStream",
    "MoDAAttention",
    "PartedBlock",
    "Transformer",
    "TransformerConfig",
    "VisionTransformer",
    "depth_scan",
    "forward_flops",
    "image_forward_flops",
    "image_param_count",
    "param_count",
    "train_flops_per_token",
]
