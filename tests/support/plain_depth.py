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

    def add(self, x, y, name):
        """The residual sum, and the norm that may stand behind it."""
        return self.norm(x + y, name) if self.config.norm == "post_sum" else x + y

    def attention(self, h, mix=lambda q, k, v: v):
        """h: what query, key and value are projected from, or the three by name, behind their norms."""
        a, config = self.p["attention"], self.config
        if not isinstance(h, dict):
            h = dict.fromkeys(("query", "key", "value"), self.norm(h, "attention_norm") if self.pre else h)

        def heads(name, norm):
            y = einsum("btd,dnh->btnh", h[name], a[name]["kernel"])
            if norm and config.qk_norm:
                y = plain_model.qk_norm(y, a[norm]["scale"], config)
            return rope(y, self.positions, config.rope_theta) if norm else y

        q, k, v = heads("query", "query_norm"), heads("key", "key_norm"), heads("value", None)
        v = mix(q, k, v)
        y = plain_model.attention(q, k, v, [], [], self.visible)
        y = einsum("btnh,nhd->btd", y, a["output"]["kernel"])
        return self.norm(y, "attention_norm") if config.norm == "post" else y

    def ffn(self, h):
        f = self.p["ffn"]
        u = self.norm(h, "ffn_norm") if self.pre else h
        y = jax.nn.silu(einsum("btd,df->btf", u, f["gate"]["kernel"])) * einsum("btd,df->btf", u, f["up"]["kernel"])
        y = einsum("btf,fd->btd", y, f["down"]["kernel"])
        return self.norm(y, "ffn_norm") if self.config.norm == "post" else y


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

        x = layer.add(x, layer.attention(x, mix), "attention_norm")
        x = layer.add(x, layer.ffn(x), "ffn_norm")
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

        x = layer.add(x, layer.attention(x, mix), "attention_norm")
        x = layer.add(x, layer.ffn(x), "ffn_norm")
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


def mudd(config, layers, x):
    def sums(p, x, sources, count):
        n = len(sources)
        hidden = 64 * (count * n // 64 + 1)
        u = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)
        h = einsum("btd,dm->btm", u, p["first"]["kernel"][:, :hidden])
        h = h * 0.5 * (1 + jax.lax.erf(h / 2**0.5))
        weights = einsum("btm,mca->btca", h, p["second"]["kernel"][:hidden, :, :n]) + p["second"]["offset"][:, :n]
        return [sum(weights[:, :, c, a, None] * sources[n - 1 - a] for a in range(n)) for c in range(count)]

    outputs = [x]
    for number, layer in enumerate(layers):
        depth = layer.p["depth"]
        query, key, value, residual = [x] * 4 if number == 0 else sums(depth["attention_weights"], x, outputs, 4)
        inputs = {"query": query, "key": key, "value": value}
        if layer.pre:
            scales = {
                "query": layer.p["attention_norm"], "key": depth["key_input_norm"], "value": depth["value_input_norm"],
            }  # fmt: skip
            inputs = {n: rms(h, scales[n]["scale"], config.norm_epsilon) for n, h in inputs.items()}
        x = residual + layer.attention(inputs)
        x = x + layer.ffn(x)
        outputs.append(x)
    return sums(layers[-1].p["depth"]["output_weights"], x, outputs, 1)[0]


