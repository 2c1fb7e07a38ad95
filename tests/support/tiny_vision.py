"""A run on the digits that is small enough for tests."""

from moda_jax.config import Config


def vision_config(cache, **sections):
    """A 2-layer MoDA vision transformer of width 16 on images of 8 x 8. `sections` override, field by field."""
    values = {
        "model": {
            "num_layers": 2, "width": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "ffn_width": 32,
            "causal": False, "rope_theta": None, "norm": "pre", "norm_kind": "layer", "ffn": "gelu", "biases": True,
            "qk_norm": False, "image": {"size": 8, "patch_size": 4, "channels": 1, "num_classes": 10},
        },
        "data": {
            "source": "digits", "cache_dir": str(cache), "validation_fraction": 0.1,
            "images": {"normalisation": "half", "crop_fraction": 1.0},
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"task": "vision", "num_steps": 6, "batch_size": 16, "accumulation_steps": 2, "log_interval_steps": 1},
        "eval": {"interval_steps": 6, "num_batches": 0},
        "checkpoint": {"interval_steps": 3},
    }  # fmt: skip
    for name, fields in sections.items():
        merged = values.get(name, {}).copy()
        for field, value in fields.items():
            merged[field] = merged.get(field, {}) | value if isinstance(value, dict) else value
        values[name] = merged
    return Config.from_dict(values)
