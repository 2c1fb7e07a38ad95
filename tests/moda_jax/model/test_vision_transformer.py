"""The vision transformer against an independent one, and its costs against those published."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import plain_vit
from support.mechanisms import assert_close, with_noise
from support.quick_compile import QUICK

from moda_jax import MoDAAttention, VisionTransformer, image_forward_flops, image_param_count
from moda_jax.config import TransformerConfig
from moda_jax.depth_config import MECHANISMS
from moda_jax.model.depth.stream import DepthStream
from moda_jax.model.function import split_module
from moda_jax.model.vision_transformer import kept_outputs
from moda_jax.vision_config import ImageModelSection

IMAGE = {"size": 8, "patch_size": 2, "channels": 3, "num_classes": 5}
DEIT = {"norm": "pre", "norm_kind": "layer", "ffn": "gelu", "biases": True, "qk_norm": False}
TINY = TransformerConfig(
    num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=24, rope_theta=None, causal=False,
    dtype="float32", attention_implementation="xla", initializer_range=0.3, image=ImageModelSection(**IMAGE),
)  # fmt: skip
CASES = {
    "deit with depth": {**DEIT, "depth": "moda"},
    "deit": {**DEIT, "depth": "none", "remat": "ffn"},
    "olmo's block, mean, rotary": {
        "depth": "moda", "rope_theta": 100.0, "image": IMAGE | {"pooling": "mean", "positions": "rotary"},
        "num_layers": 2, "layer_loop": "unroll", "remat": "none",
    },
    "class token, rotary": {
        **DEIT, "depth": "moda", "rope_theta": 100.0, "image": IMAGE | {"positions": "rotary"},
    },
    "mean, sines": {**DEIT, "depth": "moda", "image": IMAGE | {"pooling": "mean", "positions": "sincos"}},
    "class token, sines": {**DEIT, "depth": "none", "image": IMAGE | {"positions": "sincos"}},
}  # fmt: skip
QUICK_CASES = ("olmo's block, mean, rotary",)  # "deit with depth" is below too, with stochastic depth


def tiny(**fields):
    return TransformerConfig.from_dict(dataclasses.asdict(TINY) | fields)


@functools.cache
def perturbed(config):
    """The model's function, and fresh parameters with noise on all of them: what starts as 0 would hide mistakes."""
    function, params = split_module(VisionTransformer(config, rngs=nnx.Rngs(0)))
    return function, with_noise(params, seed=1)


def images(count=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 8, 8, 3)), jnp.float32)


def value_and_gradient(function, params):
    def scalar(params):
        logits = function(params, images())
        return jnp.sum(jnp.cos(jnp.arange(logits.size)).reshape(logits.shape) * jax.nn.log_softmax(logits)), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True), compiler_options=QUICK)(params)
    return logits, gradient


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_CASES else pytest.mark.slow) for name in CASES]
)
def test_logits_and_gradients_are_those_of_the_independent_model(name):
    config = tiny(**CASES[name])
    function, params = perturbed(config)
    got = value_and_gradient(lambda params, images: function.module(params)(images), params)
    assert got[0].shape == (2, 5) and got[0].dtype == jnp.float32
    expected = value_and_gradient(lambda params, images: plain_vit.logits(params, config, images), params)
    if config.depth == "none" and config.rope_theta is None:
        for gradient, name in itertools.product((got[1], expected[1]), ("layers", "last_layer")):
            assert_softmax_ignores_the_key_bias(gradient[name]["attention"])
    assert_close(got, expected, 2e-5)


def assert_softmax_ignores_the_key_bias(gradient):
    """Takes a key bias out of a gradient: it shifts all logits of a query alike, so all that is there is rounding."""
    of_key, of_query = gradient["key"].pop("bias"), gradient["query"]["bias"]
    assert jnp.linalg.norm(of_key) < 2e-5 * jnp.linalg.norm(of_query)


