"""Hiding slots, against a model that is walked by hand with the op's own arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_compile import QUICK
from support.saved_run import random_model, tiny_run_config

from moda_jax.model.attention import default_positions
from moda_jax.model.depth_probe import SlotChoice, depth_mass, filled_slots, probed_hidden, slot_writers
from pallas_kernels import moda_attention

LAYERS, ROWS, TOKENS = 4, 2, 12


@pytest.fixture(scope="module")
def model():
    config = tiny_run_config(model={"num_layers": LAYERS}).model
    function, params = random_model(config)
    tokens = np.random.default_rng(0).integers(0, 257, (ROWS, TOKENS)).astype(np.int32)
    segment_ids = np.repeat([[0] * 7 + [1] * 5], ROWS, axis=0).astype(np.int32)

    def quick(of, *arguments):
        return jax.jit(of, compiler_options=QUICK)(params, *arguments)

    def probe(visible):
        return quick(
            lambda params, choice: probed_hidden(function.module(params), tokens, segment_ids, None, choice),
            SlotChoice.of(visible),
        )

    def plain():
        return quick(lambda params: function.hidden(params, tokens, segment_ids))

    def walked(visible):
        return quick(lambda params: by_hand(function.module(params), tokens, segment_ids, visible))

    return config, probe, plain, walked


def by_hand(module, tokens, segment_ids, visible):
    """Layer by layer, without a scan: the op gets the visible slots alone, as a stream that holds nothing else."""
    config = module.config
    x = module.embedding(tokens)
    positions = default_positions(x)
    keys, values, masses = [], [], []
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], module.layers) for i in range(LAYERS - 1)]
    for layer, block in enumerate([*layers, module.last_layer]):
        projected, _ = block.project({"x": x}, positions, None)
        query, key, value = (projected[name] for name in ("query", "key", "value"))
        seen = [slot for slot in range(len(keys)) if visible[layer, slot]]
        depth = [jnp.stack([stack[slot] for slot in seen], axis=2) if seen else None for stack in (keys, values)]
        attended, lse = moda_attention(
            query, key, value, *depth, segment_ids=segment_ids, implementation="reference", return_lse=True
        )
        grouped = query.reshape(ROWS, TOKENS, config.num_kv_heads, -1, config.head_dim)
        mass = jnp.zeros(config.depth_slots)
        for slot in seen:
            logits = jnp.einsum("btkgh,btkh->btkg", grouped, keys[slot]) * config.head_dim**-0.5
            mass = mass.at[slot].set(jnp.exp(logits.reshape(ROWS, TOKENS, -1) - lse).mean())
        masses.append(mass)
        finished, entries = block.finish(projected | {"x": x, "attended": attended}, positions, None)
        x = finished["output"]
        for entry in entries:
            keys.append(entry.values[0])
            values.append(entry.values[1])
    return module.final_norm(x), jnp.stack(masses)


def test_with_every_slot_it_is_the_model(model):
    config, probe, plain, _ = model
    hidden, mass = probe(filled_slots(config))
    np.testing.assert_allclose(hidden, plain(), rtol=2e-5, atol=2e-5)
    assert mass.shape == (LAYERS, config.depth_slots)
    np.testing.assert_array_equal(np.asarray(mass) > 0, filled_slots(config))
    assert float(depth_mass(mass)) == pytest.approx(np.asarray(mass)[1:].sum() / (LAYERS - 1), rel=1e-5)


def test_hidden_slots_take_no_part(model):
    config, probe, _, walked = model
    filled = filled_slots(config)
    visible = filled & (np.random.default_rng(1).random(filled.shape) < 0.6)
    visible[1] = False  # a layer that reads nothing
    assert 0 < visible[2].sum() < filled[2].sum() and 0 < visible[3].sum() < filled[3].sum()
    hidden, mass = probe(visible)
    expected, expected_mass = walked(visible)
    np.testing.assert_allclose(hidden, expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(mass, expected_mass, rtol=1e-3, atol=1e-6)


def test_who_wrote_a_slot():
    config = tiny_run_config(model={"num_layers": 3}).model
    writer, entry = slot_writers(config)
    assert writer.tolist() == [0, 0, 1, 1] and entry.tolist() == [0, 1, 0, 1]
    assert filled_slots(config).sum(axis=1).tolist() == [0, 2, 4]


def test_a_model_without_slots_is_refused():
    config = tiny_run_config(model={"depth": "none"}).model
    function, params = random_model(config)
    choice = SlotChoice(np.zeros((3, 0), np.int32), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"model.depth='none' with model.num_layers=3: there is no depth slot"):
        probed_hidden(function.module(params), np.zeros((1, 4), np.int32), None, None, choice)