def moda(config, layers, x):
    """MoDA with its options: every entry a number of dense logits, one after the other."""
    section, theta, H = config.moda, config.rope_theta, config.head_dim
    groups, entries = config.num_heads // config.num_kv_heads, []  # (kind, raw key, its norm's scale, key, value)

    def normed(y, scale):
        return plain_model.qk_norm(y, scale, config)

    def wide(y):
        return jnp.repeat(y, groups, axis=2)

    def kept(y):
        """As its slot holds it; gradients straight through."""
        if section.entry_dtype is None:
            return y
        rounded = jnp.clip(y, -448, 448).astype(section.entry_dtype).astype(y.dtype)
        return y + jax.lax.stop_gradient(rounded - y)

    for number, layer in enumerate(layers):
        a, depth, positions = layer.p["attention"], layer.p.get("depth"), layer.positions
        u = layer.norm(x, "attention_norm") if layer.pre else x
        q, k, v = (einsum("btd,dnh->btnh", u, a[name]["kernel"]) for name in ("query", "key", "value"))
        scale, raw = a["key_norm"]["scale"], k
        q = normed(q, a["query_norm"]["scale"])
        asked = rope(q, positions, theta) if section.query_rotated else q
        q, k = rope(q, positions, theta), rope(normed(raw, scale), positions, theta)
        logits, values = [], []
        for place, (kind, raw_key, writer_scale, own_key, value) in enumerate(entries):
            key = {
                "own": own_key, "writer_norm": normed(raw_key, writer_scale), "reader_norm": normed(raw_key, scale),
            }[section.key]  # fmt: skip
            key, value = kept(key), kept(value)
            logit = jnp.sum(asked * wide(key), axis=-1) * H**-0.5
            if section.chunk > 1:  # over the row's tokens [B, T, N, T], dense
                chunks = positions // section.chunk
                near = layer.visible & (chunks[:, :, None] == chunks[:, None])
                logit = einsum("btnh,bunh->btnu", asked, wide(key)) * H**-0.5
                logit = jnp.where(near[:, :, None], logit, -jnp.inf)
            if section.entry_bias:
                logit = logit + depth["entry_bias"]["offset"][kind]
            age, read = len(entries) - place, True
            if section.read == "window":
                read = age <= section.read_slots
            elif section.read == "hybrid":
                read = place < section.read_first or age <= section.read_slots - section.read_first
            elif section.read == "top":
                scores = depth["slot_scores"]["offset"][: len(entries)]
                better = (scores > scores[place]) | ((scores == scores[place]) & (jnp.arange(len(entries)) > place))
                read = jnp.sum(better) < section.read_slots
                value = value * 2 / (1 + jnp.exp(-scores[place]))
            logits.append(jnp.where(read, logit, -jnp.inf))
            values.append(wide(value))
        over = jnp.where(layer.visible[:, None], einsum("btnh,bunh->bntu", q, wide(k)) * H**-0.5, -jnp.inf)
        over = jnp.moveaxis(over, 1, 2)  # [B, T, N, T]
        T = over.shape[-1]
        null = [jnp.broadcast_to(depth["null_slot"]["offset"], over.shape[:-1])] if section.null_slot else []
        if section.softmax == "separate":
            y = jnp.einsum("btnu,bunh->btnh", jax.nn.softmax(over, axis=-1), wide(v), precision="highest")
            if entries:
                weights = jax.nn.softmax(jnp.stack(logits, axis=-1), axis=-1)
                read = sum(weights[..., i, None] * value for i, value in enumerate(values))
                gate = jax.nn.sigmoid(depth["softmax_gate"]["offset"])[:, None]
                y = (1 - gate) * y + gate * read
        else:
            logits = logits if section.chunk > 1 else [logit[..., None] for logit in (*logits, *null)]
            weights = jnp.concatenate([over, *logits], axis=-1)
            weights = jax.nn.softmax(weights, axis=-1)
            y = jnp.einsum("btnu,bunh->btnh", weights[..., :T], wide(v), precision="highest")
            if section.chunk > 1:
                parts = jnp.split(weights[..., T:], len(values), axis=-1) if values else []
                y = y + sum(einsum("btnu,bunh->btnh", part, value) for part, value in zip(parts, values, strict=True))
            else:
                y = y + sum(weights[..., T + i, None] * value for i, value in enumerate(values))
        y = einsum("btnh,nhd->btd", y, a["output"]["kernel"])
        y = layer.norm(y, "attention_norm") if config.norm == "post" else y

        def entry(kind, raw, value, scale=scale, positions=positions):
            return kind, raw, scale, rope(normed(raw, scale), positions, theta), value

        def projected(kind, name, inputs, depth=depth, entry=entry):
            pair = einsum("btd,dckh->btckh", inputs, depth[name]["kernel"])
            return entry(kind, pair[:, :, 0], pair[:, :, 1])

        writes = number < len(layers) - 1 and (section.read != "stride" or number % section.read_stride == 0)
        if writes:
            entries.append(projected(0, "attention_kv", u) if section.attn_kv else entry(0, raw, v))
        x = layer.add(x, y, "attention_norm")
        if writes and section.ffn_kv:
            entries.append(projected(1, "ffn_kv", layer.norm(x, "ffn_norm") if layer.pre else x))
        x = layer.add(x, layer.ffn(x), "ffn_norm")
    return x


MODELS = {
    function.__name__: function
    for function in (
        attnres, attnres_block, attnres_delta, denseformer, depth_attention, hc, mhc, moda, mudd, value_mixing,
        value_residual,
    )
}  # fmt: skip


def logits(params, config, tokens, segment_ids=None, positions=None):
    """As `plain_model.logits`, for the mechanisms of MODELS; none and the paper's MoDA are `plain_model`'s."""
    paper = {"ffn_kv": config.moda.ffn_kv, "attn_kv": config.moda.attn_kv}
    if config.depth not in MODELS or (config.depth == "moda" and config.moda == type(config.moda)(**paper)):
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
