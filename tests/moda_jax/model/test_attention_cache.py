"""`MoDAAttention.decode` with a cache of each layer: token by token it is what the layers make of the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax import AttentionCache, DepthStream, MoDAAttention

B, T, D, N, K, H, L, C = 2, 7, 16, 4, 2, 4, 3, 9
SIZES = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "implementation": "xla", "dtype": "float32"}


@pytest.fixture(scope="module")
def layers():
    return [MoDAAttention(D, **SIZES, ffn_kv=True, initializer_range=0.3, rngs=nnx.Rngs(i)) for i in range(L)]


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def empty_stream(tokens):
    return DepthStream.empty(B, tokens, 2 * L, K, H, jnp.float32)


def empty_caches():
    return [AttentionCache.empty(B, C, K, H, jnp.float32) for _ in range(L)]


def whole(layers, x):
    stream = empty_stream(x.shape[1])
    for layer in layers:
        y, stream = layer(x, stream)
        x = x + y
        stream = layer.write_ffn(x, stream)
    return x


def decoded(layers, x, caches):
    """The next tokens x [B, T, D] through all layers, and the caches behind them."""
    stream, after = empty_stream(x.shape[1]), []
    for layer, cache in zip(layers, caches, strict=True):
        positions = cache.places(x.shape[1])
        y, stream, cache = layer.decode(x, stream, cache)
        x = x + y
        stream = layer.write_ffn(x, stream, positions)
        after.append(cache)
    return x, after


def test_a_prompt_and_then_one_token_at_a_time(layers, x):
    expected = whole(layers, x)
    step = jax.jit(lambda x, caches: decoded(layers, x, caches))
    y, caches = step(x[:, :4], empty_caches())
    parts = [y]
    for t in range(4, T):
        y, caches = step(x[:, t : t + 1], caches)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(caches[0].length, [T, T])


def test_rows_of_different_lengths_behind_padded_prompts(layers, x):
    """Row 0 has 2 tokens, row 1 has 4; what the padding left in the cache, NaN here, does not matter."""
    lengths = jnp.array([2, 4])
    _, caches = decoded(layers, x[:, :4], empty_caches())
    caches = [cache.truncated(lengths) for cache in caches]
    beyond = (jnp.arange(C) >= lengths[:, None])[:, :, None, None]
    caches = [
        AttentionCache(jnp.where(beyond, jnp.nan, c.key), jnp.where(beyond, jnp.nan, c.value), c.length) for c in caches
    ]
    following = jnp.stack([x[0, 2:5], x[1, 4:7]])
    y, caches = decoded(layers, following, caches)
    expected = whole(layers, x)
    np.testing.assert_allclose(y[0], expected[0, 2:5], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(y[1], expected[1, 4:7], rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(caches[-1].length, [5, 7])


def test_a_full_cache_is_named_and_never_overwritten():
    entry = jnp.ones((B, 3, K, H))
    cache = AttentionCache.empty(B, 4, K, H, jnp.float32).append(entry, entry)
    with pytest.raises(ValueError, match=r"AttentionCache.append: 3 more tokens behind 3 do not fit into 4 places"):
        cache.append(entry, entry)
    after = jax.jit(lambda cache: cache.append(2 * entry, 2 * entry))(cache)
    np.testing.assert_array_equal(after.length, [6, 6])  # beyond the capacity: seen by whoever looks
    np.testing.assert_array_equal(after.key[0, :, 0, 0], [1, 1, 1, 2])


@pytest.mark.parametrize(
    ("shape", "words"),
    [((B, 1, K, H + 2), "key has shape"), ((B + 1, 1, K, H), "key has shape"), ((B, K, H), "key has shape")],
)
def test_entries_that_do_not_fit(shape, words):
    with pytest.raises(ValueError, match=words):
        AttentionCache.empty(B, 4, K, H, jnp.float32).append(jnp.ones(shape), jnp.ones(shape))


def test_an_empty_size_is_refused():
    with pytest.raises(ValueError, match=r"AttentionCache.empty: expected positive sizes"):
        AttentionCache.empty(B, 0, K, H)
