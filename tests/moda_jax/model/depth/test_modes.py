"""Every registered mechanism under JAX's own strict modes, all at once: what a user has forbidden is not done for them.

Tracing is what fails there, so nothing is compiled.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moda_jax import Transformer, TransformerConfig
from moda_jax.depth_config import MECHANISMS


@pytest.mark.parametrize("name", MECHANISMS)
def test_forward_and_gradients_are_traced_and_stay_float32(name):
    config = TransformerConfig(
        vocab_size=32, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=32, norm="pre",
        depth=name, max_sequence_length=16, attention_implementation="xla", dtype="float32",
    )  # fmt: skip
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def objective(params, tokens):
        return jnp.sum(nnx.merge(graph, params)(tokens) ** 2)

    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients = jax.eval_shape(jax.grad(objective), params, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
