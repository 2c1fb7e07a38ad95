"""Decoding with packed layers against the walk through the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.saved_run import random_model
from support.selection import quick_of

from moda_jax.config import TransformerConfig
from moda_jax.depth_config import MoDASection
from moda_jax.inference import decode, packed

BASE = TransformerConfig(
    vocab_size=61, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=48,
    max_sequence_length=64, dtype="float32", initializer_range=0.15,
)  # fmt: skip
VARIANTS = {
    "moda": {},
    "none": {"depth": "none"},
    "own KV, untied": {"depth_ffn_kv": False, "tie_embeddings": False},
    "attention KV": {"depth_attn_kv": True},
    "attention KV alone": {"depth_attn_kv": True, "depth_ffn_kv": False},
    "pre-norm": {"norm": "pre", "depth_attn_kv": True},
    "a norm for each head": {"qk_norm_per_head": True},
    "no norm, no rotation": {"qk_norm": False, "rope_theta": None},
    "one layer": {"num_layers": 1},
}
PROMPTS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)


def build(**fields):
    config = dataclasses.replace(BASE, **fields)
    model, params = random_model(config)
    params = decode.inference_params(params, config)
    return config, model, params, decode.decode_params(params, config, unroll=True, packed=True)


def logits(model, params, rows, start, **options):
    """[steps, B, V] of given tokens behind a prompt."""
    found, cache = decode.prefill(model, params, PROMPTS[:rows], start, capacity=16, padded=bool(start.any()))
    seen = [found]
    for token in (3, 14, 15):
        found, cache = decode.step(model, params, cache, jnp.full(rows, token, jnp.int32), **options)
        seen.append(found)
    return np.asarray(jnp.stack(seen))


@pytest.mark.parametrize("variant", quick_of(VARIANTS, ("moda",)))
def test_a_packed_step_is_the_walk(variant):
    _, model, params, packed_params = build(**VARIANTS[variant])
    for rows, start in ((1, np.zeros(1, int)), (2, np.array([0, 4]))):
        expected = logits(model, params, rows, start)
        np.testing.assert_allclose(logits(model, packed_params, rows, start), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_parts_of_the_cache_come_to_the_same(monkeypatch):
    _, model, params, packed_params = build()
    expected = logits(model, params, 2, np.array([0, 4]))
    monkeypatch.setattr(packed.token_attention, "cache_parts", lambda *arguments: 4)
    decode.step.clear_cache()
    came = logits(model, packed_params, 2, np.array([0, 4]))
    decode.step.clear_cache()
    np.testing.assert_allclose(came, expected, rtol=0, atol=1e-5)


def test_unpacking_is_exact_and_nothing_is_larger():
    config, _, params, packed_params = build(depth_attn_kv=True)
    own = packed.unpacked(packed_params["packed"], config)
    jax.tree.map(np.testing.assert_array_equal, own["last_layer"], params["last_layer"])
    for i, layer in enumerate(own["layers"]):
        expected = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        jax.tree.map(np.testing.assert_array_equal, layer, expected)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, packed_params)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_kind": "layer"}, {"ffn": "gelu"}, {"biases": True}, {"norm": "post_sum"}, {"depth": "hc"},
        {"moda": MoDASection(chunk=2)}, {"moda": MoDASection(read="window")}, {"moda": MoDASection(softmax="separate")},
    ],
    ids=str,
)  # fmt: skip
def test_other_models_are_refused_by_name_and_left_to_the_walk(fields, monkeypatch):
    config = dataclasses.replace(BASE, **fields)
    with pytest.raises(NotImplementedError, match=f"model.{next(iter(fields))}"):
        packed.check_packed(config)
    monkeypatch.setattr(decode, "DEFAULT_PACKED", {"cpu": True, "gpu": True})
    params = {"layers": {"w": jnp.zeros((2, 3))}, "last_layer": {"w": jnp.zeros(3)}}
    assert "packed" not in decode.decode_params(params, config, unroll=True)


def test_packing_asks_for_a_config_and_unrolled_layers():
    with pytest.raises(ValueError, match="expected a config and unroll=True"):
        decode.decode_params({}, packed=True, unroll=True)
    with pytest.raises(ValueError, match="expected a config and unroll=True"):
        decode.decode_params({}, BASE, packed=True, unroll=False)
