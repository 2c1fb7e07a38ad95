"""A DeiT in NumPy, float64, straight from the tensors of a checkpoint in timm's layout; and such a checkpoint."""

import math

import numpy as np

_ERF = np.vectorize(math.erf)


def make_tensors(*, width=12, depth=3, patch=2, size=6, channels=3, classes=4, ffn=20, seed=0):
    source = np.random.default_rng(seed)

    def draw(*shape, scale=0.4):
        return (scale * source.normal(size=shape)).astype(np.float32)

    tensors = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, (size // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": draw(width, channels, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "head.weight": draw(classes, width),
        "head.bias": draw(classes),
    }
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (ffn, width),
        "mlp.fc2": (width, ffn),
    }
    for i in range(depth):
        for name, shape in linears.items():
            tensors[f"blocks.{i}.{name}.weight"], tensors[f"blocks.{i}.{name}.bias"] = draw(*shape), draw(shape[0])
    for name in ("norm", *(f"blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2))):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + draw(width), draw(width)
    return tensors


def logits(tensors, images, num_heads):
    """images [B, size, size, channels]; returns [B, classes]."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * t[f"{name}.weight"]
            + t[f"{name}.bias"]
        )

    results = []
    for image in np.asarray(images, np.float64):
        kernel, rows = t["patch_embed.proj.weight"], []
        size = kernel.shape[-1]
        for top in range(0, image.shape[0], size):
            for left in range(0, image.shape[1], size):
                patch = image[top : top + size, left : left + size]
                rows.append(np.einsum("dchw,hwc->d", kernel, patch) + t["patch_embed.proj.bias"])
        x = np.concatenate([t["cls_token"][0], np.stack(rows)]) + t["pos_embed"][0]
        width = x.shape[1]
        channels = width // num_heads
        i = 0
        while f"blocks.{i}.norm1.weight" in t:
            both = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
            heads = []
            for h in range(num_heads):
                q, k, v = (
                    both[:, part * width + h * channels : part * width + (h + 1) * channels] for part in range(3)
                )
                p = np.exp(q @ k.T / math.sqrt(channels))
                heads.append(p / p.sum(axis=1, keepdims=True) @ v)
            x = x + linear(np.concatenate(heads, axis=1), f"blocks.{i}.attn.proj")
            hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            x = x + linear(hidden * (1 + _ERF(hidden / math.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
            i += 1
        results.append(linear(norm(x, "norm")[0], "head"))
    return np.stack(results)
