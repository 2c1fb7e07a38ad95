import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_compile import QUICK
from support.saved_run import random_model
from support.selection import quick_of

from moda_jax.config import TransformerConfig
from moda_jax.interop.depth_init import add_depth
from moda_jax.model.function import model_function
from moda_jax.numerics.cross_entropy import loss_sums

BASE = TransformerConfig(
    vocab_size=61, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=48, depth="none",
    max_sequence_length=64, initializer_range=0.15, dtype="float32",
)  # fmt: skip
ROWS = {
    "row 4": {"depth_ffn_kv": True},
    "row 5": {"depth_ffn_kv": True, "depth_attn_kv": True},
}


@pytest.fixture(scope="module")
def base():
    return random_model(BASE)[1]


def start(base, **fields):
    config = dataclasses.replace(BASE, depth="moda", **fields)
    return config, add_depth(BASE, base, config, jax.random.key(1))


@pytest.mark.parametrize("row", quick_of(ROWS, ("row 4",)))
def test_the_bases_weights_are_kept_and_new_values_are_zero(base, row):
    config, params = start(base, **ROWS[row])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_model(config)[1])
    new = params["layers"].pop("depth")
    assert jax.tree.structure(params) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, params, base)
    for kernel in jax.tree.leaves(new):  # [L-1, D, 2, K, H]
        assert np.all(kernel[:, :, 1] == 0)
        assert np.std(kernel[:, :, 0]) == pytest.approx(BASE.initializer_range, rel=0.1)


def loss_and_gradient(config, params):
    model = model_function(config)
    tokens = jax.random.randint(jax.random.key(3), (2, 48), 0, 61)
    targets = jnp.argmax(jax.jit(model_function(BASE), compiler_options=QUICK)(random_model(BASE)[1], tokens), axis=-1)

    def loss(params):
        sums = loss_sums(model(params, tokens), targets, jnp.ones(tokens.shape))
        return sums.loss / sums.num_targets

    value, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    norms = jax.tree.map(lambda g: float(np.linalg.norm(g)), gradient)
    return float(value), norms, float(np.sqrt(sum(n**2 for n in jax.tree.leaves(norms))))


@pytest.mark.slow
@pytest.mark.precise
def test_the_first_step_is_close_to_the_bases(base):
    expected, _, norm = loss_and_gradient(BASE, base)
    config, params = start(base, **ROWS["row 5"])
    loss, norms, new_norm = loss_and_gradient(config, params)
    # The targets are what the base finds likeliest, so this loss sees every change of its outputs.
    assert abs(loss - expected) < 0.1 * expected
    assert new_norm < 1.5 * norm  # zero keys: see the module
    assert all(n > 0 for n in jax.tree.leaves(norms["layers"]["depth"]))  # the new weights learn
    fresh = random_model(config, 1)[1]
    unscaled = jax.tree.map(lambda p: p, params)
    unscaled["layers"]["depth"] = fresh["layers"]["depth"]  # random values instead of 0
    assert abs(loss - expected) < abs(loss_and_gradient(config, unscaled)[0] - expected)


def test_mistakes_are_named(base):
    config = dataclasses.replace(BASE, depth="moda", width=64)
    with pytest.raises(ValueError, match=r"model\.width=64: expected the base's 32"):
        add_depth(BASE, base, config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"depth='moda': expected a base with depth='none'"):
        add_depth(config, base, config, jax.random.key(0))
