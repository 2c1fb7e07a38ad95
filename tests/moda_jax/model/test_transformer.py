"""The model against an independent unrolled one, and what it must never do: look ahead, or across documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import plain_model
from support.quick_compile import QUICK
from support.selection import quick_of

from moda_jax import Transformer, TransformerConfig

TINY = TransformerConfig(
    vocab_size=61, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=48,
    max_sequence_length=64, dtype="float32", attention_implementation="xla", initializer_range=0.15,
)  # fmt: skip
VARIANTS = {
    f"{norm}-{name}": dataclasses.replace(TINY, norm=norm, **fields)
    for norm in ("pre", "post")
    for name, fields in {
        "none": {"depth": "none"},
        "own": {"depth_ffn_kv": False},
        "ffn": {},
        "ffn+attn": {"depth_attn_kv": True},
    }.items()
}


def build(config, seed=0):
    """(graphdef, params as nested dict); norm scales are perturbed, so that a norm in the wrong place shows."""
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(seed))))[0]

    def make():
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(seed)))))
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    # As one program: one operation at a time they take longer than what is tested.
    return graph, jax.jit(make, compiler_options=QUICK)()


def apply(graph, params, *args):
    state = nnx.State(jax.tree.map(nnx.Param, params))
    return nnx.merge(graph, state)(*args)


def packed(key, batch=2, length=21, vocab=61):
    tokens = jax.random.randint(key, (batch, length), 0, vocab)
    segment_ids = jnp.asarray(np.repeat([[3, 0, 7]], batch, 0).repeat([5, 9, length - 14], axis=1), jnp.int32)
    positions = jnp.asarray(np.concatenate([np.arange(5), np.arange(9), np.arange(length - 14)]), jnp.int32)
    return tokens, segment_ids, jnp.broadcast_to(positions, (batch, length))


def compare(got, expected, tolerance, name=""):
    error = jnp.linalg.norm(got - expected) / jnp.maximum(jnp.linalg.norm(expected), 1e-30)
    assert error < tolerance, f"{name}: relative L2 error {error:.2e}, bound {tolerance:.0e}"


@pytest.mark.parametrize("name", quick_of(VARIANTS, ()))
def test_logits_and_gradients_equal_the_plain_unrolled_model(name):
    config = VARIANTS[name]
    graph, params = build(config)
    tokens, segment_ids, positions = packed(jax.random.key(5))
    weights = jax.random.normal(jax.random.key(6), (*tokens.shape, config.vocab_size))

    def ours(params):
        out = apply(graph, params, tokens, segment_ids, positions)
        return jnp.sum(weights * jax.nn.log_softmax(out)), out

    def plain(params):
        out = plain_model.logits(params, config, tokens, segment_ids, positions)
        return jnp.sum(weights * jax.nn.log_softmax(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True), compiler_options=QUICK)(params)
    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(plain, has_aux=True), compiler_options=QUICK)(params)
    assert out.dtype == jnp.float32
    compare(out, expected, 1e-5, "logits")
    for (path, got), (_, want) in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree_util.tree_leaves_with_path(expected_gradients),
        strict=True,
    ):
        compare(got, want, 3e-5, jax.tree_util.keystr(path))


def gradient_of(config):
    graph, params = build(config)
    tokens, segment_ids, positions = packed(jax.random.key(5))

    def loss(params):
        return jnp.sum(jax.nn.logsumexp(apply(graph, params, tokens, segment_ids, positions), axis=-1))

    return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)


@functools.cache
def default_gradient():
    return gradient_of(TINY)


OTHER_LOOPS = {name: {"remat": name} for name in ("full", "ffn", "none")} | {"unroll": {"layer_loop": "unroll"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_remat_and_unrolling_change_no_number(name):
    got = gradient_of(dataclasses.replace(TINY, **OTHER_LOOPS[name]))
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: compare(a, b, 1e-5, jax.tree_util.keystr(path)), got, default_gradient()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["post-ffn", "pre-none"])
def test_no_logit_depends_on_a_later_token_or_another_document(name):
    # Every token of the row is another one, so that the gradient of the (untied) table tells the positions apart.
    graph, params = build(dataclasses.replace(VARIANTS[name], tie_embeddings=False))
    _, segment_ids, positions = packed(jax.random.key(7), batch=1)
    tokens = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]

    def logits(table):
        return apply(graph, params | {"embedding": {"table": table}}, tokens, segment_ids, positions)[0].sum(-1)

    gradient = jax.jit(jax.jacrev(logits), compiler_options=QUICK)(params["embedding"]["table"])[
        :, tokens[0]
    ]  # [T out, T in, D]
    same = segment_ids[0][:, None] == segment_ids[0][None, :]
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=-1), jnp.tril(same))


def test_one_layer_and_defaults():
    config = dataclasses.replace(TINY, num_layers=1)
    graph, params = build(config)
    assert "layers" not in params
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    explicit = apply(graph, params, tokens, jnp.zeros((1, 6), jnp.int32), jnp.arange(6, dtype=jnp.int32)[None])
    compare(apply(graph, params, tokens), explicit, 1e-6, "logits")  # two programs: equal but for rounding


def test_a_call_without_jit_compiles_once():
    model = Transformer(TINY, rngs=nnx.Rngs(0))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    first = model(tokens)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("jax._src.interpreters.pxla.logger.log", lambda *args: compiled.append(args))
        np.testing.assert_array_equal(model(tokens), first)
    assert not [args for args in compiled if "ompil" in str(args)], compiled


def test_the_last_layer_has_no_projections_and_the_stream_no_slot_for_it():
    config = VARIANTS["post-ffn+attn"]
    _, params = build(config)
    assert set(params["layers"]["depth"]) == {"ffn_kv", "attention_kv"}
    assert "depth" not in params["last_layer"]
    assert config.depth_slots == 2 * (config.num_layers - 1)


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
    config = dataclasses.replace(TINY, initializer_range=0.05)
    graph, params = build(config)
    graph16, _ = build(dataclasses.replace(config, dtype="bfloat16"))
    tokens = packed(jax.random.key(8))[0]
    exact, rounded = (
        jax.jit(functools.partial(apply, g), compiler_options=QUICK)(params, tokens) for g in (graph, graph16)
    )
    assert rounded.dtype == jnp.float32
    compare(rounded, exact, 3e-2, "bfloat16 logits")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((jnp.zeros((3,), jnp.int32),), "tokens: got shape \\(3,\\)"),
        ((jnp.zeros((1, 3)),), "tokens: .*dtype float32"),
        ((jnp.zeros((1, 65), jnp.int32),), "at most max_sequence_length=64"),
        ((jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 4), jnp.int32)), "segment_ids: got shape \\(1, 4\\)"),
        ((jnp.zeros((1, 3), jnp.int32), None, jnp.zeros((2, 3), jnp.int32)), "positions: got shape \\(2, 3\\)"),
    ],
)
def test_wrong_inputs_are_named(args, message):
    model = nnx.eval_shape(lambda: Transformer(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda model: model(*args), model)
