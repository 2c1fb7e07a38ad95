"""MoDA with a bound on what a layer reads: fewer bytes, fewer slots where none reads them, and what is learned is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mechanisms import case_config, case_params, packed
from support.quick_compile import QUICK

from moda_jax import forward_flops
from moda_jax.config import TransformerConfig
from moda_jax.inference import decode
from moda_jax.model.depth import slot_reads
from moda_jax.model.depth.slot_reads import SlotAttention
from moda_jax.model.depth.stream import DepthStream
from moda_jax.model.function import model_function, split_model
from moda_jax.parallel.attention import attention_forward

LAYERS, READ, TOKENS = 24, 4, 64  # 46 slots; two rows of 32, or 64 of one
POLICIES = {
    "window": {"read": "window", "read_slots": READ},
    "hybrid": {"read": "hybrid", "read_slots": READ, "read_first": 2},
    "top": {"read": "top", "read_slots": READ},
    "stride": {"read": "stride", "read_stride": 12},
}


def config_of(name):
    fields = {"null_slot": True} if name == "all" else POLICIES[name]  # "all" read outside of the softmax too
    return case_config(
        "none", depth="moda", moda=fields, num_layers=LAYERS, attention_implementation="reference", norm="pre"
    )


@functools.cache
def compiled(name, way):
    """The compiled gradient of a row, or step of decoding. A loop's body counts once: this is about one layer's."""
    config = config_of(name)
    model = model_function(config)
    params = jax.eval_shape(lambda: split_model(config, jax.random.key(0))[1])
    if way == "training":

        def loss(params, tokens):
            return jnp.sum(jax.nn.logsumexp(model(params, tokens), axis=-1))

        tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile(QUICK)
    cache = jax.eval_shape(lambda: decode.KVCache.empty(config, 64, 2, None))
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32)
    return decode.step.lower(model, params, cache, tokens).compile(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["training", "decoding"])
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "window"])
def test_a_layer_reads_fewer_bytes(name, way):
    """Of what is cut out of the stream. A window is not cut out: see below."""
    read, whole = (compiled(which, way).cost_analysis()["bytes accessed"] for which in (name, "all"))
    config = config_of(name)
    slots = 2 * (LAYERS - 1) * TOKENS * 2 * config.num_kv_heads * config.head_dim * 4  # keys and values, once
    print(f"{name}, {way}: {read:.0f} of {whole:.0f} bytes, all slots are {slots}")
    assert whole - read > 0.5 * slots


@pytest.mark.slow
def test_entries_that_no_layer_reads_are_not_kept():
    stride, whole = (compiled(name, "training").memory_analysis().temp_size_in_bytes for name in ("stride", "all"))
    entry = TOKENS * 2 * 2 * 4 * 4  # key and value, K = 2, H = 4
    assert whole - stride > 2 * (46 - 4) * entry * 0.8  # the stream and its gradient


def test_a_bound_lowers_the_flops():
    whole, bounded = forward_flops(config_of("all"), 32), forward_flops(config_of("window"), 32)
    layers = np.arange(LAYERS)
    saved = np.sum(2 * layers - np.minimum(2 * layers, READ))
    assert whole - bounded == pytest.approx(32 * 4 * 4 * 4 * saved)


def test_a_window_is_read_where_it_lies(monkeypatch):
    """The op gets the stream's own buffers and the window's bounds: nothing is copied."""
    calls = []

    def forward(call, *, implementation):
        calls.append(call.depth)
        return attention_forward(call, implementation=implementation)

    monkeypatch.setattr(slot_reads, "attention_forward", forward)
    query, key = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 7, 2, 8))
    for filled, start in ((2, 0), (5, 2), (7, 4)):
        stream = DepthStream(key, key, jnp.int32(filled))
        SlotAttention("window", 3, implementation="xla").forward(((query, None),), stream, ())
        assert calls[-1].key is stream.key and calls[-1].value is stream.value
        assert (int(calls[-1].start), int(calls[-1].length)) == (start, filled)


@pytest.mark.parametrize("name", ["window", "hybrid", "top"])
def test_what_is_read_is_what_the_policy_says(name):
    """Against a dense softmax over those slots alone; unfilled ones hold NaN, and get no gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (1, 3, 2, 8))
    key, value = (jax.random.normal(k, (1, 3, 7, 2, 8)) for k in keys[1:3])
    scores = jax.random.normal(keys[3], (7,)) if name == "top" else None
    operation = SlotAttention(name, 3, 1 if name == "hybrid" else 0, implementation="xla")
    arrays = (query, key, value) if scores is None else (query, key, value, scores)

    def read(arrays, filled):
        query, key, value, *scores = arrays
        empty = (jnp.arange(7) >= filled)[:, None, None]
        stream = DepthStream(jnp.where(empty, jnp.nan, key), jnp.where(empty, jnp.nan, value), filled)
        ((out, _),) = operation(((query, *(scores or [None])),), stream, ())
        return jnp.sum(jnp.sin(out))

    def expected(arrays, visible):
        query, key, value, *scores = arrays
        value = value * 2 * jax.nn.sigmoid(scores[0])[:, None, None] if scores else value
        logits = jnp.einsum("btnh,btsnh->btns", query, key, precision="highest") * 8**-0.5
        weights = jnp.where(visible, jnp.exp(logits), 0.0)
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
        return jnp.sum(jnp.sin(jnp.einsum("btns,btsnh->btnh", weights, value, precision="highest")))

    read, expected = (jax.jit(jax.value_and_grad(f), compiler_options=QUICK) for f in (read, expected))
    for filled in (0, 2, 3, 5, 7):
        chosen = {
            "window": range(max(filled - 3, 0), filled),
            "hybrid": [slot for slot in range(filled) if slot < 1 or slot >= filled - 2],
            "top": [] if scores is None else sorted(range(filled), key=lambda slot: -float(scores[slot]))[:3],
        }[name]
        visible = np.isin(np.arange(7), list(chosen))
        both = read(arrays, jnp.int32(filled)), expected(arrays, visible)
        for ours, theirs in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6, err_msg=f"{filled} filled")


