"""A mechanism cannot be half-applied: whichever method is another, training, prefill, decoding and maps all change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tampered
from support.mechanisms import assert_close, case_config, perturbed, relative_errors
from support.quick_compile import QUICK

from moda_jax.inference import decode
from moda_jax.model.attention import default_positions
from moda_jax.model.depth import mechanism
from moda_jax.model.function import model_function, split_model
from moda_jax.model.stack import Step

CASE = {
    tampered.MixtureOfDepths: "moda, projected",
    tampered.BlockAttentionResiduals: "attnres_block",
    tampered.ManifoldHyperConnections: "mhc",
    tampered.ValueMixing: "value_mixing of all",
}
TOKENS = np.random.default_rng(5).integers(0, 31, (1, 6)).astype(np.int32)


def test_every_method_of_the_interface_is_tampered_with():
    methods = {
        name
        for name, value in vars(mechanism.DepthMechanism).items()
        if callable(value) and not name.startswith("_") and not isinstance(value, (classmethod, type))
    }
    assert methods == set(tampered.METHODS)


@functools.cache
def last_logits(name, depth):
    """The last token's logits by the ways in which a model runs."""
    config = case_config(name, num_layers=3, depth=depth)
    params = perturbed(case_config(name, num_layers=3))
    model = model_function(config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def forward(tokens):
        module = model.module(params)
        x = module.embedding(tokens)
        positions = default_positions(x)
        stepped = module.walk(x, positions, None, Step())[0]
        return {"loop": module(tokens)[:, -1], "steps": module.logits(stepped)[:, -1]}

    ways = forward(TOKENS)
    start = np.zeros(1, np.int32)
    ways["prefill"], _ = decode.prefill(model, params, TOKENS, start, capacity=8, padded=False)
    _, cache = decode.prefill(model, params, TOKENS[:, :-1], start, capacity=8, padded=False)
    ways["decoding"], _ = decode.step(model, params, cache, jnp.asarray(TOKENS[:, -1]))
    return ways


@pytest.mark.slow
@pytest.mark.parametrize("method", tampered.METHODS)
def test_all_ways_change_together(method):
    base = tampered.METHODS[method]
    name = "moda, window" if method == "attended" else CASE[base]
    plain = last_logits(name, case_config(name).depth)
    other = last_logits(name, f"support.tampered:{base.__name__}_{method}")
    for way, logits in other.items():
        assert_close(logits, other["loop"], 1e-5)
        (change,) = relative_errors(logits, plain[way]).values()
        assert change > 1e-3, f"{way} does not notice"


def test_an_entry_that_is_not_what_it_says_is_refused():
    """The backward and decoding take the softmax's own key and value for what stands in the slot."""
    config = case_config("moda", depth="support.tampered:MixtureOfDepths_entries")
    assert config.moda.attn_kv is False
    params = jax.eval_shape(lambda: split_model(dataclasses.replace(config, depth="moda"), jax.random.key(0))[1])
    with pytest.raises(ValueError, match="writes_own_key_value is True, expected the key and value of the sub-layer"):
        jax.eval_shape(model_function(config), params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
