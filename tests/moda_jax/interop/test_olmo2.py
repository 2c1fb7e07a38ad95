"""OLMo 2 checkpoints: the logits that transformers gives (stored vectors), and every refusal by name."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moda_jax import Transformer, TransformerConfig
from moda_jax.interop import load_olmo2

STORED = pathlib.Path(__file__).parents[2] / "data" / "olmo2_tiny"
SHARDED, HEAD_DIM, BFLOAT16 = "untied_gqa_sharded", "tied_head_dim", "tied_bfloat16_one_layer"


@pytest.fixture
def folder(tmp_path):
    """A copy of a stored checkpoint that a test may damage: the one in a single file, of two layers."""
    return pathlib.Path(shutil.copytree(STORED / HEAD_DIM, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path):
    return pathlib.Path(shutil.copytree(STORED / SHARDED, tmp_path / "sharded"))


def change_config(folder, remove=(), **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in remove}))


def change_tensors(folder, change):
    """Rewrites model.safetensors after `change(tensors)` worked on the dict in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("name", [SHARDED, HEAD_DIM, BFLOAT16])
def test_logits_are_those_of_transformers(name):
    config, model = load_olmo2(STORED / name, dtype="float32")
    expected = np.load(STORED / name / "expected.npz")
    logits = model(jnp.asarray(expected["tokens"]))
    assert logits.shape == (*expected["tokens"].shape, config.vocab_size)
    assert np.abs(expected["logits"]).max() > 1  # far from the tolerance
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_config_fields_come_from_the_file():
    config, model = load_olmo2(STORED / SHARDED)
    assert config == model.config
    assert config == TransformerConfig(
        vocab_size=96, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=48, norm="post",
        depth="none", depth_ffn_kv=False, rope_theta=500000.0, norm_epsilon=1e-6, tie_embeddings=False, qk_norm=True,
        max_sequence_length=64,
    )  # fmt: skip
    config, _ = load_olmo2(STORED / HEAD_DIM, dtype="bfloat16", attention_implementation="reference")
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings) == (12, 3, True)  # 40 / 3 is no head_dim
    assert (config.norm_epsilon, config.rope_theta) == (0.01, 100.0)
    assert (config.dtype, config.attention_implementation) == ("bfloat16", "reference")


@pytest.mark.parametrize("field", ["rope_theta", "norm_epsilon"])
def test_the_stored_logits_depend_on_theta_and_epsilon(field):
    config, model = load_olmo2(STORED / HEAD_DIM, dtype="float32")
    other = Transformer(dataclasses.replace(config, **{field: 10 * getattr(config, field)}), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model, nnx.Param))
    expected = np.load(STORED / HEAD_DIM / "expected.npz")
    assert np.abs(np.asarray(other(jnp.asarray(expected["tokens"]))) - expected["logits"]).max() > 1e-2


def test_loaded_parameters_have_the_built_models_tree_and_float32():
    for name in (SHARDED, HEAD_DIM, BFLOAT16):
        config, model = load_olmo2(STORED / name)
        built = nnx.eval_shape(lambda config=config: Transformer(config, rngs=nnx.Rngs(0)))
        assert jax.tree.map(jnp.shape, parameters(model)) == jax.tree.map(jnp.shape, parameters(built))
        assert {leaf.dtype for leaf in jax.tree.leaves(parameters(model))} == {jnp.dtype("float32")}


def test_a_loaded_model_trains():
    _, model = load_olmo2(STORED / SHARDED, dtype="float32")
    tokens = jnp.asarray(np.load(STORED / SHARDED / "expected.npz")["tokens"])
    gradients = nnx.grad(lambda model: jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1)))(model)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_dtypes_load_into_float32(folder, dtype):
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    loaded = load_olmo2(folder)[1].embedding.table[...]
    np.testing.assert_array_equal(loaded, table.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("remove", "changes"),
    [
        (["rope_parameters"], {"rope_theta": 100.0, "rope_scaling": None, "torch_dtype": "float32"}),  # transformers 4
        ([], {"rope_theta": 100}),  # both places, one value
        ([], {"rope_parameters": {"rope_theta": 100.0}}),
        (["num_key_value_heads", "hidden_act", "attention_bias", "attention_dropout", "initializer_range"], {}),
        ([], {"num_key_value_heads": None}),
        ([], {"clip_qkv": None, "sliding_window": None, "layer_types": ["full_attention"] * 2, "logits_scaling": 1.0}),
        ([], {"sliding_window": 16, "use_sliding_window": False, "mlp_bias": False}),
        ([], {"sliding_window": 10**6}),
    ],
)
def test_config_files_that_say_the_same(folder, remove, changes):
    expected, _ = load_olmo2(STORED / HEAD_DIM)
    change_config(folder, remove, **changes)
    assert load_olmo2(folder)[0] == expected


