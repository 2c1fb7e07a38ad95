import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import OptimizerConfig, TransformerConfig
from moda_jax.model.function import parameter_kinds, split_model
from moda_jax.parameter import ParameterKind, ParameterKinds
from moda_jax.training.optimizer import make_optimizer

TINY = {
    "vocab_size": 20, "num_layers": 3, "width": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_width": 16,
    "depth_attn_kv": True,
}  # fmt: skip


def model_parameters(**fields):
    config = TransformerConfig(**TINY | fields)
    return jax.eval_shape(lambda: split_model(config, jax.random.key(0))[1])


def named(tree):
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_norms_and_embeddings_do_not(tied):
    params = model_parameters(tie_embeddings=tied)
    kinds = parameter_kinds(TransformerConfig(**TINY, tie_embeddings=tied))
    mask = named(kinds.map(lambda kind, _: kind.decays, params))
    for name, decays in mask.items():
        assert decays == name.endswith(".kernel"), name
    assert mask["embedding.table"] is False
    assert mask["layers.attention.query_norm.scale"] is False  # two axes, being stacked, and no matrix all the same
    assert mask["layers.depth.ffn_kv.kernel"] is True
    assert ("head.kernel" in mask) == (not tied)


def test_updates_equal_a_float64_adamw():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.1, gradient_clip_norm=1.0)
    kinds = {"a.kernel": ParameterKind((None, None), decays=True), "b.scale": ParameterKind((None,))}
    optimizer = make_optimizer(config, 5, ParameterKinds(tuple(kinds.items())))
    random = np.random.default_rng(0)
    params = {"a": {"kernel": random.normal(size=(3, 4))}, "b": {"scale": random.normal(size=(4,))}}
    expected = jax.tree.map(np.copy, params)
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    shapes = jax.tree.map(jnp.shape, state)
    moments = {name: (0.0, 0.0) for name in ("a", "b")}
    for n, size in ((1, 5.0), (2, 0.01), (3, 1.0)):
        gradient = jax.tree.map(lambda p, size=size: size * random.normal(size=p.shape), expected)
        norm = math.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
        rate = 0.1 * n / 2 if n < 2 else 0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * (n - 2) / 3)) / 2)
        for name, kind, decay in (("a", "kernel", 0.1), ("b", "scale", 0.0)):
            g = gradient[name][kind] / max(norm, 1.0)
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g**2
            moments[name] = first, second
            step = (first / (1 - 0.9**n)) / (np.sqrt(second / (1 - 0.95**n)) + 1e-8)
            expected[name][kind] = expected[name][kind] - rate * (step + decay * expected[name][kind])
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, kind in (("a", "kernel"), ("b", "scale")):
            np.testing.assert_allclose(params[name][kind], expected[name][kind], rtol=1e-5, err_msg=f"{name}, step {n}")
    assert jax.tree.map(jnp.shape, state) == shapes
