"""The loop takes delta = rowsum(dout * out) from the rounded output: what that costs a model's bfloat16 gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support.mechanisms import case_config, packed, perturbed
from support.quick_compile import QUICK

from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.function import model_function
from moda_jax.parallel.attention import attention_backward, attention_forward
from pallas_kernels.operands import Upstream
from pallas_kernels.parts import Part, delta


def exact_forward(self, request, stream, shared):
    """As the op's own: the log-sum-exp, and what rounding took from the output."""
    part = attention_forward(self.call(request, stream, shared), with_rest=True, implementation=self.implementation)
    return part.out, (part.lse, part.rest)


def exact_backward(self, request, result, saved, stream, shared, dresult, dbuffers):
    lse, rest = saved
    upstream = Upstream(dresult, lse, delta(dresult, Part(result, lse, rest)))
    dquery, dkey, dvalue, *sums = attention_backward(
        self.call(request, stream, shared), upstream, buffers=dbuffers, implementation=self.implementation
    )
    return (dquery, dkey, dvalue), tuple(sums)


@pytest.mark.slow
@pytest.mark.precise
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_the_rounded_output_serves_a_model_as_well_as_the_exact_one(sharpness, monkeypatch):
    config = case_config("moda", layer_loop="unroll")
    params = perturbed(config)
    for name in ("layers", "last_layer"):
        params[name]["attention"]["query_norm"]["scale"] *= sharpness
    arrays = packed(3)

    def gradient(config):
        # The cache of traced loops goes by the operations' values, which monkeypatching does not change.
        jax.clear_caches()
        model = model_function(config)
        function = jax.grad(lambda params: jnp.sum(jnp.sin(model(params, *arrays))))
        return jnp.concatenate(
            [leaf.ravel() for leaf in jax.tree.leaves(jax.jit(function, compiler_options=QUICK)(params))]
        )

    exact = gradient(config)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    rounded = gradient(narrow)
    monkeypatch.setattr(SoftmaxAttention, "forward", exact_forward)
    monkeypatch.setattr(SoftmaxAttention, "backward", exact_backward)
    corrected = gradient(narrow)
    jax.clear_caches()
    with_rounded, with_exact = (
        float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)) for g in (rounded, corrected)
    )
    print(f"relative error: delta from the rounded output {with_rounded:.4f}, from the exact one {with_exact:.4f}")
    assert not jnp.array_equal(rounded, corrected)
    assert with_rounded < 1.1 * with_exact
