import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import plain_model
from support.drawn import keep_figures, legend_texts
from support.saved_run import loaded_run, tiny_run_config

from moda_jax.inference import attention_maps as maps_lib

TOKENS = np.random.default_rng(0).integers(0, 256, 21).astype(np.int32)


def dense_maps(run, tokens, monkeypatch):
    """Probabilities [N, T, T + filled slots] per layer, from the independent model."""
    seen, original = [], plain_model.attention
    section = run.config.model.moda
    most = section.read_slots if section.read == "window" else None

    def attention(q, k, v, depth_keys, depth_values, visible):
        group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
        logits = plain_model.einsum("btnh,bunh->bntu", q, jnp.repeat(k, group, axis=2)) * scale
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
        first = 0 if most is None else max(len(depth_keys) - most, 0)
        for i, depth_key in enumerate(depth_keys):
            slot = jnp.sum(q * jnp.repeat(depth_key, group, axis=2), axis=-1) * scale  # [B, T, N]
            slot = slot if i >= first else jnp.full_like(slot, -jnp.inf)
            logits = jnp.concatenate([logits, jnp.moveaxis(slot, 2, 1)[..., None]], axis=-1)
        seen.append(np.asarray(jax.nn.softmax(logits, axis=-1))[0])
        return original(q, k, v, depth_keys[first:], depth_values[first:], visible)

    monkeypatch.setattr(plain_model, "attention", attention)
    plain_model.logits(run.params, run.config.model, jnp.asarray(tokens)[None])
    return seen


