"""DeiT checkpoints in timm's layout: the model that they hold, and what is refused."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import plain_deit

from moda_jax.interop import load_deit
from moda_jax.model.accounting import image_param_count

TENSORS = plain_deit.make_tensors()
IMAGES = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype(np.float32)


def write(directory, tensors, name="model.safetensors"):
    save_file(tensors, directory / name)
    return directory / name


@pytest.mark.parametrize("options", [{}, {"depth": 1, "channels": 1, "patch": 3}])
def test_logits_are_those_of_an_independent_model(tmp_path, options):
    tensors = plain_deit.make_tensors(**options)
    images = IMAGES[..., : options.get("channels", 3)]
    write(tmp_path, tensors)
    config, model = load_deit(tmp_path, num_heads=3, dtype="float32")
    assert image_param_count(config) == sum(tensor.size for tensor in tensors.values())
    with jax.default_matmul_precision("highest"):
        got = np.asarray(jax.jit(lambda images: model(images))(images))
    expected = plain_deit.logits(tensors, images, 3)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_the_config_is_read_from_the_shapes(tmp_path):
    tensors = plain_deit.make_tensors(width=128, depth=2, ffn=40, classes=7)
    config, _ = load_deit(write(tmp_path, tensors, "deit.safetensors"))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (2, 2, 64, 2)
    assert (config.ffn_width, config.image.num_classes, config.image.size, config.image.patch_size) == (40, 7, 6, 2)
    assert config.depth == "none" and not config.causal


def without(name):
    return {key: tensor for key, tensor in TENSORS.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (TENSORS | {"dist_token": np.zeros((1, 1, 12), np.float32)}, r"holds dist_token, so it is a distilled DeiT"),
        (without("blocks.1.mlp.fc2.bias"), r"holds no tensor blocks\.1\.mlp\.fc2\.bias"),
        (without("pos_embed"), r"holds no tensor pos_embed; expected a vision transformer in timm's layout"),
        (TENSORS | {"norm.weight": np.zeros(11, np.float32)}, r"norm\.weight has shape \(11,\), expected \(12,\)"),
        (TENSORS | {"extra": np.zeros(1, np.float32)}, r"1 tensors that this model does not have: extra"),
        (TENSORS | {"pos_embed": np.zeros((1, 9, 12), np.float32)}, r"pos_embed has 9 tokens, expected a class token"),
        (TENSORS | {"cls_token": np.zeros((1, 1, 12), np.int32)}, r"tensor cls_token has dtype int32, expected floats"),
    ],
)
def test_another_model_is_refused(tmp_path, tensors, message):
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        load_deit(tmp_path, num_heads=3)


def test_files_that_cannot_be_read_and_heads_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path, TENSORS)
    with pytest.raises(ValueError, match=r"has width 12, no multiple of 64, .*; name num_heads"):
        load_deit(path)
    with pytest.raises(ValueError, match=r"num_heads=5: expected a divisor of the width 12"):
        load_deit(path, num_heads=5)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_deit(path, num_heads=3)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="a Git LFS pointer, not the file itself"):
        load_deit(path, num_heads=3)
    with pytest.raises(FileNotFoundError):
        load_deit(tmp_path / "nothing.safetensors", num_heads=3)
