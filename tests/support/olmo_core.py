"""Tiny OLMo-core checkpoints, DepthBench's MoDA blocks among them, and their logits in float64: NumPy, with loops.

The layout: `blocks.<i>.` before a block's tensors; linear weights [outputs, inputs]; a MoDA block has its attention in
`attention.attention`, its FFN in `feed_forward.feed_forward` and the projection of the FFN's depth entry (keys, then
values) in `feed_forward.kv_proj`, which the last block lacks. Depth keys are not rotated; they are as projected, or
behind the writing block's key norm where there is one. A query meets them rotated. Nothing here imports `moda_jax`.
"""

import json
import math

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

MODA_BLOCKS = ("moda", "post_norm_moda")


def config_values(
    block="moda", *, width=28, layers=3, heads=2, kv_heads=None, head_dim=14, hidden=32, vocabulary=40, qk_norm=None
):
    """config.json of an experiment. qk_norm: None, "all" or "head"."""
    norm = {"_CLASS_": "olmo_core.nn.layer_norm.LayerNormConfig", "name": "rms", "eps": 1e-6, "bias": False}
    mixer = {"name": "default", "n_heads": heads, "head_dim": head_dim, "bias": False, "dtype": "bfloat16"}
    mixer["rope"] = {"name": "default", "theta": 10000, "full_precision": True, "no_global_rope": False}
    if kv_heads is not None:
        mixer["n_kv_heads"] = kv_heads
    if qk_norm is not None:
        mixer |= {"qk_norm": norm, "use_head_qk_norm": qk_norm == "head"}
    blocks = {
        "name": block, "sequence_mixer": mixer, "layer_norm": norm,
        "feed_forward": {"name": "default", "hidden_size": hidden, "bias": False, "activation": "silu"},
        "moda_skip_ffn_kv": False,
    }  # fmt: skip
    model = {
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig", "name": "default", "d_model": width,
        "vocab_size": vocabulary, "n_layers": layers, "block": blocks,
        "lm_head": {"name": "default", "layer_norm": norm, "bias": False}, "init_std": 0.02,
    }  # fmt: skip
    if block in MODA_BLOCKS:
        blocks["moda"] = {
            "backend": "v17", "cache_post_norm_k": True, "extra_ffn_kv_proj": True, "extra_attn_kv_proj": False,
            "depth_bs": 64, "depth_warps": 4,
        }  # fmt: skip
        model["block_overrides"] = {str(layers - 1): blocks | {"moda_skip_ffn_kv": True}}
    return {"model": model, "train_module": {"max_sequence_length": 64}, "init_seed": 42}


def state_dict(values, seed=0):
    """Random tensors by name, float32; norm scales from 0.5 to 1.5, so that a norm in the wrong place shows."""
    random, model = np.random.default_rng(seed), values["model"]
    block, width, layers = model["block"], model["d_model"], model["n_layers"]
    mixer, hidden = block["sequence_mixer"], block["feed_forward"]["hidden_size"]
    heads, head_dim = mixer["n_heads"], mixer["head_dim"]
    kv_heads, moda = mixer.get("n_kv_heads", heads), block["name"] in MODA_BLOCKS
    tensors = {}

    def matrix(name, outputs, inputs):
        tensors[f"{name}.weight"] = random.normal(0, 1.5 * inputs**-0.5, (outputs, inputs)).astype(np.float32)

    def norm(name, size):
        tensors[f"{name}.weight"] = random.uniform(0.5, 1.5, size).astype(np.float32)

    tensors["embeddings.weight"] = random.normal(0, 1, (model["vocab_size"], width)).astype(np.float32)
    for i in range(layers):
        attention, ffn = f"blocks.{i}.attention", f"blocks.{i}.feed_forward"
        if moda and i < layers - 1:
            matrix(f"{ffn}.kv_proj", 2 * kv_heads * head_dim, width)
        attention, ffn = (f"{attention}.attention", f"{ffn}.feed_forward") if moda else (attention, ffn)
        for name, count in (("w_q", heads), ("w_k", kv_heads), ("w_v", kv_heads)):
            matrix(f"{attention}.{name}", count * head_dim, width)
        matrix(f"{attention}.w_out", width, heads * head_dim)
        if "qk_norm" in mixer:
            for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
                norm(f"{attention}.{name}", head_dim if mixer["use_head_qk_norm"] else count * head_dim)
        for name, shape in (("w1", (hidden, width)), ("w3", (hidden, width)), ("w2", (width, hidden))):
            matrix(f"{ffn}.{name}", *shape)
        norm(f"blocks.{i}.attention_norm", width)
        norm(f"blocks.{i}.feed_forward_norm", width)
    norm("lm_head.norm", width)
    matrix("lm_head.w_out", model["vocab_size"], width)
    return tensors


