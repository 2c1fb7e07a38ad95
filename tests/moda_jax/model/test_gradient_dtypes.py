"""Every gradient has its parameter's dtype, over whole trees: what accumulation in a scan and SGD rely on."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.selection import quick_of

from moda_jax import DepthStream, MoDAAttention, Transformer, TransformerConfig, depth_scan
from pallas_kernels.norm import rms_norm_backward

B, T, D, N, K, H, L = 2, 5, 16, 4, 2, 4, 3
SIZES = {"width": D, "num_heads": N, "num_kv_heads": K, "head_dim": H}


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def assert_gradients_have_their_dtypes(loss, *trees):
    """Of abstract values: dtypes are known before anything is compiled."""
    gradients = jax.eval_shape(jax.grad(loss, argnums=tuple(range(len(trees)))), *trees)
    wrong = {
        jax.tree_util.keystr(path): f"{gradient.dtype}, expected {leaf.dtype}"
        for (path, gradient), leaf in zip(
            jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(trees), strict=True
        )
        if gradient.dtype != leaf.dtype
    }
    assert not wrong


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.mark.parametrize("compute", quick_of(("float32", "bfloat16"), ("bfloat16",)))
@pytest.mark.parametrize("dtype", quick_of(("float32", "bfloat16", "float16"), ("bfloat16",)))
@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "post", "depth": "moda", "depth_ffn_kv": True},
        {"norm": "pre", "depth": "moda", "depth_attn_kv": True, "tie_embeddings": True},
        {"norm": "post", "depth": "none", "qk_norm": False},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_of_the_model(fields, dtype, compute, x64):
    config = TransformerConfig(
        vocab_size=11, num_layers=L, ffn_width=24, dtype=compute, attention_implementation="xla", **SIZES, **fields
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    params = jax.eval_shape(lambda tree: cast(tree, dtype), params)
    tokens = jnp.zeros((B, T), jnp.int32)
    assert_gradients_have_their_dtypes(lambda params: jnp.mean(jnp.square(nnx.merge(graph, params)(tokens))), params)


@pytest.mark.parametrize("loop", ["scan", "remat", "depth_scan"])
@pytest.mark.parametrize("dtype", quick_of(("float32", "bfloat16", "float16"), ("bfloat16",)))
def test_of_the_layer(dtype, loop, x64):
    layer = nnx.eval_shape(lambda: MoDAAttention(**SIZES, ffn_kv=True, dtype="bfloat16", rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)
    params = jax.eval_shape(lambda tree: jax.tree.map(lambda x: jnp.stack([x.astype(dtype)] * L), tree), params)
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)

    def block(params, x, stream):
        layer = nnx.merge(graph, params)
        y, stream = layer(x, stream)
        return x + y, layer.write_ffn(x, stream)

    def loss(params, x):
        stream = DepthStream.empty(B, T, 2 * L, K, H, "bfloat16")
        if loop == "depth_scan":
            x, _ = depth_scan(block, params, x, stream)
        else:
            step = jax.checkpoint(block) if loop == "remat" else block
            stream = DepthStream(stream.key, stream.value, jnp.int32(0))
            (x, _), _ = jax.lax.scan(lambda carry, params: (step(params, *carry), None), (x, stream), params)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    assert_gradients_have_their_dtypes(loss, params, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_of_the_norm(implementation, dtype, x64):
    x, scale = jax.ShapeDtypeStruct((3, 8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((8, 64), dtype)
    rotation = (jax.ShapeDtypeStruct((3, 32), jnp.float32),) * 2
    dx, dscale = jax.eval_shape(
        lambda *a: rms_norm_backward(*a, epsilon=1e-6, implementation=implementation), x, x, scale, rotation
    )
    assert (dx.dtype, dscale.dtype) == (jnp.bfloat16, jnp.dtype(dtype))