def test_a_derived_head_dim_and_the_untied_default(sharded):
    change_config(sharded, ["tie_word_embeddings"], head_dim=None)
    assert load_olmo2(sharded)[0] == load_olmo2(STORED / SHARDED)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "olmo3"}, r"config\.json: model_type='olmo3': expected 'olmo2'"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu': expected 'silu'"),
        ({"attention_bias": True}, r"attention_bias=True: expected False"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1: expected 0"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}: expected none"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes': expected True or False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling\.rope_type='yarn': expected 'default'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.rope_type='linear': expected 'default'"),
        ({"rope_scaling": "yarn"}, r"rope_scaling='yarn': expected an object"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0}}, r"rope_parameters\.rope_type='llama3'"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5: expected 1"),
        ({"rope_theta": 10.0}, r"rope_theta=10\.0, rope_parameters\.rope_theta=100\.0: expected one value"),
        ({"rope_theta": -1}, r"rope_theta=-1: expected a positive number"),
        ({"rope_parameters": None}, r"rope_theta: absent, expected it there or in rope_parameters"),
        ({"rms_norm_eps": None}, r"rms_norm_eps=None: expected a positive number"),
        ({"hidden_size": "40"}, r"hidden_size='40': expected a positive integer"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: expected a positive integer"),
        ({"num_key_value_heads": 2}, r"config\.json: model\.num_heads=3: expected a multiple of model\.num_kv_heads=2"),
        ({"clip_qkv": 8.0}, r"config\.json: clip_qkv=8\.0: expected null"),
        ({"sliding_window": 16}, r"config\.json: sliding_window=16: expected null, every token sees all before it"),
        ({"sliding_window": 16, "use_sliding_window": True}, r"sliding_window=16: expected null"),
        ({"attention_chunk_size": 16}, r"attention_chunk_size=16: expected null"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types=.*: expected 'full_attention' for every",
        ),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0: expected null"),
        ({"residual_multiplier": 0.2}, r"residual_multiplier=0\.2: expected 1"),
        ({"mlp_bias": True}, r"mlp_bias=True: expected false"),
        ({"qk_norm": False}, r"qk_norm=False: expected true"),
        ({"num_experts": 8}, r"num_experts=8: expected null"),
        ({"head_dim": 13}, r"config\.json: model\.head_dim=13: expected an even number"),
    ],
)
def test_a_config_that_this_model_lacks_is_named(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_olmo2(folder)


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"])
def test_an_absent_field_is_named(folder, field):
    change_config(folder, [field])
    with pytest.raises(ValueError, match=rf"{field}=None: expected a positive integer"):
        load_olmo2(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"model_type": ', r"config\.json: not a JSON file"), ("[1]", r"got a JSON list, expected an")],
)
def test_a_broken_config_file(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_olmo2(folder)


def test_a_config_file_nested_too_deeply(folder):
    (folder / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        load_olmo2(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_called_one(folder, sharded, name):
    directory = sharded if "index" in name else folder
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{name}: a Git LFS pointer, not the file itself; .* `git lfs pull`"):
        load_olmo2(directory)


def test_every_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"1 missing: {name}$"):
            load_olmo2(folder)


def test_every_mis_shaped_tensor_is_named_with_both_shapes(folder):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        wrong = np.zeros((tensor.shape[0] + 1, *tensor.shape[1:]), np.float32)
        save_file(tensors | {name: wrong}, folder / "model.safetensors")
        came, expected = (str(shape).replace("(", r"\(").replace(")", r"\)") for shape in (wrong.shape, tensor.shape))
        with pytest.raises(ValueError, match=rf"tensor {name} has shape {came}, expected {expected}"):
            load_olmo2(folder)


def test_a_transposed_matrix_is_mis_shaped(folder):
    name = "model.layers.1.self_attn.o_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(36, 40\), expected \(40, 36\)"):
        load_olmo2(folder)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_an_extra_tensor_is_named(folder, name):
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros((3,), np.float32)}))
    with pytest.raises(ValueError, match=f"1 that this model does not have: {name}$"):
        load_olmo2(folder)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_tied_checkpoint_may_ship_its_head_again(folder, dtype):
    def add_head(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(dtype)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, add_head)
    config, model = load_olmo2(folder)
    assert config.tie_embeddings
    np.testing.assert_array_equal(model.embedding.table[...], table.astype(dtype).astype(np.float32))
    change_tensors(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 2), 7))
    with pytest.raises(ValueError, match=r"1 that this model does not have: lm_head\.weight$"):
        load_olmo2(folder)


def test_a_config_of_other_depth_or_tying_names_the_tensors(sharded):
    change_config(sharded, num_hidden_layers=2)
    with pytest.raises(
        ValueError, match=r"11 that this model does not have: model\.layers\.2\.mlp\.down_proj\.weight, "
    ):
        load_olmo2(sharded)
    change_config(sharded, num_hidden_layers=3, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"1 that this model does not have: lm_head\.weight$"):
        load_olmo2(sharded)


def test_an_integer_tensor_is_refused(folder):
    name = "model.norm.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ones((40,), np.int8)}))
    with pytest.raises(ValueError, match=rf"tensor {name} has dtype I8, expected one of"):
        load_olmo2(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json"):
        load_olmo2(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_olmo2(folder)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        load_olmo2(sharded)


def test_a_shard_without_a_tensor_of_the_index(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight$"):
        load_olmo2(sharded)


def test_a_tensor_in_two_shards(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"model.embed_tokens.weight": np.zeros((96, 32), np.float32)}, path)
    with pytest.raises(ValueError, match=r"tensor model\.embed_tokens\.weight: stands in both model-00001-of-00002"):
        load_olmo2(sharded)


def test_a_broken_index_or_file(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=r"index\.json: expected weight_map"):
        load_olmo2(sharded)
    (sharded / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_olmo2(sharded)