@pytest.mark.parametrize(
    ("model", "pixels"),
    [
        pytest.param({}, 64, id="whole", marks=pytest.mark.slow),
        pytest.param({}, 8, id="pooled"),
        pytest.param({"depth_ffn_kv": False, "norm": "pre"}, 8, id="own KV, pre-norm", marks=pytest.mark.slow),
        pytest.param({"depth": "none"}, 64, id="no depth", marks=pytest.mark.slow),
        pytest.param({"moda": {"read": "window", "read_slots": 3}}, 8, id="window", marks=pytest.mark.slow),
    ],
)
def test_maps_are_the_pooled_softmax(model, pixels, monkeypatch):
    run = loaded_run(tiny_run_config(model=model))
    monkeypatch.setattr(maps_lib, "PIXELS", pixels)
    monkeypatch.setattr(maps_lib, "BLOCK_QUERIES", 6)
    maps_lib._all_layers.clear_cache()
    maps = maps_lib.attention_maps(run.model, run.params, TOKENS)
    maps_lib._all_layers.clear_cache()
    T, pool = len(TOKENS), -(-len(TOKENS) // pixels)
    R = -(-T // pool)
    assert maps.sequence.shape[2:] == (R, R) and maps.tokens == T
    for layer, dense in enumerate(dense_maps(run, TOKENS, monkeypatch)):
        filled = dense.shape[-1] - T
        assert filled == layer * maps.entries_per_layer
        for row in range(R):
            queries = slice(row * pool, min(T, (row + 1) * pool))
            for column in range(R):
                keys = slice(column * pool, min(T, (column + 1) * pool))
                expected = dense[:, queries, keys].sum(axis=2).mean(axis=1)
                np.testing.assert_allclose(maps.sequence[layer, :, row, column], expected, rtol=0, atol=1e-6)
            expected = dense[:, queries, T:].mean(axis=1)
            np.testing.assert_allclose(maps.depth[layer, :, row, :filled], expected, rtol=0, atol=1e-6)
        assert np.all(maps.depth[layer, :, :, filled:] == 0)
        attention = dense[..., T:][..., :: max(1, maps.entries_per_layer)].sum(axis=-1).mean()
        ffn = dense[..., T:][..., 1::2].sum(axis=-1).mean() if maps.entries_per_layer == 2 else 0.0
        assert maps.attention_mass[layer] == pytest.approx(attention, abs=1e-6)
        assert maps.ffn_mass[layer] == pytest.approx(ffn, abs=1e-6)


def test_memory_grows_with_a_block_and_not_with_the_square():
    T, heads, head_dim, slots = 4096, 16, 64, 70
    shapes = [(T, heads, head_dim), (T, 8, head_dim), (T, slots, 8, head_dim)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    compiled = jax.jit(maps_lib.pooled_maps).lower(*arguments, jax.ShapeDtypeStruct((slots,), bool)).compile()
    dense = heads * T * (T + slots) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 2


def test_the_picture_and_its_numbers(tmp_path, monkeypatch):
    run, figures = loaded_run(tiny_run_config()), keep_figures(monkeypatch, maps_lib)
    maps = maps_lib.attention_maps(run.model, run.params, TOKENS)
    maps_lib.draw(maps, tmp_path / "maps.png", title="random", max_layers=2, max_heads=1)
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    first, last, *_ = figures[0].subfigs[0].axes  # layers 0 and 2: no slot is filled, and all four are
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["0", "6", "13", "20"]
    assert [[patch.get_hatch() for patch in axes.patches] for axes in (first, last)] == [["////"], []]
    assert first.patches[0].get_x() == 20.5 and first.get_title("left") == "layer 0"
    assert "slots that no layer before has written" in legend_texts(figures[0])
    maps_lib.save_masses(maps, tmp_path / "maps.json")
    values = json.loads((tmp_path / "maps.json").read_text())
    assert values["tokens"] == 21 and values["attention_entries"][0] == values["ffn_entries"][0] == 0
    assert all(0 < mass < 1 for mass in values["ffn_entries"][1:])
    image, boundary = maps_lib._picture(maps, 1, 0)
    assert boundary == 21 and np.isnan(image[0, 1]) and not np.isnan(image[1, 1])
    assert not np.isnan(image[:, boundary]).any() and np.isnan(image[:, -1]).all()  # layer 1 sees layer 0's entries


def test_the_papers_layers():
    assert maps_lib.choose(36, 4) == [0, 11, 23, 35]
    assert maps_lib.choose(2, 4) == [0, 1] and maps_lib.choose(1, 4) == [0]


def test_a_text_that_does_not_fit_is_an_error():
    run = loaded_run(tiny_run_config())
    with pytest.raises(ValueError, match=r"tokens: got 65, expected 1\.\.64 \(model\.max_sequence_length\)"):
        maps_lib.attention_maps(run.model, run.params, np.zeros(65, np.int32))


def test_where_a_token_sees_the_slots_of_its_chunk_their_mass_is_summed(monkeypatch):
    monkeypatch.setattr(maps_lib, "PIXELS", 8)
    monkeypatch.setattr(maps_lib, "BLOCK_QUERIES", 6)
    draw = np.random.default_rng(0)
    T, N, K, H, S, chunk, pool = 21, 2, 1, 4, 3, 4, 3
    query, key, depth_key = (draw.standard_normal(shape) for shape in ((T, N, H), (T, K, H), (T, S, K, H)))
    visible = np.array([True, True, False])
    came = jax.jit(maps_lib.pooled_maps, static_argnums=4)(
        *(jnp.asarray(array, jnp.float32) for array in (query, key, depth_key)), visible, chunk
    )
    over_keys, over_slots = np.zeros((N, T, T)), np.zeros((N, T, S))
    for n in range(N):
        for t in range(T):
            near = range(t - t % chunk, t + 1)
            weights = {(u, None): np.exp(query[t, n] @ key[u, 0] / 2) for u in range(t + 1)}
            weights |= {(u, s): np.exp(query[t, n] @ depth_key[u, s, 0] / 2) for u in near for s in range(2)}
            total = sum(weights.values())
            for (u, s), weight in weights.items():
                if s is None:
                    over_keys[n, t, u] = weight / total
                else:
                    over_slots[n, t, s] += weight / total
    expected = (
        over_keys.reshape(N, T // pool, pool, T // pool, pool).sum(axis=4).mean(axis=2),
        over_slots.reshape(N, T // pool, pool, S).mean(axis=2), over_slots.mean(axis=1),
    )  # fmt: skip
    for ours, theirs in zip(came, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
