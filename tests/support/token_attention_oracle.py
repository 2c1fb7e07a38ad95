"""A decode step's attention from raw projections on, in float64, for one row; and what is drawn for it."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_gpu.token_attention import Token

EPSILON = 1e-6
H = 64


def operands(N, K, C, slots, n, filled, has_entry, buffer_slots, dtype=jnp.bfloat16):
    """Arguments of the kernels for one row: n places of the cache and `filled` of the slots hold something."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    def scale(heads):
        return jnp.asarray(1 + 0.3 * random.normal(size=heads * H), jnp.float32)

    angle = random.normal(size=H // 2) * 3
    rotation = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    entry = (draw(2 * K * H), scale(K)) if has_entry else (None, None)
    token = Token(draw((N + 2 * K) * H), scale(N), scale(K), rotation, *entry)
    buffers = (draw(buffer_slots, K, H), draw(buffer_slots, K, H)) if slots else None
    return token, (draw(K, C, H), draw(K, C, H)), buffers, jnp.int32(n), jnp.int32(filled)


def wide(array):
    """As float64."""
    return np.asarray(array, np.float64)


def exact(token, cache, slots, n, filled):
    """The output in float64 but for keys and queries, which are rounded, and the arrays as they are then."""
    dtype, K = token.raw.dtype, cache[0].shape[0]
    N = token.query_norm.size // H
    cos, sin = (wide(x) for x in token.rotation)

    def placed(raw, scale):
        raw = wide(raw).reshape(-1, H)
        a, b = np.split(wide(scale).reshape(-1, H) * raw / np.sqrt(np.mean(raw * raw) + EPSILON), 2, axis=1)
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
        return wide(jnp.asarray(turned, jnp.float32).astype(dtype))

    query = placed(token.raw[: N * H], token.query_norm)
    own = placed(token.raw[N * H : (N + K) * H], token.key_norm), wide(token.raw[(N + K) * H :]).reshape(K, H)
    cache = [wide(x).copy() for x in cache]
    for array, new in zip(cache, own, strict=True):
        array[:, n] = new
    new = [own]
    if token.entry is not None:
        new.insert(0, (placed(token.entry[: K * H], token.entry_norm), wide(token.entry[K * H :]).reshape(K, H)))
    seen = [[x[:, :n], *(y[i][:, None] for y in new)] for i, x in enumerate(cache)]
    if slots is not None:
        slots = [wide(x).copy() for x in slots]
        for i, array in enumerate(slots):
            seen[i].append(array[:filled].swapaxes(0, 1).copy())
            for j, entry in enumerate(new):
                array[filled + j] = entry[i]
    key, value = (np.repeat(np.concatenate(x, axis=1), N // K, axis=0) for x in seen)
    logits = np.einsum("nh,nuh->nu", query, key) * H**-0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.einsum("nu,nuh->nh", weights / weights.sum(axis=1, keepdims=True), value).reshape(-1), cache, slots


def output_bound(expected, dtype):
    """One rounding of the output; a key or query between two numbers may have been rounded the other way."""
    return float(jnp.finfo(dtype).eps) * (np.abs(expected) + 0.25 * np.abs(expected).max())


def check_written(found, expected, dtype):
    """Cache and slots are what they should be, bit for bit but for roundings of what is new."""
    eps = float(jnp.finfo(dtype).eps)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(wide(got), want, rtol=eps, atol=eps / 4)
        assert np.mean(wide(got) != want) < 1e-3
