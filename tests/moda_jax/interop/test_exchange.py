"""Export and import. That transformers reads an export is checked by tests/data/verify_export.py, by hand."""

import dataclasses
import json
import os
import pathlib
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from support.saved_run import random_model

from moda_jax.config import TransformerConfig
from moda_jax.interop import export_model, load_model, load_olmo2
from moda_jax.model.function import model_function

STORED = pathlib.Path(__file__).parents[2] / "data" / "olmo2_tiny"
NAMES = ("untied_gqa_sharded", "tied_head_dim", "tied_bfloat16_one_layer")
MODA = TransformerConfig(
    vocab_size=61, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=24, depth_attn_kv=True,
    max_sequence_length=32,
)  # fmt: skip


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("name", NAMES)
def test_an_export_holds_what_transformers_itself_saved(name, tmp_path):
    config, model = load_olmo2(STORED / name)
    stored = json.loads((STORED / name / "config.json").read_text())
    export_model(config, parameters(model), tmp_path / "out", dtype=stored["dtype"])
    original, exported = {}, load_file(tmp_path / "out" / "model.safetensors")
    for file in (STORED / name).glob("*.safetensors"):
        original |= load_file(file)
    assert exported.keys() == original.keys()
    for tensor, value in original.items():
        assert exported[tensor].dtype == value.dtype
        np.testing.assert_array_equal(exported[tensor], value, err_msg=tensor)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in stored.keys() - {"transformers_version"}:
        assert written[key] == stored[key], key
    assert written["rope_theta"] == stored["rope_parameters"]["rope_theta"]  # where transformers 4 looks


def test_a_round_trip_gives_transformers_logits(tmp_path):
    config, model = load_olmo2(STORED / NAMES[0], dtype="float32")
    export_model(config, parameters(model), tmp_path / "out")
    again, model = load_model(tmp_path / "out", dtype="float32")
    expected = np.load(STORED / NAMES[0] / "expected.npz")
    assert again == config
    np.testing.assert_allclose(model(jnp.asarray(expected["tokens"])), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"depth_ffn_kv": False, "norm": "pre", "qk_norm": False}, marks=pytest.mark.slow),
        pytest.param({"num_layers": 1, "tie_embeddings": False}, marks=pytest.mark.slow),
    ],
)
def test_a_moda_model_comes_back_bit_for_bit(fields, tmp_path):
    config = dataclasses.replace(MODA, **fields)
    _, params = random_model(config)
    export_model(config, params, tmp_path / "out", end_of_text_id=5)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "moda_jax" and values["eos_token_id"] == 5
    again, model = load_model(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, parameters(model), params)


def test_a_narrow_export_rounds_once(tmp_path):
    _, params = random_model(MODA)
    export_model(MODA, params, tmp_path / "out", dtype="bfloat16")
    _, model = load_model(tmp_path / "out")
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, parameters(model), rounded)


def test_a_tokenizer_is_copied(tmp_path):
    (tmp_path / "some.json").write_text("{}")
    _, params = random_model(MODA)
    export_model(MODA, params, tmp_path / "out", tokenizer_file=tmp_path / "some.json")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_files_may_be_read_as_the_umask_says(tmp_path, umask, mode):
    _, params = random_model(MODA)
    (tmp_path / "some.json").write_text("{}")
    before = os.umask(umask)
    try:
        export_model(MODA, params, tmp_path / "out", tokenizer_file=tmp_path / "some.json")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "tokenizer.json"], mode)


def test_mistakes_are_named(tmp_path):
    _, params = random_model(MODA)
    with pytest.raises(ValueError, match=r"dtype='int8': expected one of"):
        export_model(MODA, params, tmp_path / "out", dtype="int8")
    export_model(MODA, params, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out: holds config\.json already; name another directory"):
        export_model(MODA, params, tmp_path / "out")
    with pytest.raises(ValueError, match=r"none: holds no config\.json; expected a directory of config\.json and safe"):
        load_model(tmp_path / "none")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"moda_jax": values["moda_jax"] | {"layers": 3}}))
    with pytest.raises(ValueError, match=r"config\.json: not a model of this version of moda_jax .*layers"):
        load_model(tmp_path / "out")
    path.write_text(json.dumps(values | {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model_type='llama': expected 'olmo2'"):
        load_model(tmp_path / "out")


def test_the_logits_of_an_exported_moda_model(tmp_path):
    _, params = random_model(MODA)
    export_model(MODA, params, tmp_path / "out")
    _, model = load_model(tmp_path / "out")
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(model(tokens), model_function(MODA)(params, tokens))
