"""Writes tests/data/olmo2_tiny/: tiny random OLMo 2 models as transformers saves them, with the logits that it gives.

The tests read the stored folders and need neither torch nor transformers. To make them again (bit-equal weights are not
promised across torch versions, and need not be):

    python3.11 -m venv olmo2-env && olmo2-env/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
    olmo2-env/bin/python tests/data/make_olmo2_vectors.py

The stored vectors were made with exactly these versions (torch CPU build, Python 3.11.7), November 2026.

Every parameter is random, the norm scales too (0.5 to 1.5), so that a norm that is left out or misplaced shows. Each
folder holds config.json, the safetensors and expected.npz: `tokens` [B, T] int32 and `logits` [B, T, V] float32, which
the reloaded model computed in float32 by the eager attention.
"""

import pathlib
import shutil

import numpy as np
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

FOLDER = pathlib.Path(__file__).parent / "olmo2_tiny"

# name: (config fields, parameter dtype in the file, largest shard)
MODELS = {
    "untied_gqa_sharded": (
        {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        torch.float32, "80KB",
    ),
    # 3 heads of 12 beside a width of 40: head_dim cannot be derived; the large epsilon has to be read from the file.
    "tied_head_dim": (
        {
            "vocab_size": 64, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
            "num_attention_heads": 3, "head_dim": 12, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-2, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        torch.float32, "1GB",
    ),
    "tied_bfloat16_one_layer": (
        {
            "vocab_size": 80, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        torch.bfloat16, "1GB",
    ),
}  # fmt: skip


def make(name: str, fields: dict, dtype: torch.dtype, shard_size: str) -> None:
    """Saves one model and its logits under FOLDER / name."""
    folder = FOLDER / name
    config = Olmo2Config(attn_implementation="eager", eos_token_id=None, pad_token_id=None, **fields)
    model = Olmo2ForCausalLM(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    # Reloaded, not converted back: the conversion to bfloat16 rounds the rotary frequencies too, which no file holds.
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(config.vocab_size, (2, 23))  # [B, T]
    with torch.no_grad():
        logits = model(tokens).logits
    np.savez(folder / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1000:.1f} kB, largest logit {logits.abs().max():.2f}")


def main() -> None:
    """Replaces the whole folder."""
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, (fields, dtype, shard_size) in MODELS.items():
        make(name, fields, dtype, shard_size)


if __name__ == "__main__":
    main()
