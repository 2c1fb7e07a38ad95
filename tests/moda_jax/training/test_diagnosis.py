"""Tensors are spoiled one at a time; the first that is named must be the one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import Config, TrainConfig, TransformerConfig
from moda_jax.data.packing import Batch
from moda_jax.model.function import split_model
from moda_jax.tasks.language import LanguageModelling
from moda_jax.training.diagnosis import non_finite_tensors

CONFIG = TransformerConfig(
    vocab_size=17, num_layers=3, width=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_width=8, dtype="float32",
    initializer_range=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_and_params():
    return split_model(CONFIG, jax.random.key(0))


def new_batch(rows=2, T=6):
    tokens, targets = np.random.default_rng(0).integers(0, 17, size=(2, rows, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    return Batch(tokens, targets, np.zeros_like(tokens), positions, np.ones((rows, T), np.float32))


def names(model, params, batch=None, **train):
    config = Config(model=CONFIG, train=TrainConfig(batch_size=2, **train))
    return [tensor.name for tensor in non_finite_tensors(LanguageModelling(config), params, batch or new_batch())]


def scaled(params, factor, *path, index=()):
    """The parameters with one of them (or one layer of it) times a factor."""

    def change(at, leaf):
        if tuple(key.key for key in at) != path:
            return leaf
        return leaf.at[index].multiply(factor)

    changed = jax.tree.map_with_path(change, params)
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, changed)))
    return changed


def test_a_sound_step_has_none(model_and_params):
    assert names(*model_and_params, accumulation_steps=2) == []


def test_a_mask_that_is_not_finite_comes_first(model_and_params):
    batch = new_batch()
    batch.target_mask[1, 2] = np.nan
    assert names(*model_and_params, batch=batch) == ["batch.target_mask", "loss", "z-loss"]


def test_a_parameter_that_is_not_finite_is_named(model_and_params):
    model, params = model_and_params
    spoiled = scaled(params, jnp.nan, "last_layer", "ffn", "down", "kernel", index=(0, 0))
    first, second, *_ = names(model, spoiled)
    assert first == "parameter last_layer.ffn.down.kernel"
    assert second == "output of layer 2"


def test_the_layer_that_overflows_is_named(model_and_params):
    model, params = model_and_params
    path = next(
        tuple(key.key for key in at)
        for at, leaf in jax.tree.leaves_with_path(params)
        if at[0].key == "layers" and at[-2].key == "ffn_norm"
    )
    spoiled = scaled(scaled(params, 3e38, *path, index=1), 1e3, "embedding", "table")
    spoiled = scaled(spoiled, 2.0, *path, index=1)  # 6e38 is infinite in float32: the parameter itself
    assert names(model, spoiled)[0] == f"parameter {'.'.join(path)}"
    finite = scaled(params, 1e38, *path, index=1)
    found = names(model, scaled(finite, 3.0, *path, index=1))
    assert found[0] == "output of layer 1", found


def test_gradients_are_named_when_the_forward_pass_is_sound(model_and_params, monkeypatch):
    import moda_jax.training.diagnosis as diagnosis

    model, params = model_and_params
    gradients = jax.tree.map(jnp.zeros_like, params)
    gradients = jax.tree.map_with_path(
        lambda at, leaf: leaf + jnp.inf if at[-2].key == "final_norm" else leaf, gradients
    )
    monkeypatch.setattr(diagnosis, "_gradient_function", lambda *_: lambda *_: gradients)
    assert names(model, params, accumulation_steps=2) == [
        "gradient of final_norm.scale in micro-batch 0", "gradient of final_norm.scale in micro-batch 1",
    ]  # fmt: skip
