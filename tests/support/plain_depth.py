"""Independent models of the depth mechanisms: unrolled layers, Python lists, plain autodiff, float32.

Each mechanism is a function of the sub-layers alone, written from its paper; what is not depth (norms, projections,
dense attention) is `plain_model`'s. Nothing here imports `moda_jax`.
"""

import jax
import jax.numpy as jnp
from support import plain_model
from support.plain_model import einsum, rms, rope

EPSILON = 1e-6


class Parts:
    """The sub-layers of one layer: their norms, wherever they stand, are inside."""

    def __init__(self, p, config, positions, visible):
        self.p, self.config, self.positions, self.visible = p, config, positions, visible
        self.pre = config.norm == "pre"

    def norm(self, x, name):
        return rms(x, self.p[name]["scale"], self.config.norm_epsilon)

    def attention(self, h, mix=lambda q, k, v: v):
        a, config = self.p["attention"], self.config
        u = self.norm(h, "attention_norm") if self.pre else h

        def heads(name, norm):
            y = einsum("btd,dnh->btnh", u, a[name]["kernel"])
            if norm and config.qk_norm:
                y = rms(y.reshape(*y.shape[:2], -1), a[norm]["scale"], config.norm_epsilon).reshape(y.shape)
            return rope(y, self.positions, config.rope_theta) if norm else y

        q, k, v = heads("query", "query_norm"), heads("key", "key_norm"), heads("value", None)
        v = mix(q, k, v)
        y = plain_model.attention(q, k, v, [], [], self.visible)
        y = einsum("btnh,nhd->btd", y, a["output"]["kernel"])
        return y if self.pre else self.norm(y, "attention_norm")

    def ffn(self, h):
        f = self.p["ffn"]
        u = self.norm(h, "ffn_norm") if self.pre else h
        y = jax.nn.silu(einsum("btd,df->btf", u, f["gate"]["kernel"])) * einsum("btd,df->btf", u, f["up"]["kernel"])
        y = einsum("btf,fd->btd", y, f["down"]["kernel"])
        return y if self.pre else self.norm(y, "ffn_norm")


def mixture(sources, read):
    """Attention Residuals' mixture of a list of [B, T, D]."""
    stacked = jnp.stack(sources)
    looks = stacked / jnp.sqrt(jnp.mean(stacked**2, axis=-1, keepdims=True) + EPSILON) * read["scale"]
    weights = jax.nn.softmax(jnp.sum(looks * read["vector"], axis=-1), axis=0)
    return jnp.sum(weights[..., None] * stacked, axis=0)


def attnres(config, layers, x):
    outputs = [x]
    for layer in layers:
        reads = layer.p["depth"]
        outputs.append(layer.attention(mixture(outputs, reads["attention_read"])))
        outputs.append(layer.ffn(mixture(outputs, reads["ffn_read"])))
    return mixture(outputs, layers[-1].p["depth"]["output_read"])


def attnres_delta(config, layers, x):
    outputs = [x]
    for number, layer in enumerate(layers):
        for name, function in (("attention_read", layer.attention), ("ffn_read", layer.ffn)):
            read = layer.p["depth"][name]
            sources = [] if (number, name) == (0, "attention_read") else list(outputs)
            if config.attnres_delta.null_source:
                sources.append(jnp.broadcast_to(read["null"]["vector"], x.shape))
            y = function(x + mixture(sources, read) if sources else x)
            x = x + y
            outputs.append(y)
    return x


def attnres_block(config, layers, x):
    size, closed, running = config.attnres_block.block_size, [x], None
    number = 0
    for layer in layers:
        for name, function in (("attention_read", layer.attention), ("ffn_read", layer.ffn)):
            h = mixture(closed if running is None else [*closed, running], layer.p["depth"][name])
            y = function(h)
            running, number = y if running is None else running + y, number + 1
            if number % size == 0:
                closed, running = [*closed, running], None
    return mixture(closed if running is None else [*closed, running], layers[-1].p["depth"]["output_read"])


def mhc(config, layers, x):
    n = config.mhc.streams
    streams = [x] * n
    for layer in layers:
        for name, function in (("attention_connection", layer.attention), ("ffn_connection", layer.ffn)):
            p = layer.p["depth"][name]
            flat = jnp.concatenate(streams, axis=-1)
            flat = flat / jnp.sqrt(jnp.mean(flat**2, axis=-1, keepdims=True) + EPSILON)
            products = einsum("btc,cm->btm", flat, p["kernel"].reshape(flat.shape[-1], -1))
            pre = jax.nn.sigmoid(p["gate"][0] * products[..., :n] + p["offset"][:n])
            post = 2 * jax.nn.sigmoid(p["gate"][1] * products[..., n : 2 * n] + p["offset"][n : 2 * n])
            matrix = jnp.exp(p["gate"][2] * products[..., 2 * n :] + p["offset"][2 * n :])
            matrix = matrix.reshape(*matrix.shape[:2], n, n)
            for _ in range(config.mhc.sinkhorn_rounds):
                matrix = matrix / matrix.sum(axis=-2, keepdims=True)
                matrix = matrix / matrix.sum(axis=-1, keepdims=True)
            y = function(sum(pre[..., i, None] * streams[i] for i in range(n)))
            streams = [
                sum(matrix[..., i, j, None] * streams[j] for j in range(n)) + post[..., i, None] * y for i in range(n)
            ]
    return sum(streams)