@pytest.mark.slow
def test_null_slot_and_scores_are_learned():
    """Of slots that are read: those of the case's last layer, which finds six and reads two."""
    for name, path in (("moda, window", "null_slot"), ("moda, top", "slot_scores")):
        model, params = model_function(case_config(name)), case_params(name)

        def loss(params, model=model):
            return jnp.sum(jax.nn.log_softmax(model(params, *packed()))[..., 3])

        gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)["last_layer"]["depth"][path]["offset"]
        assert np.count_nonzero(gradient) == (2 if path == "slot_scores" else gradient.size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"read": "last"}, r"moda.read='last': expected one of \('all', 'window', 'stride', 'hybrid', 'top'\)"),
        ({"read": "window", "read_slots": 0}, "moda.read_slots=0: expected a positive number"),
        ({"read": "hybrid", "read_slots": 2}, "moda.read_first=2: expected less than model.moda.read_slots=2"),
        ({"key": "raw"}, "moda.key='raw': expected one of"),
        ({"query_rotated": False}, "moda.query_rotated=False: expected True with model.moda.key='own'"),
        ({"softmax": "both"}, "moda.softmax='both': expected one of"),
        ({"softmax": "separate", "null_slot": True}, "moda.null_slot=True: expected False with model.moda.softmax="),
        ({"entry_bias": True, "read": "top"}, "moda.entry_bias=True: expected False with model.moda.read='top'"),
    ],
)
def test_bad_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({"depth": "moda", "moda": fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"read": "top", "read_slots": 7}, "model.moda.read_slots=7: expected at most the model's 6 depth slots"),
        ({"read": "stride", "read_stride": 4}, "model.moda.read_stride=4: expected less than model.num_layers=4"),
    ],
)
def test_a_bound_beyond_the_model_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        split_model(case_config("none", depth="moda", moda=fields), jax.random.key(0))
