"""Decoding with the cache against the model's own forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_compile import QUICK
from support.saved_run import random_model
from support.selection import quick_of

from moda_jax.config import TransformerConfig
from moda_jax.inference import decode
from moda_jax.inference.sampling import GREEDY, SamplingConfig, row_keys

BASE = TransformerConfig(
    vocab_size=97, num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=48,
    max_sequence_length=256, dtype="float32", initializer_range=0.15,
)  # fmt: skip
VARIANTS = {
    "moda": {},
    "none": {"depth": "none"},
    "own KV, untied": {"depth_ffn_kv": False, "tie_embeddings": False},
    "pre-norm, attention KV": {"norm": "pre", "depth_attn_kv": True},
    "one layer": {"num_layers": 1},
}
PROMPT = np.random.default_rng(0).integers(0, 97, 13)
SHORT = np.random.default_rng(1).integers(0, 97, 5)
NEW_TOKENS = 200


def build(seed=0, **fields):
    config = dataclasses.replace(BASE, **fields)
    return config, *random_model(config, seed)


def greedy(model, params, prompts, capacity, steps, **options):
    """The tokens that each row chose, and the logits [steps, B, V] that it chose them from."""
    T = max(map(len, prompts))
    start = np.array([T - len(prompt) for prompt in prompts])
    tokens = np.stack([np.pad(prompt, (T - len(prompt), 0)) for prompt in prompts]).astype(np.int32)
    logits, cache = decode.prefill(model, params, tokens, start, capacity=capacity, padded=bool(start.any()))
    chosen, seen = [], []
    for _ in range(steps):
        seen.append(logits)
        chosen.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = decode.step(model, params, cache, chosen[-1], **options)
    return np.asarray(jnp.stack(chosen, axis=1)), np.asarray(jnp.stack(seen))


def full(model, params, prompt, tokens):
    """Logits [len(tokens), V] of the forward pass over the whole text, at the places that chose `tokens`."""
    text = np.concatenate([prompt, tokens])[None].astype(np.int32)
    return np.asarray(jax.jit(model, compiler_options=QUICK)(params, text))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("variant", quick_of(VARIANTS, ("moda",)))
def test_greedy_decoding_is_the_forward_pass_token_by_token(variant):
    config, model, params = build(**VARIANTS[variant])
    cast = decode.inference_params(params, config)
    (tokens,), logits = greedy(model, cast, [PROMPT], len(PROMPT) + NEW_TOKENS, NEW_TOKENS)
    expected = full(model, params, PROMPT, tokens)
    assert 1 < np.abs(expected).max() < 10  # float32 has digits enough below the tolerance
    np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=-1))
    assert len(set(tokens.tolist())) > 2  # no fixed point


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_the_forward_pass_is():
    config, model, params = build()
    (tokens,), _ = greedy(model, params, [PROMPT], len(PROMPT) + 24, 24)
    exact = full(model, params, PROMPT, tokens)
    config, model, _ = build(dtype="bfloat16")
    cast = decode.inference_params(params, config)
    assert cast["layers"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16
    assert cast["layers"]["ffn_norm"]["scale"].dtype == jnp.float32
    logits, cache = decode.prefill(
        model, cast, PROMPT[None].astype(np.int32), np.zeros(1, int), capacity=40, padded=False
    )
    assert cache.key.dtype == jnp.bfloat16
    seen = []
    for token in tokens:
        seen.append(np.asarray(logits)[0])
        logits, cache = decode.step(model, cast, cache, jnp.array([token]))

    def error(came):
        return np.linalg.norm(came - exact) / np.linalg.norm(exact)

    dense = error(full(model, params, PROMPT, tokens))
    assert 1e-4 < dense < 0.1
    assert error(np.stack(seen)) < 2 * dense


def test_prompts_of_different_lengths_give_what_they_give_alone():
    config, model, params = build()
    params = decode.inference_params(params, config)
    together, logits = greedy(model, params, [SHORT, PROMPT, PROMPT[:1]], 40, 20)
    for row, prompt in enumerate((SHORT, PROMPT, PROMPT[:1])):
        (alone,), expected = greedy(model, params, [prompt], 40, 20)
        np.testing.assert_array_equal(together[row], alone)
        np.testing.assert_allclose(logits[:, row], expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("unroll", "implementation"),
    [
        (False, "reference"),
        pytest.param(True, "xla", marks=pytest.mark.slow),
        pytest.param(True, "reference", marks=pytest.mark.slow),
    ],
)
def test_the_forms_of_a_step_agree(unroll, implementation):
    config, model, params = build()
    params = decode.inference_params(params, config)
    expected, expected_logits = greedy(model, params, [SHORT, PROMPT], 24, 8)  # "scan", "xla"
    params = decode.decode_params(params, unroll=unroll)
    assert isinstance(params["layers"], tuple) == unroll
    tokens, logits = greedy(model, params, [SHORT, PROMPT], 24, 8, implementation=implementation)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_modas_cache_is_no_larger_than_plain_attentions():
    shapes = {}
    for name in ("moda", "none"):
        config, model, params = build(**VARIANTS[name])
        tokens, start = np.zeros((2, 8), np.int32), np.zeros(2, np.int32)
        logits, cache = decode.prefill(model, params, tokens, start, capacity=32, padded=False)
        entries = config.num_layers * 2 * config.num_kv_heads * config.head_dim
        assert cache.nbytes == 2 * 32 * entries * 4  # rows, places, float32
        keys = row_keys(jax.random.key(0), [PROMPT, SHORT])
        state = decode.start(logits, cache, keys, sampling=GREEDY, vocab_size=97)
        state, _ = decode.decode(model, params, state, num_steps=3, sampling=GREEDY, vocab_size=97)
        # Nothing but the cache lasts from step to step, the depth stream neither.
        shapes[name] = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state)
    assert shapes["moda"] == shapes["none"]


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_makes_no_copy_of_the_cache(unroll):
    config, model, params = build(num_layers=8)
    params = decode.decode_params(params, unroll=unroll)

    def make():
        cache = decode.KVCache.empty(config, 2, 4096, jnp.zeros(2, jnp.int32))
        if unroll:
            cache = dataclasses.replace(cache, key=tuple(cache.key), value=tuple(cache.value))
        return decode.DecodeState(
            cache, jnp.zeros(2, jnp.int32), row_keys(jax.random.key(0), [SHORT] * 2), jnp.int32(0)
        )

    state = jax.eval_shape(make)
    lowered = decode.decode.lower(model, params, state, num_steps=4, sampling=GREEDY, vocab_size=97)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= state.cache.nbytes  # donated, and written in place
    # Cut out of the stack: two layers' keys and values at most, whatever the number of layers. Unrolled: nothing.
    assert memory.temp_size_in_bytes < state.cache.nbytes * (0.05 if unroll else 2 / 8) + 2e6


@pytest.mark.slow
def test_a_rows_sample_does_not_depend_on_the_others():
    config, model, params = build()
    params = decode.inference_params(params, config)
    sampling = SamplingConfig(temperature=1.0, top_k=40, top_p=0.95)

    def sample(prompts, seed=0):
        T = max(map(len, prompts))
        start = np.array([T - len(prompt) for prompt in prompts])
        tokens = np.stack([np.pad(prompt, (T - len(prompt), 0)) for prompt in prompts]).astype(np.int32)
        logits, cache = decode.prefill(model, params, tokens, start, capacity=40, padded=bool(start.any()))
        keys = row_keys(jax.random.key(seed), prompts)
        state = decode.start(logits, cache, keys, sampling=sampling, vocab_size=97)
        first = decode.decode(model, params, state, num_steps=8, sampling=sampling, vocab_size=97)
        second = decode.decode(model, params, first[0], num_steps=8, sampling=sampling, vocab_size=97)
        return np.concatenate([first[1], second[1]], axis=1)

    batch = sample([SHORT, PROMPT, SHORT])
    np.testing.assert_array_equal(batch, sample([SHORT, PROMPT, SHORT]))
    np.testing.assert_array_equal(batch[:2][::-1], sample([PROMPT, SHORT]))
    assert not np.array_equal(batch[0], batch[2])
    assert not np.array_equal(batch[0], sample([SHORT], seed=1)[0])


def test_the_vocabulary_beyond_the_tokenizers_is_never_chosen():
    _, model, params = build()
    table = np.array(params["embedding"]["table"])
    table[50:] *= 50
    params = params | {"embedding": {"table": jnp.asarray(table)}}
    logits, cache = decode.prefill(
        model, params, PROMPT[None].astype(np.int32), np.zeros(1, int), capacity=24, padded=False
    )
    assert logits.argmax() >= 50
    state = decode.start(logits, cache, row_keys(jax.random.key(0), [PROMPT]), sampling=GREEDY, vocab_size=50)
    _, tokens = decode.decode(model, params, state, num_steps=8, sampling=GREEDY, vocab_size=50)
    assert tokens.max() < 50


def test_a_prompt_pass_in_groups_is_the_same(monkeypatch):
    _, model, params = build()
    tokens = np.random.default_rng(2).integers(0, 97, (4, 13)).astype(np.int32)
    start = np.array([0, 3, 1, 0])
    whole = decode.prefill(model, params, tokens, start, capacity=16, padded=True)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 30)
    assert decode._group_rows(4, 13) == 2 and decode._group_rows(4, 99) == 1
    decode.prefill.clear_cache()
    grouped = decode.prefill(model, params, tokens, start, capacity=16, padded=True)
    decode.prefill.clear_cache()
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(grouped), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
