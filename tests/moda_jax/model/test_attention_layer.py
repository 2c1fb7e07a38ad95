"""`MoDAAttention` alone: in an NNX model, in a Linen model, under jit, scan, remat and vmap."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.quick_compile import QUICK

from moda_jax import DepthStream, MoDAAttention, depth_scan

B, T, D, N, K, H, L = 2, 9, 16, 4, 2, 4, 3
SIZES = {"width": D, "num_heads": N, "num_kv_heads": K, "head_dim": H, "implementation": "xla", "dtype": "float32"}


class Block(nnx.Module):
    """Somebody's own pre-norm block around the layer."""

    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = MoDAAttention(**SIZES, ffn_kv=True, initializer_range=0.3, rngs=rngs)
        self.mlp = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x, stream):
        y, stream = self.attention(self.norm(x), stream)
        x = x + y
        stream = self.attention.write_ffn(x, stream)
        return x + jax.nn.gelu(self.mlp(x)), stream


@pytest.fixture(scope="module")
def stack():
    """(graphdef, stacked params, x) of L blocks."""

    @nnx.split_rngs(splits=L)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(rngs):
        return Block(rngs=rngs)

    graph, params = nnx.split(build(nnx.Rngs(0)))
    return graph, params, jax.random.normal(jax.random.key(1), (B, T, D))


def unrolled(graph, params, x):
    stream = DepthStream.empty(B, T, 2 * L, K, H, jnp.float32)
    for i in range(L):
        x, stream = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], params))(x, stream)
    return x, stream


def test_reads_then_appends_and_later_layers_see_it(stack):
    graph, params, x = stack
    layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], params)).attention
    empty = DepthStream.empty(B, T, 4, K, H, jnp.float32)
    y, stream = layer(x, empty)
    assert y.shape == x.shape and stream.length == 1
    _, key, value = layer.project(x, jnp.broadcast_to(jnp.arange(T), (B, T)))
    np.testing.assert_array_equal(stream.key[:, :, 0], key)
    np.testing.assert_array_equal(stream.value[:, :, 0], value)
    again, _ = layer(x, stream)
    assert jnp.max(jnp.abs(again - y)) > 1e-3
    # The first token's softmax: its own entry in the sequence and the same entry in depth weigh the same.
    np.testing.assert_allclose(again[:, 0], y[:, 0], rtol=1e-5, atol=1e-6)


def test_scan_remat_vmap_and_depth_scan_agree_with_the_unrolled_stack(stack):
    graph, params, x = stack

    def merged(params, x, stream):
        return nnx.merge(graph, params)(x, stream)

    def scanned(params, x, body):
        def step(carry, params):
            return body(params, *carry), None

        stream = DepthStream.empty(B, T, 2 * L, K, H, jnp.float32)
        stream = DepthStream(stream.key, stream.value, jnp.int32(0))
        return jax.lax.scan(step, (x, stream), params)[0]

    def looped(params, x):
        return depth_scan(merged, params, x, DepthStream.empty(B, T, 2 * L, K, H, jnp.float32))

    ways = {
        "scan": lambda params, x: scanned(params, x, merged),
        "remat": lambda params, x: scanned(params, x, jax.checkpoint(merged)),
        "depth_scan": looped,
    }

    def gradient(way):
        return jax.jit(
            jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(way(params, x)[0])), argnums=(0, 1)),
            compiler_options=QUICK,
        )

    expected = gradient(lambda params, x: unrolled(graph, params, x))(params, x)
    for name, way in ways.items():
        got = gradient(way)(params, x)
        jax.tree.map(
            lambda a, b, n=name: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=n), got, expected
        )
    xs = jnp.stack([x, -x])
    got = jax.jit(jax.vmap(lambda x: looped(params, x)[0]), compiler_options=QUICK)(xs)
    alone = jax.jit(lambda x: unrolled(graph, params, x)[0], compiler_options=QUICK)
    np.testing.assert_allclose(got, jnp.stack([alone(x) for x in xs]), rtol=1e-5, atol=1e-5)


def test_in_a_linen_model(stack):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            stream = DepthStream.empty(*x.shape[:2], 2, K, H, jnp.float32)
            for i in range(2):
                y, stream = nnx.bridge.to_linen(MoDAAttention, **SIZES, initializer_range=0.3, name=f"attention_{i}")(
                    nn.LayerNorm()(x), stream
                )
                x = x + y
            return x

    x = stack[2]
    variables = Linen().init(jax.random.key(0), x)
    assert variables["params"]["attention_1"]["query"]["kernel"].shape == (D, N, H)

    def loss(variables):
        return jnp.sum(jnp.square(Linen().apply(variables, x)))

    gradient = jax.jit(jax.grad(loss))(variables)["params"]["attention_0"]["key"]["kernel"]
    direction = jax.random.normal(jax.random.key(2), gradient.shape)

    def moved(step):
        params = dict(variables["params"])
        params["attention_0"] = jax.tree.map(lambda leaf: leaf, params["attention_0"])
        params["attention_0"]["key"]["kernel"] += step * direction
        return loss(variables | {"params": params})

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=2e-2)


def test_user_mistakes_are_named():
    with pytest.raises(ValueError, match="num_heads=5: expected a multiple of num_kv_heads=2"):
        MoDAAttention(16, 5, 2, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="head_dim=3"):
        MoDAAttention(16, 4, 2, 3, rngs=nnx.Rngs(0))
    layer = MoDAAttention(**SIZES, rngs=nnx.Rngs(0))
    stream = DepthStream.empty(B, T, 1, K, H, jnp.float32)
    with pytest.raises(ValueError, match="ffn_kv=False, expected ffn_kv=True"):
        layer.write_ffn(jnp.zeros((B, T, D)), stream)
    for other, message in (
        (DepthStream.empty(B, T, 1, K, H, "bfloat16"), r"stream.key is bfloat16\[2, 9, 1, 2, 4\]: expected .* float32"),
        (DepthStream.empty(B, T, 1, 1, H, jnp.float32), r"stream.key is float32\[2, 9, 1, 1, 4\]: expected .* 2, 4\]"),
        (DepthStream(stream.key, stream.value[:, 1:], stream.length), r"stream.value is float32\[2, 8, 1, 2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(jnp.zeros((B, T, D)), other)
        with pytest.raises(ValueError, match=message):
            MoDAAttention(**SIZES, ffn_kv=True, rngs=nnx.Rngs(0)).write_ffn(jnp.zeros((B, T, D)), other)
    _, full = layer(jnp.zeros((B, T, D)), stream)
    with pytest.raises(ValueError, match="all 1 slots are filled"):
        layer(jnp.zeros((B, T, D)), full)
