"""The typed config: what it accepts, and that every mistake is a ValueError that names the field."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from moda_jax.config import Config, DataConfig, TrainConfig, TransformerConfig


def test_survives_json():
    config = Config(model=TransformerConfig(dtype="bfloat16", num_layers=3), train=TrainConfig(num_steps=2500))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_sections_and_keys_take_their_defaults():
    assert Config.from_dict({"model": {"num_layers": 3}}) == Config(model=TransformerConfig(num_layers=3))


def test_slots_follow_from_layers_and_variant():
    config = TransformerConfig(num_layers=36, depth="moda", depth_ffn_kv=True)
    assert (config.depth_entries_per_layer, config.depth_slots) == (2, 70)
    assert dataclasses.replace(config, depth_ffn_kv=False).depth_slots == 35
    assert dataclasses.replace(config, depth="none").depth_slots == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"])
def test_dtype_objects_become_names(dtype):
    assert TransformerConfig(dtype=dtype).dtype == "bfloat16"


def test_an_int_serves_for_a_float():
    assert type(TransformerConfig(rope_theta=10000).rope_theta) is float


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, r"model.num_heads=6: expected a multiple of model.num_kv_heads=4"),
        ({"head_dim": 63}, r"model.head_dim=63: expected an even number"),
        (
            {"qk_norm": False, "qk_norm_per_head": True},
            r"model.qk_norm_per_head=True: expected False with model.qk_norm=False",
        ),
        ({"width": 0}, r"model.width=0: expected a positive number"),
        ({"num_layers": 2.0}, r"model.num_layers=2.0: expected a value of type int"),
        ({"num_layers": True}, r"model.num_layers=True: expected a value of type int"),
        (
            {"depth": "dense"},
            r"model.depth='dense': expected one of \('none', 'moda', .*\), or \"package.module:Class\"",
        ),
        ({"remat": True}, r"model.remat=True: expected a value of type str"),
        ({"dtype": "int8"}, r"model.dtype='int8': expected one of"),
        ({"dtype": jnp.int8}, r"model.dtype='int8': expected one of"),
        ({"dtype": 7}, r"model.dtype=7: expected a value of type str or None"),
        ({"rope_theta": float("nan")}, r"model.rope_theta=nan"),
        ({"attention_implementation": "flash"}, r"model.attention_implementation='flash': expected one of"),
    ],
)
def test_model_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "modle: unknown config section; known: model, data"),
        ({"model": {"layers": 3}}, "model.layers: unknown config key; known in model: vocab_size"),
        ({"train": {"batch_size": 8, "accumulation_steps": 3}}, "train.accumulation_steps=3: expected a divisor of"),
        ({"data": {"sequence_length": 8192}}, "data.sequence_length=8192: expected at most model.max_sequence_length"),
        ({"train": {"num_steps": 10}}, "optimizer.warmup_steps=2000: expected at most train.num_steps=10"),
        ({"optimizer": {"beta2": 1.0}}, r"optimizer.beta2=1.0: expected a number in \[0, 1\)"),
        ({"optimizer": {"name": "sgd"}}, r"optimizer.name='sgd': expected one of \('adamw', 'muon'\)"),
        ({"optimizer": {"muon": {"momentum": 1.0}}}, r"optimizer.muon.momentum=1.0: expected a number in \[0, 1\)"),
        ({"optimizer": {"muon": {"learning_rate": 0.0}}}, "optimizer.muon.learning_rate=0.0: expected a pos"),
        ({"optimizer": {"muon": {"weight_decay": -0.1}}}, "optimizer.muon.weight_decay=-0.1: expected zero or a pos"),
        ({"optimizer": {"muon": {"update_rms": 0}}}, "optimizer.muon.update_rms=0.0: expected a positive number"),
        ({"optimizer": {"muon": {"newton_schulz_steps": 0}}}, "optimizer.muon.newton_schulz_steps=0: expected a pos"),
        ({"optimizer": {"muon": {"beta": 0.9}}}, "optimizer.muon.beta: unknown config key; known in optimizer.muon: l"),
        ({"optimizer": {"schedule": "step"}}, r"optimizer.schedule='step': expected one of \('cosine', "),
        ({"optimizer": {"decay_shape": "exp"}}, r"optimizer.decay_shape='exp': expected one of \('linear', 'cosine', "),
        ({"optimizer": {"decay_fraction": 0.0}}, r"optimizer.decay_fraction=0.0: expected a share in \(0, 1\]"),
        (
            {"optimizer": {"schedule": "wsd", "decay_fraction": 0.9}},
            "optimizer.decay_fraction=0.9: expected a share of train.num_steps=10000 that is no more than the 8000 "
            "steps after optimizer.warmup_steps=2000",
        ),
        ({"data": {"validation_fraction": 0.0}}, "data.validation_fraction=0.0"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp=0: expected a positive number, or -1 for the rest"),
        ({"mesh": {"fsdp": -1}}, "mesh.data and mesh.fsdp=-1: expected -1 for one axis at most"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last=0: expected a positive number"),
        ({"train": {"trackers": "mlflow"}}, r"train.trackers='mlflow': expected some of \('tensorboard', 'wandb'\)"),
        ({"train": {"trackers": "wandb,wandb"}}, "train.trackers='wandb,wandb': expected .* each once"),
        ({"train": {"trackers": ""}}, "train.trackers='': expected some of"),
        ({"train": {"trackers": "none,wandb"}}, "train.trackers='none,wandb': expected some of"),
        ({"train": {"sample_prompt": "a\udcff"}}, r"train.sample_prompt='a\\udcff': expected UTF-8; character 1 is"),
        ({"data": {"end_of_text": "\udcff"}}, r"data.end_of_text='\\udcff': expected UTF-8"),
        ({"eval": {"num_batches": -1}}, "eval.num_batches=-1"),
    ],
)
def test_run_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(values)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().source = "elsewhere"