def rms(x, scale, epsilon):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def rotated(x, theta):
    """x [T, heads, H], the token's number its position: pairs (i, i + H/2)."""
    tokens, _, size = x.shape
    half, y = size // 2, np.empty_like(x)
    for t in range(tokens):
        for i in range(half):
            angle = t * theta ** (-2 * i / size)
            a, b = x[t, :, i], x[t, :, half + i]
            y[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            y[t, :, half + i] = b * math.cos(angle) + a * math.sin(angle)
    return y


def logits(values, tensors, tokens):
    """[T, V] float64 of one row of tokens."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    model = values["model"]
    block, mixer = model["block"], model["block"]["sequence_mixer"]
    kind, epsilon = block["name"], block["layer_norm"]["eps"]
    heads, head_dim, theta = mixer["n_heads"], mixer["head_dim"], mixer["rope"]["theta"]
    kv_heads, moda = mixer.get("n_kv_heads", heads), kind in MODA_BLOCKS
    entries = []  # (key, value), [T, K, H] each
    x = w["embeddings.weight"][tokens]
    count = len(tokens)

    for i in range(model["n_layers"]):
        at, fn = f"blocks.{i}.attention.", f"blocks.{i}.feed_forward."
        at, inner = (at + "attention.", fn + "feed_forward.") if moda else (at, fn)

        def split(y):
            return y.reshape(count, -1, head_dim)

        def qk_norm(y, name, at=at):
            if "qk_norm" not in mixer:
                return y
            flat = y if mixer["use_head_qk_norm"] else y.reshape(count, -1)
            return rms(flat, w[f"{at}{name}.weight"], epsilon).reshape(y.shape)

        def before(y, name, i=i):
            return rms(y, w[f"blocks.{i}.{name}.weight"], epsilon) if kind in ("default", "moda") else y

        def behind(x, y, name, i=i):
            scale = w[f"blocks.{i}.{name}.weight"]
            if kind in ("post_norm", "post_norm_moda"):
                return rms(x + y, scale, epsilon)
            return x + (rms(y, scale, epsilon) if kind == "reordered_norm" else y)

        u = before(x, "attention_norm")
        q = rotated(qk_norm(split(u @ w[f"{at}w_q.weight"].T), "q_norm"), theta)
        key = qk_norm(split(u @ w[f"{at}w_k.weight"].T), "k_norm")
        k, v = rotated(key, theta), split(u @ w[f"{at}w_v.weight"].T)
        out = np.zeros((count, heads, head_dim))
        for t in range(count):
            for n in range(heads):
                m = n * kv_heads // heads
                seen = [(k[s, m], v[s, m]) for s in range(t + 1)]
                seen += [(depth_key[t, m], depth_value[t, m]) for depth_key, depth_value in entries]
                weights = np.exp([q[t, n] @ one / math.sqrt(head_dim) for one, _ in seen])
                out[t, n] = sum(weight * value for weight, (_, value) in zip(weights, seen, strict=True)) / sum(weights)
        x = behind(x, out.reshape(count, -1) @ w[f"{at}w_out.weight"].T, "attention_norm")
        u = before(x, "feed_forward_norm")
        if moda and i < model["n_layers"] - 1:
            entries.append((key, v))
            pair = (u @ w[f"{fn}kv_proj.weight"].T).reshape(count, 2, kv_heads, head_dim)
            entries.append((qk_norm(pair[:, 0], "k_norm"), pair[:, 1]))
        gate, up = u @ w[f"{inner}w1.weight"].T, u @ w[f"{inner}w3.weight"].T
        x = behind(x, (gate / (1 + np.exp(-gate)) * up) @ w[f"{inner}w2.weight"].T, "feed_forward_norm")
    return rms(x, w["lm_head.norm.weight"], epsilon) @ w["lm_head.w_out.weight"].T


def write_checkpoint(folder, values, dtype="float32", seed=0):
    """config.json and model.safetensors; returns the tensors as they are read back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    save_file({n: t.astype(kind) for n, t in state_dict(values, seed).items()}, folder / "model.safetensors")
    return load_file(folder / "model.safetensors")
