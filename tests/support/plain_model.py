"""An independent MoDA transformer for comparison: unrolled layers, Python lists of K and V, dense attention, plain
autodiff.

Written from the paper alone and from a model's parameter tree; it imports nothing of `moda_jax` or `pallas_kernels`.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def einsum(spec, a, b):
    return jnp.einsum(spec, a, b, precision=HIGHEST)


def rms(x, scale, epsilon):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def qk_norm(y, scale, config):
    """y [B, T, heads, H]: over all heads together, or over each."""
    flat = y if config.qk_norm_per_head else y.reshape(*y.shape[:2], -1)
    return rms(flat, scale, config.norm_epsilon).reshape(y.shape)


def rope(x, positions, theta):
    """x [B, T, heads, H], complex rotation of (x[i], x[i + H/2])."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] / theta ** (jnp.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], axis=-1)


def attention(q, k, v, depth_keys, depth_values, visible):
    """Dense softmax over the sequence and the lists of depth entries. visible: [B, T, T] bool."""
    _, T, N, H = q.shape
    group = N // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits = jnp.where(visible[:, None], einsum("btnh,bunh->bntu", q, k), -jnp.inf)
    if depth_keys:
        depth_key = jnp.repeat(jnp.stack(depth_keys, axis=2), group, axis=3)  # [B, T, S, N, H]
        logits = jnp.concatenate([logits, einsum("btnh,btsnh->bnts", q, depth_key)], axis=-1)
    p = jax.nn.softmax(logits * H**-0.5, axis=-1)
    out = einsum("bntu,bunh->btnh", p[..., :T], v)
    if depth_values:
        depth_value = jnp.repeat(jnp.stack(depth_values, axis=2), group, axis=3)
        out += einsum("bnts,btsnh->btnh", p[..., T:], depth_value)
    return out


def layer(p, config, x, positions, visible, depth_keys, depth_values, writes):
    a, eps, theta = p["attention"], config.norm_epsilon, config.rope_theta
    pre = config.norm == "pre"

    def behind(x, y, name):
        """The sub-layer's output added, with the norm that stands there."""
        if config.norm == "post_sum":
            return rms(x + y, p[name]["scale"], eps)
        return x + (y if pre else rms(y, p[name]["scale"], eps))

    def heads_norm(y, name):
        return qk_norm(y, a[name]["scale"], config) if config.qk_norm else y

    u = rms(x, p["attention_norm"]["scale"], eps) if pre else x
    q = rope(heads_norm(einsum("btd,dnh->btnh", u, a["query"]["kernel"]), "query_norm"), positions, theta)
    k = rope(heads_norm(einsum("btd,dkh->btkh", u, a["key"]["kernel"]), "key_norm"), positions, theta)
    v = einsum("btd,dkh->btkh", u, a["value"]["kernel"])
    y = attention(q, k, v, depth_keys, depth_values, visible)
    y = einsum("btnh,nhd->btd", y, a["output"]["kernel"])

    def projected(name, inputs):
        kv = einsum("btd,dckh->btckh", inputs, p["depth"][name]["kernel"])
        return rope(heads_norm(kv[:, :, 0], "key_norm"), positions, theta), kv[:, :, 1]

    if writes:
        dk, dv = projected("attention_kv", u) if config.depth_attn_kv else (k, v)
        depth_keys, depth_values = [*depth_keys, dk], [*depth_values, dv]
    x = behind(x, y, "attention_norm")
    u = rms(x, p["ffn_norm"]["scale"], eps) if pre else x
    if writes and config.depth_ffn_kv:
        dk, dv = projected("ffn_kv", u)
        depth_keys, depth_values = [*depth_keys, dk], [*depth_values, dv]
    y = einsum("btd,df->btf", u, p["ffn"]["gate"]["kernel"])
    y = y * jax.nn.sigmoid(y) * einsum("btd,df->btf", u, p["ffn"]["up"]["kernel"])
    y = einsum("btf,fd->btd", y, p["ffn"]["down"]["kernel"])
    return behind(x, y, "ffn_norm"), depth_keys, depth_values


def logits(params, config, tokens, segment_ids=None, positions=None):
    """params: nested dict of a Transformer's parameters (layers stacked); returns [B, T, V]."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
    segment_ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    visible = jnp.tril(jnp.ones((T, T), bool)) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    x = params["embedding"]["table"][tokens]
    depth_keys, depth_values = [], []
    for i in range(config.num_layers - 1):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        writes = config.depth == "moda"
        x, depth_keys, depth_values = layer(p, config, x, positions, visible, depth_keys, depth_values, writes)
    x, _, _ = layer(params["last_layer"], config, x, positions, visible, depth_keys, depth_values, False)
    x = rms(x, params["final_norm"]["scale"], config.norm_epsilon)
    if config.tie_embeddings:
        return einsum("btd,vd->btv", x, params["embedding"]["table"])
    return einsum("btd,dv->btv", x, params["head"]["kernel"])
