"""An independent vision transformer for comparison: unrolled layers, lists of depth entries, dense attention, plain
autodiff. Written from the papers and from a model's parameter tree; it imports nothing of `moda_jax`."""

import jax
import jax.numpy as jnp
import numpy as np
from support.plain_model import attention, einsum, rms


def norm(x, p, config):
    if config.norm_kind == "rms":
        return rms(x, p["scale"], config.norm_epsilon)
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + config.norm_epsilon) * p["scale"] + p["bias"]


def linear(spec, x, p):
    y = einsum(spec, x, p["kernel"])
    return y + p["bias"] if "bias" in p else y


def turned(x, config, places):
    """x [B, T, heads, H]: half of the pairs by the row, half by the column, as complex numbers."""
    if config.rope_theta is None:
        return x
    half = x.shape[-1] // 2
    share = half // 2
    frequencies = config.rope_theta ** -(np.arange(share) / share)
    angles = np.concatenate([places[:, :1] * frequencies, places[:, 1:] * frequencies], axis=1)  # [T, H/2]
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)[None, :, None]
    return jnp.concatenate([z.real, z.imag], axis=-1)


def layer(p, config, x, places, entries, writes, factors):
    """factors [2, B]: what the outputs of attention and FFN are multiplied with."""
    a, pre = p["attention"], config.norm == "pre"

    def behind(x, y, name):
        factor = factors[0 if name == "attention_norm" else 1][:, None, None]
        return x + (y if pre else norm(y, p[name], config)) * factor

    def heads_norm(y, name):
        return rms(y.reshape(*y.shape[:2], -1), a[name]["scale"], config.norm_epsilon).reshape(y.shape)

    def placed(y, name):
        return turned(heads_norm(y, name) if config.qk_norm else y, config, places)

    u = norm(x, p["attention_norm"], config) if pre else x
    q = placed(linear("btd,dnh->btnh", u, a["query"]), "query_norm")
    k = placed(linear("btd,dkh->btkh", u, a["key"]), "key_norm")
    v = linear("btd,dkh->btkh", u, a["value"])
    visible = jnp.ones((x.shape[0], x.shape[1], x.shape[1]), bool)
    y = attention(q, k, v, [k for k, _ in entries], [v for _, v in entries], visible)
    y = linear("btnh,nhd->btd", y, a["output"])
    if writes:
        entries = [*entries, (k, v)]
    x = behind(x, y, "attention_norm")
    u = norm(x, p["ffn_norm"], config) if pre else x
    if writes and config.moda.ffn_kv:
        pair = einsum("btd,dckh->btckh", u, p["depth"]["ffn_kv"]["kernel"])
        entries = [*entries, (placed(pair[:, :, 0], "key_norm"), pair[:, :, 1])]
    f = p["ffn"]
    hidden = linear("btd,df->btf", u, f["up"])
    if config.ffn == "gelu":
        hidden = hidden * 0.5 * (1 + jax.scipy.special.erf(hidden / np.sqrt(2.0)))
    else:
        gate = linear("btd,df->btf", u, f["gate"])
        hidden = gate / (1 + jnp.exp(-gate)) * hidden
    return behind(x, linear("btf,fd->btd", hidden, f["down"]), "ffn_norm"), entries


def sines(grid, width):
    """[patches, D], pixel by pixel in loops."""
    table = np.zeros((grid * grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                wavelength = 10000.0 ** (i / quarter)
                for part, place in enumerate((row, column)):
                    begin = part * 2 * quarter
                    table[row * grid + column, begin + i] = np.sin(place / wavelength)
                    table[row * grid + column, begin + quarter + i] = np.cos(place / wavelength)
    return table


def logits(params, config, images, factors=None):
    """params: nested dict of a VisionTransformer's parameters; images [B, size, size, channels]; factors [L, 2, B], see
    `layer`; returns [B, C]."""
    factors = np.ones((config.num_layers, 2, len(images))) if factors is None else factors
    image, size = config.image, config.image.patch_size
    grid = image.size // size
    patches = []
    for row in range(grid):
        for column in range(grid):
            cut = images[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            patches.append(cut.reshape(len(images), -1))
    x = linear("btp,pd->btd", jnp.stack(patches, axis=1), params["patches"])
    places = np.array([(row + 1.0, column + 1.0) for row in range(grid) for column in range(grid)])
    if image.positions == "sincos":
        x = x + sines(grid, config.width)
    if image.pooling == "class_token":
        x = jnp.concatenate([jnp.tile(params["class_token"], (len(images), 1, 1)), x], axis=1)
        places = np.concatenate([np.zeros((1, 2)), places])
    if image.positions == "learned":
        x = x + params["position_table"]
    entries, writes = [], config.depth == "moda"
    for i in range(config.num_layers - 1):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x, entries = layer(p, config, x, places, entries, writes, factors[i])
    x, _ = layer(params["last_layer"], config, x, places, entries, False, factors[-1])
    x = norm(x, params["final_norm"], config)
    return linear("bd,dc->bc", x[:, 0] if image.pooling == "class_token" else x.mean(axis=1), params["head"])


def parameters(depth, width, patch, size, classes):
    """Of a DeiT without distillation, from its paper's architecture."""
    tokens = (size // patch) ** 2 + 1
    layer = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    embedding = 3 * patch * patch * width + width + width + tokens * width
    return embedding + depth * layer + 2 * width + (width + 1) * classes


def multiply_adds(depth, width, patch, size, classes):
    """(in matrix products; with five operations for each value of a LayerNorm, as published counts have it)."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    products = patches * 3 * patch * patch * width + width * classes
    products += depth * (12 * tokens * width * width + 2 * tokens * tokens * width)
    return products, products + 5 * (2 * depth + 1) * tokens * width
