"""OLMo-core checkpoints: logits of an independent implementation, and every refusal by name.

The stored vectors come from tests/data/make_olmo_core_vectors.py. torch is not needed: what is read of its files is a
mapping of names to tensors.
"""

import json
import pathlib
import shutil
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.olmo_core import config_values, logits, write_checkpoint

from moda_jax.interop import load_model, load_olmo_core

STORED = pathlib.Path(__file__).parents[2] / "data" / "olmo_core_tiny"
NAMES = ("moda", "post_norm_moda_head_norm")


@pytest.fixture
def folder(tmp_path):
    """A copy of a stored checkpoint that a test may damage."""
    return pathlib.Path(shutil.copytree(STORED / "moda", tmp_path / "checkpoint"))


def change(folder, place, value):
    """Sets a field of config.json; None takes it out."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    *sections, field = place.split(".")
    section = values["model"]
    for part in sections:
        section = section[part]
    if value is None:
        del section[field]
    else:
        section[field] = value
    path.write_text(json.dumps(values))


def assert_logits(model, tokens, expected):
    got = np.asarray(model(jnp.asarray(tokens)))
    assert np.abs(expected).max() > 2  # far from the bound
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_of_moda_models_are_the_stored_ones(name):
    config, model = load_olmo_core(STORED / name, dtype="float32")
    expected = np.load(STORED / name / "expected.npz")
    assert_logits(model, expected["tokens"], expected["logits"])
    assert (config.depth, config.moda.key, config.moda.ffn_kv, config.rope_theta) == ("moda", "writer_norm", True, 1e4)
    assert (config.norm, config.qk_norm_per_head) == (("pre", False), ("post_sum", True))[NAMES.index(name)]
    assert (config.qk_norm, config.num_heads, config.head_dim, config.max_sequence_length) == (
        config.qk_norm_per_head, 2, 14, 64,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_logits_are_those_of_the_independent_model(name):
    values = json.loads((STORED / name / "config.json").read_text())
    expected = np.load(STORED / name / "expected.npz")
    found = logits(values, load_file(STORED / name / "model.safetensors"), expected["tokens"][1])
    np.testing.assert_allclose(found, expected["logits"][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"block": "default", "layers": 2},
        pytest.param({"block": "post_norm", "layers": 2, "qk_norm": "head"}, marks=pytest.mark.slow),
        pytest.param({"block": "reordered_norm", "layers": 2, "qk_norm": "all"}, marks=pytest.mark.slow),
        pytest.param({"block": "moda", "qk_norm": "all", "kv_heads": 1}, marks=pytest.mark.slow),
        pytest.param({"block": "moda", "qk_norm": "head"}, marks=pytest.mark.slow),
        pytest.param({"block": "post_norm_moda", "layers": 2}, marks=pytest.mark.slow),
        *(
            pytest.param({"block": "moda", "width": 2 * dim, "head_dim": dim, "layers": 2}, marks=pytest.mark.slow)
            for dim in (56, 58, 60, 62)
        ),
    ],
    ids=str,
)
def test_the_logits_of_every_block(fields, tmp_path):
    values = config_values(**fields)
    tensors = write_checkpoint(tmp_path, values)
    tokens = np.random.default_rng(3).integers(0, 40, 9)
    _, model = load_model(tmp_path, dtype="float32")
    assert_logits(model, tokens[None], logits(values, tensors, tokens)[None])


def test_a_state_dict_with_an_optimizers_beside_it_and_a_projection_that_nobody_reads(folder):
    path = folder / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    last = tensors["model.blocks.1.feed_forward.kv_proj.weight"]
    save_file(tensors | {"optim.step": np.ones(1), "model.blocks.2.feed_forward.kv_proj.weight": last}, path)
    change(folder, "block_overrides", None)
    mixer = json.loads((folder / "config.json").read_text())["model"]["block"]["sequence_mixer"]
    change(folder, "block.attention", mixer)  # the older name
    change(folder, "block.sequence_mixer", None)
    _, model = load_olmo_core(folder, dtype="float32")
    expected = np.load(STORED / "moda" / "expected.npz")
    assert_logits(model, expected["tokens"], expected["logits"])


class Tensor:
    """Of torch's tensors, what is read of them."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, f"torch.{array.dtype}"

    def detach(self):
        return self

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


