"""Writes tests/data/olmo_core_tiny/: tiny MoDA models in OLMo-core's layout, with the logits of NumPy in float64.

    PYTHONPATH=tests python tests/data/make_olmo_core_vectors.py

Each folder holds config.json, model.safetensors and expected.npz: `tokens` [B, T] int32 and `logits` [B, T, V] float64.
They were made with NumPy 2 and safetensors 0.8.0, November 2026.
"""

import pathlib

import numpy as np
from support.olmo_core import config_values, logits, write_checkpoint

FOLDER = pathlib.Path(__file__).parent / "olmo_core_tiny"
MODELS = {
    "moda": ({"block": "moda"}, "float32"),  # as DepthBench's public ones: no QK-norm, as many KV heads as heads
    "post_norm_moda_head_norm": ({"block": "post_norm_moda", "qk_norm": "head", "kv_heads": 1}, "bfloat16"),
}


def main() -> None:
    for number, (name, (fields, dtype)) in enumerate(MODELS.items()):
        values = config_values(**fields)
        tensors = write_checkpoint(FOLDER / name, values, dtype, seed=number)
        tokens = np.random.default_rng(7).integers(0, values["model"]["vocab_size"], (2, 13)).astype(np.int32)
        expected = np.stack([logits(values, tensors, row) for row in tokens])
        np.savez(FOLDER / name / "expected.npz", tokens=tokens, logits=expected)
        for file in (FOLDER / name).iterdir():
            file.chmod(0o644)
        print(f"{FOLDER / name}: largest logit {np.abs(expected).max():.2f}")


if __name__ == "__main__":
    main()