def hc(config, layers, x):
    n = config.hc.streams
    streams, number = [x] * n, 0
    for layer in layers:
        for name, function in (("attention_hyper", layer.attention), ("ffn_hyper", layer.ffn)):
            p = layer.p["depth"][name]
            weights = []  # of stream s: [B, T, n + 2]
            for s in range(n):
                u = streams[s] / jnp.sqrt(jnp.mean(streams[s] ** 2, axis=-1, keepdims=True) + EPSILON)
                dynamic = jnp.tanh(einsum("btd,dm->btm", u, p["kernel"]))
                dynamic = jnp.concatenate(
                    [p["gate"][0] * dynamic[..., : n + 1], p["gate"][1] * dynamic[..., n + 1 :]], axis=-1
                )
                start = [float(s == number % n), *(float(s == t) for t in range(n)), 1.0]
                weights.append(jnp.array(start) + p["offset"][s] + dynamic)
            y = function(sum(weights[s][..., 0, None] * streams[s] for s in range(n)))
            streams = [
                sum(weights[s][..., 1 + t, None] * streams[s] for s in range(n)) + weights[t][..., n + 1, None] * y
                for t in range(n)
            ]
            number += 1
    return sum(streams)


def depth_attention(config, layers, x):
    keys, values = [], []
    groups = config.num_heads // config.num_kv_heads

    def write(maps, output):
        pair = einsum("btd,dckh->btckh", output, maps["depth_kv"]["kernel"])
        keys.append(jnp.repeat(pair[:, :, 0], groups, axis=2))
        values.append(jnp.repeat(pair[:, :, 1], groups, axis=2))
        return einsum("btd,dnh->btnh", output, maps["depth_query"]["kernel"]) if "depth_query" in maps else None

    def read(query):
        if query is None:
            return values[0].reshape(x.shape)
        logits = jnp.stack([jnp.sum(query * key, axis=-1) for key in keys]) * config.head_dim**-0.5
        weights = jax.nn.softmax(logits, axis=0)
        return sum(w[..., None] * value for w, value in zip(weights, values, strict=True)).reshape(x.shape)

    query = write(layers[-1].p["depth"]["embedding_maps"], x)
    for layer in layers:
        query = write(layer.p["depth"]["attention_maps"], layer.attention(read(query)))
        query = write(layer.p["depth"]["ffn_maps"], layer.ffn(read(query)))
    return read(query)


def value_mixing(config, layers, x):
    keys, values = [], []
    for number, layer in enumerate(layers):

        def mix(q, k, v, number=number):
            query = q.reshape(*k.shape[:3], -1, k.shape[-1]).mean(axis=3)
            sources = [*zip(keys, values, strict=True), (k, v)]
            logits = jnp.stack([jnp.sum(query * key, axis=-1) for key, _ in sources]) * k.shape[-1] ** -0.5
            weights = jax.nn.softmax(logits, axis=0)
            v = sum(weight[..., None] * value for weight, (_, value) in zip(weights, sources, strict=True))
            if number % config.value_mixing.stride == 0:
                keys.append(k)
                values.append(v)
            return v

        x = x + layer.attention(x, mix)
        x = x + layer.ffn(x)
    return x


def value_residual(config, layers, x):
    section, first = config.value_residual, []
    for number, layer in enumerate(layers):

        def mix(q, k, v, number=number, p=layer.p):
            if number == 0:
                first.append(v)
                return v
            a, b = p["depth"]["weights"]["gate"] if section.learned else (section.first, section.own)
            return a * first[0] + b * v

        x = x + layer.attention(x, mix)
        x = x + layer.ffn(x)
    return x


def denseformer(config, layers, x):
    dilation, period = config.denseformer.dilation, config.denseformer.period
    outputs = [x]
    for number, layer in enumerate([*layers, None]):
        if number > 0 and number % period == 0:
            p = layers[-1].p["depth"]["output_weights"] if layer is None else layer.p["depth"]["attention_weights"]
            x = sum(p["vector"][age] * output for age, output in enumerate(outputs[::-1][::dilation]))
        if layer is not None:
            x = x + layer.attention(x)
            x = x + layer.ffn(x)
            outputs.append(x)
    return x


MODELS = {
    function.__name__: function
    for function in (
        attnres, attnres_block, attnres_delta, denseformer, depth_attention, hc, mhc, value_mixing, value_residual,
    )
}  # fmt: skip


def logits(params, config, tokens, segment_ids=None, positions=None):
    """As `plain_model.logits`, for the mechanisms of MODELS; MoDA and none are `plain_model`'s own."""
    if config.depth not in MODELS:
        return plain_model.logits(params, config, tokens, segment_ids, positions)
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
    segment_ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    visible = jnp.tril(jnp.ones((T, T), bool)) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    trees = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(config.num_layers - 1)]
    layers = [Parts(p, config, positions, visible) for p in (*trees, params["last_layer"])]
    x = MODELS[config.depth](config, layers, params["embedding"]["table"][tokens])
    x = rms(x, params["final_norm"]["scale"], config.norm_epsilon)
    return einsum("btd,vd->btv", x, params["embedding"]["table"])
