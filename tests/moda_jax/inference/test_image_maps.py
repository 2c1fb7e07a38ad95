"""Attention maps over an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.inference.image_maps import draw_image_maps, image_maps, map_picture
from moda_jax.model.function import split_module
from moda_jax.model.vision_transformer import VisionTransformer
from moda_jax.vision_config import ImageModelSection


@pytest.fixture(scope="module", params=["class_token", "mean"])
def case(request):
    """A model with FFN and attention entries, its parameters, an image, and its maps."""
    config = TransformerConfig(
        num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=24, rope_theta=None, causal=False,
        norm="pre", dtype="float32", attention_implementation="xla", initializer_range=0.5,
        image=ImageModelSection(size=8, patch_size=2, channels=1, num_classes=3, pooling=request.param),
    )  # fmt: skip
    model, params = split_module(VisionTransformer(config, rngs=nnx.Rngs(0)))
    image = np.random.default_rng(0).normal(size=(8, 8, 1)).astype(np.float32)
    return config, model, params, image, image_maps(model, params, image)


def test_probabilities_sum_to_one_over_patches_class_token_and_depth(case):
    config, _, _, _, maps = case
    assert maps.patches.shape == (3, 4, 4, 4) and maps.depth.shape == (3, 4, 4)
    total = maps.patches.sum(axis=(2, 3)) + maps.class_token + maps.depth.sum(axis=-1)
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    assert (maps.class_token > 0).all() == (config.image.pooling == "class_token")
    filled = np.arange(4) < 2 * np.arange(3)[:, None]
    assert ((maps.depth > 0) == filled[:, None]).all()
    assert maps.depth_mass[0] == 0 and maps.depth_mass[1] > 0


def test_the_first_layers_map_is_its_softmax(case):
    config, model, params, image, maps = case
    module = model.module(params)
    x = module.tokens(jnp.asarray(image)[None])
    layer = nnx.merge(*_first_layer(module))
    query, key, _ = layer.attention.project(layer.attention_norm(x), module.positions(x))
    for head in range(4):
        logits = np.asarray(query[0, :, head], np.float64) @ np.asarray(key[0, :, head // 2], np.float64).T / 2
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        row = p[0] if config.image.pooling == "class_token" else p.mean(axis=0)
        np.testing.assert_allclose(maps.patches[0, head].reshape(-1), row[-16:], rtol=1e-4)


def _first_layer(module):
    graph, state = nnx.split(module.layers)
    return graph, jax.tree.map(lambda leaf: leaf[0], state)


def test_a_picture_has_the_patches_and_then_the_filled_slots(case, tmp_path):
    _, _, _, image, maps = case
    first, last = map_picture(maps, 0, 1), map_picture(maps, 2, 1)
    np.testing.assert_array_equal(first[:, :4], maps.patches[0, 1])
    assert np.isnan(first[:, 4:]).all()
    np.testing.assert_array_equal(last[:, -1], maps.depth[2, 1])  # four slots on four rows
    assert np.isnan(last[:, -2]).all()
    draw_image_maps(maps, np.uint8(128 + 40 * np.clip(image, -3, 3)), tmp_path / "maps.png", title="a test")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