@pytest.mark.slow
@pytest.mark.parametrize("depth", MECHANISMS)
def test_patches_have_no_order_under_any_mechanism(depth):
    """Without positions the mean over the patches does not see where a patch stands."""
    config = tiny(norm="pre", depth=depth, num_layers=4, image=IMAGE | {"pooling": "mean"}, initializer_range=0.05)
    function, params = perturbed(config)
    params = params | {"position_table": jnp.zeros_like(params["position_table"])}
    given = images()
    columns = given.reshape(2, 8, 4, 2, 3)  # of patches
    turned = columns[:, :, ::-1].reshape(given.shape)
    run = jax.jit(lambda images: function.module(params)(images), compiler_options=QUICK)
    assert not np.array_equal(given, turned)
    np.testing.assert_allclose(run(given), run(turned), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_stochastic_depth_leaves_outputs_out_and_keeps_their_mean():
    config = tiny(**CASES["deit with depth"], stochastic_depth=0.6)
    function, params = perturbed(config)
    seeds = jnp.uint32([3, 8])
    kept = np.asarray(kept_outputs(config, seeds))
    assert kept.shape == (3, 2, 2) and kept[0].all() and 0 < kept[1:].sum() < 8  # the first layer loses nothing
    factors = kept / (1.0 - np.array([0.0, 0.3, 0.6]))[:, None, None]

    def run(params, images):
        module = function.module(params)
        return module.logits(module.hidden(images, seeds))

    expected = value_and_gradient(lambda params, images: plain_vit.logits(params, config, images, factors), params)
    assert_close(value_and_gradient(run, params), expected, 2e-5)


def test_what_is_left_out_depends_on_the_image_alone_and_has_the_rate_of_the_layer():
    config = tiny(num_layers=4, stochastic_depth=0.6)
    seeds = jnp.arange(2000, dtype=jnp.uint32)
    kept = np.asarray(kept_outputs(config, seeds))
    of_both = np.repeat([[1.0], [0.8], [0.6], [0.4]], 2, axis=1)  # attention's and the FFN's
    np.testing.assert_allclose(kept.mean(axis=2), of_both, atol=0.04)
    np.testing.assert_array_equal(kept_outputs(config, seeds[7:9]), kept[:, :, 7:9])


DEITS = {"ti": (192, 3), "s": (384, 6)}


def deit(width, heads, **fields):
    return TransformerConfig(
        num_layers=12, width=width, num_heads=heads, num_kv_heads=heads, head_dim=64, ffn_width=4 * width,
        rope_theta=None, causal=False, **DEIT, **{"depth": "none"} | fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "exact", "millions", "published"), [("ti", 5_717_416, 5.7, 1.26), ("s", 22_050_664, 22.1, 4.6)]
)
def test_deit_has_the_published_size(name, exact, millions, published):
    config = deit(*DEITS[name])
    width = config.width
    assert image_param_count(config) == exact == plain_vit.parameters(12, width, 16, 224, 1000)
    assert round(exact / 1e6, 1) == millions
    products, counted = plain_vit.multiply_adds(12, width, 16, 224, 1000)
    assert image_forward_flops(config) == 2 * products
    assert round(counted / 1e9, 2 if published == 1.26 else 1) == published


@pytest.mark.parametrize(
    "fields",
    [
        {}, DEIT, {"depth": "none"}, {"depth": "hc", "norm": "pre"}, {"image": IMAGE | {"pooling": "mean"}},
        {"image": IMAGE | {"positions": "sincos"}}, {"biases": True}, {"ffn": "gelu"}, {"norm_kind": "layer"},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_are_counted_as_they_are(fields):
    config = tiny(**fields)
    params = jax.eval_shape(lambda: split_module(VisionTransformer(config, rngs=nnx.Rngs(0)))[1])
    assert image_param_count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"causal": True}, r"model\.causal=True: expected False"),
        ({"rope_theta": 100.0}, r"model\.rope_theta=100\.0: expected None with model\.image\.positions='learned'"),
        ({"image": IMAGE | {"positions": "rotary"}}, r"model\.rope_theta=None: expected a number"),
        (
            {"image": IMAGE | {"positions": "rotary"}, "rope_theta": 10.0, "head_dim": 6},
            r"model\.head_dim=6: expected a multiple of 4",
        ),
        ({"image": IMAGE | {"positions": "sincos"}, "width": 18}, r"model\.width=18: expected a multiple of 4"),
        ({"max_sequence_length": 16}, r"model\.max_sequence_length=16: expected at least the 17 tokens"),
        ({"image": IMAGE | {"patch_size": 3}}, r"model\.image\.patch_size=3: expected a divisor of model\.image\.size"),
        ({"image": IMAGE | {"pooling": "max"}}, r"model\.image\.pooling='max': expected one of"),
        ({"image": IMAGE | {"positions": "none"}}, r"model\.image\.positions='none': expected one of"),
        ({"image": IMAGE | {"num_classes": 0}}, r"model\.image\.num_classes=0: expected a positive number"),
    ],
)
def test_a_config_that_is_no_model_of_images_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(tiny(**fields), rngs=nnx.Rngs(0))


def test_other_arrays_than_images_are_refused():
    model = nnx.eval_shape(lambda: VisionTransformer(tiny(**CASES["deit"]), rngs=nnx.Rngs(0)))
    for wrong in (images()[:, :6], images().astype(jnp.int32), images()[0]):
        with pytest.raises(ValueError, match=r"images: got shape .*, expected floats \[B, 8, 8, 3\]"):
            model(wrong)


def test_moda_attention_without_a_mask_is_dense_attention():
    layer = MoDAAttention(
        16, 4, 2, 4, causal=False, bias=True, qk_norm=False, rope_theta=None, implementation="xla", rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
    stream = DepthStream.empty(2, 5, 2, 2, 4, jnp.float32)
    _, stream = layer(x, stream)
    y, after = layer(x, stream)
    assert after.length == 2
    q, k, v = layer.project(x, jnp.zeros((2, 5), jnp.int32))
    visible = jnp.ones((2, 5, 5), bool)
    entry = [stream.key[:, :, 0]], [stream.value[:, :, 0]]
    expected = layer.output(plain_vit.attention(q, k, v, *entry, visible))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"decode: the layer was built with causal=False"):
        layer.decode(x, stream, None)
