"""A stream's buffers begin as memory that nobody has cleared: what slots hold that were not written changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mechanisms import case_config, packed, perturbed
from support.quick_compile import QUICK

from moda_jax.model.depth import stream
from moda_jax.model.function import model_function

NAMES = "moda", "attnres_block", "denseformer, dilated", "value_residual"  # each reads a stream in its own way


def loss_and_gradient(config):
    model, params = model_function(config), perturbed(config)
    tokens, segment_ids, positions = packed()

    def loss(params):
        logits = model.module(params)(tokens, segment_ids, positions)
        return jnp.mean(jnp.sin(logits.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_unfilled_slots_hold_does_not_matter(name, monkeypatch):
    made = []

    def unlucky(shape, dtype):
        made.append(shape)
        return jnp.full(shape, jnp.nan, dtype)

    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as on a machine with one
    monkeypatch.setattr(stream, "_as_found", jnp.zeros)
    expected = loss_and_gradient(case_config(name))
    monkeypatch.setattr(stream, "_as_found", unlucky)
    got = loss_and_gradient(case_config(name))
    assert made
    jax.tree.map(np.testing.assert_array_equal, got, expected)