def test_a_file_of_torchs(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    with pytest.raises(ValueError, match=r"model\.pt: torch reads this file and is not installed; .*model\.safetens"):
        load_olmo_core(folder)

    content = {"model": {name: Tensor(array) for name, array in tensors.items()}, "optim": {"step": 3}}

    def load(path, *, map_location, weights_only, mmap):
        assert (path, map_location, weights_only, mmap) == (folder / "model.pt", "cpu", True, True)
        if isinstance(content, Exception):
            raise content
        return content

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, Tensor=Tensor))
    _, model = load_olmo_core(folder, dtype="float32")
    expected = np.load(STORED / "moda" / "expected.npz")
    assert_logits(model, expected["tokens"], expected["logits"])
    content["model"]["lm_head.norm.weight"] = Tensor(np.ones(28, np.int64))
    with pytest.raises(ValueError, match=r"model\.pt: tensor lm_head\.norm\.weight has dtype int64, expected one of"):
        load_olmo_core(folder)
    content = [1]
    with pytest.raises(ValueError, match=r"model\.pt: got a list, expected a state dict"):
        load_olmo_core(folder)
    content = RuntimeError("PytorchStreamReader failed")
    with pytest.raises(ValueError, match=r"model\.pt: not a readable state dict: Pytorch"):
        load_olmo_core(folder)


def test_weights_that_are_not_there(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"found neither model\.safetensors nor .*index\.json, nor model\.pt"):
        load_olmo_core(folder)
    (folder / "model_and_optim").mkdir()
    with pytest.raises(ValueError, match=r"distributed format; .*dcp_to_torch \S+model_and_optim \S+model\.pt"):
        load_olmo_core(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    other = dict(tensors)
    other["blocks.0.feed_forward.extra.weight"] = other.pop("blocks.1.attention.attention.w_k.weight")
    save_file(other, path)
    with pytest.raises(
        ValueError,
        match=r"1 missing: blocks\.1\.attention\.attention\.w_k\.weight; 1 that .*: blocks\.0\.feed_forward\.extra\.w",
    ):
        load_olmo_core(folder)
    save_file(tensors | {"blocks.0.feed_forward.kv_proj.weight": np.ones((28, 28), np.float32)}, path)
    with pytest.raises(
        ValueError, match=r"tensor blocks\.0\.feed_forward\.kv_proj\.weight has shape \(28, 28\), expected \(56, 28\)"
    ):
        load_olmo_core(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("name", "normalized", r"model\.name='normalized': expected 'default'"),
        ("embed_scale", 2.0, r"model\.embed_scale=2\.0: expected null"),
        ("d_model", "28", r"model\.d_model='28': expected a positive integer"),
        ("block.name", "hc", r"model\.block\.name='hc': expected one of \('default', "),
        ("block", [], r"model\.block=\[\]: expected an object"),
        ("block.hyper_connections", {}, r"block\.hyper_connections=\{\}: expected null"),
        ("block.attnres_block_size", 4, r"block\.attnres_block_size=4: expected null"),
        ("block.attention_residual_alpha", 0.5, r"block\.attention_residual_alpha=0\.5: expected 1"),
        ("block.layer_norm.name", "default", r"block\.layer_norm\.name='default': expected 'rms'"),
        ("block.layer_norm.eps", 1e-5, r"lm_head\.layer_norm\.eps=1e-06: expected 1e-05, that of all norms"),
        ("block.sequence_mixer.bias", None, r"block\.sequence_mixer\.bias=True: expected false"),  # OLMo-core's default
        ("block.sequence_mixer.gate", {}, r"block\.sequence_mixer\.gate=\{\}: expected null"),
        ("block.sequence_mixer.rope.name", "complex", r"rope\.name='complex': expected 'default'"),
        ("block.sequence_mixer.rope.scaling", {}, r"rope\.scaling=\{\}: expected null"),
        ("block.sequence_mixer.n_kv_heads", 3, r"model\.num_heads=2: expected a multiple of model\.num_kv_heads=3"),
        ("block.feed_forward.activation", "gelu_tanh", r"feed_forward\.activation='gelu_tanh': expected 'silu'"),
        ("block.moda.extra_ffn_kv_proj", False, r"moda\.extra_ffn_kv_proj=False: expected true"),
        ("block.moda.attention_scale", 1.0, r"moda\.attention_scale=1\.0: expected null"),
        ("block.moda_skip_ffn_kv", True, r"block\.moda_skip_ffn_kv=True: expected false"),
        ("block_overrides.2.dropout", 0.1, r"block_overrides\.2: expected the block of all layers"),
        ("lm_head.layer_norm", None, r"lm_head\.layer_norm=None: expected an object, the norm"),
        ("lm_head.bias", True, r"lm_head\.bias=True: expected false"),
    ],
)
def test_other_functions_are_refused_by_field(folder, place, value, message):
    change(folder, place, value)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load_olmo_core(folder)


def test_raw_keys_beside_a_qk_norm_are_refused(tmp_path):
    values = config_values("moda", qk_norm="head")
    values["model"]["block"]["moda"]["cache_post_norm_k"] = False
    write_checkpoint(tmp_path, values)
    with pytest.raises(ValueError, match=r"moda\.cache_post_norm_k=False: expected true"):
        load_olmo_core(tmp_path)
