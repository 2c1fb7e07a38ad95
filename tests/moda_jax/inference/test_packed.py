"""Decoding with packed layers against the walk through the model."""

import contextlib
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
from pallas_kernels import dispatch, matvec, token_attention

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
KERNEL_VARIANTS = {
    "moda": {}, "pre-norm": {"norm": "pre"}, "none": {"depth": "none"}, "own KV": {"depth_ffn_kv": False},
    "one layer": {"num_layers": 1}, "groups": {"num_heads": 8, "head_dim": 64},
}  # fmt: skip
ON_GPU = jax.default_backend() == "gpu"
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


@contextlib.contextmanager
def kernels_chosen():
    """A step takes the kernels, as on Hopper; interpreted elsewhere. Yields a list of what was
    traced."""
    traced, step = [], packed._kernel_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
        for cached in (matvec._best, token_attention.best, decode.step):
            (cached.cache_clear if hasattr(cached, "cache_clear") else cached.clear_cache)()
        patch.setattr(packed, "_kernel_step", lambda *arguments: traced.append("step") or step(*arguments))
        yield traced
    for cached in (matvec._best, token_attention.best, decode.step):
        (cached.cache_clear if hasattr(cached, "cache_clear") else cached.clear_cache)()


def check_kernels(steps, rows=1, **fields):
    """Logits of a bfloat16 model are as close to float32's with the kernels as without. Several rows ask for them."""
    fields = (
        dict(
            num_layers=2,
            width=256,
            num_kv_heads=4,
            head_dim=64,
            ffn_width=64,
            initializer_range=0.05,
            attention_implementation="xla",
        )
        | fields
    )
    _, model, params, _ = build(**fields)
    exact = decoded(model, params, steps, rows)
    _, model, _, packed_params = build(**fields, dtype="bfloat16")
    plain = decoded(model, packed_params, steps, rows, implementation="xla")
    if rows == 1:
        with kernels_chosen() as traced:
            came = decoded(model, packed_params, steps)
        assert traced
    else:
        came = decoded(model, packed_params, steps, rows, fused=True)

    def error(found):
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert 1e-4 < error(plain) < 0.1
    assert error(came) < 1.5 * error(plain), (error(came), error(plain))
    assert not np.array_equal(came, plain)  # it was computed in another way


def decoded(model, params, steps, rows=1, **options):
    """Logits [steps, rows * V] of given tokens behind a prompt."""
    found, cache = decode.prefill(model, params, PROMPTS[:rows], np.zeros(rows, int), capacity=128, padded=False)
    seen = []
    for token in range(steps):
        found, cache = decode.step(model, params, cache, jnp.full(rows, token, jnp.int32), **options)
        seen.append(found.reshape(-1))
    return np.asarray(jnp.stack(seen))


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
@pytest.mark.parametrize("variant", ["moda", "pre-norm", "none"])
def test_a_step_by_the_kernels_interpreted(variant, capsys):
    check_kernels(2, **KERNEL_VARIANTS[variant])
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_a_step_by_the_kernels_on_the_chip(variant):
    check_kernels(40, **KERNEL_VARIANTS[variant])


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
@pytest.mark.parametrize("variant", ["moda", "pre-norm", "none"])
def test_a_fused_step_of_two_rows_interpreted(variant, capsys):
    check_kernels(2, 2, **KERNEL_VARIANTS[variant])
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_a_fused_step_of_two_rows_on_the_chip(variant):
    check_kernels(40, 2, **KERNEL_VARIANTS[variant])


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"qk_norm_per_head": True}, {}, "qk_norm_per_head=True"), ({"rope_theta": None}, {}, "rope_theta=None"),
        ({"depth_attn_kv": True}, {}, "attention entry"), ({}, {"start": jnp.array([0, 4])}, "different places"),
        ({}, {"implementation": "xla"}, "implementation='xla'"), ({}, {"x": jnp.float32}, "dtype=float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_fused_step_is_refused_by_name(fields, options, message):
    config = dataclasses.replace(BASE, **fields)
    cached = ((jnp.zeros((2, 2, 128, 8)),),) * 2
    arguments = {"x": jnp.bfloat16, "start": None, "implementation": None} | options
    arguments["x"] = jnp.zeros((2, 32), arguments["x"])
    with pytest.raises(NotImplementedError, match=message):
        packed.packed_step((), config, cached=cached, length=jnp.int32(9), fused=True, **arguments)


def test_a_fused_step_asks_for_packed_layers():
    with pytest.raises(ValueError, match="fused=True: expected packed layers"):
        decode._step(None, {"layers": ()}, None, jnp.zeros(2, jnp.int32), None, True)


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
