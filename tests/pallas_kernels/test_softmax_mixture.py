"""The softmax mixture of a token's slots: its kernels beside XLA, alone and in a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moda_jax import Transformer
from moda_jax.config import TransformerConfig
from pallas_kernels import dispatch
from pallas_kernels.mixture import softmax_mixture, softmax_mixture_backward

EPSILON = 1e-4


def draw(batch=2, tokens=4, slots=3, columns=128, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    hidden, dhidden = (jnp.asarray(rng.standard_normal((batch, tokens, slots, columns)), dtype) for _ in range(2))
    dresult = rng.standard_normal((batch, tokens, columns)), rng.standard_normal((batch, tokens))
    dresult = jnp.asarray(dresult[0], dtype), jnp.asarray(dresult[1], jnp.float32)
    return hidden, jnp.asarray(rng.standard_normal(columns) / 8, jnp.float32), dresult, dhidden


def run(implementation, hidden, direction, dresult, dhidden, length):
    options = {"epsilon": EPSILON, "implementation": implementation}
    result = softmax_mixture(hidden, direction, length, **options)
    return result, softmax_mixture_backward(hidden, direction, length, result, dresult, dhidden, **options)


def test_kernels_are_xla():
    """Interpreted, where there is no Hopper GPU."""
    arguments = *draw(), jnp.int32(2)
    for came, expected in zip(*(jax.tree.leaves(run(name, *arguments)) for name in ("mosaic_gpu", "xla")), strict=True):
        assert came.dtype == expected.dtype and came.shape == expected.shape
        error = np.asarray(came, np.float64) - np.asarray(expected, np.float64)
        assert np.linalg.norm(error) < 5e-3 * np.linalg.norm(np.asarray(expected, np.float64))


def test_what_the_kernels_do_not_take_is_xlas_unless_they_were_asked_for(monkeypatch):
    arguments = *draw(tokens=3, batch=1), jnp.int32(2)
    with pytest.raises(NotImplementedError, match="slots of a token: 3 tokens: expected a multiple of 4"):
        run("mosaic_gpu", *arguments)
    with pytest.raises(ValueError, match="implementation='cuda': expected None or one of"):
        run("cuda", *arguments)
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))  # as on a Hopper GPU
    for came, expected in zip(*(jax.tree.leaves(run(name, *arguments)) for name in (None, "xla")), strict=True):
        np.testing.assert_array_equal(np.asarray(came, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("depth", ["attnres", "attnres_block", "attnres_delta", "mudd"])
@pytest.mark.gpu
def test_a_whole_models_gradients_are_those_of_xla(depth):
    """To what bfloat16 leaves of them."""
    tokens = jnp.arange(2 * 300, dtype=jnp.int32).reshape(2, 300) % 251

    def gradients(implementation):
        config = TransformerConfig(
            vocab_size=256, num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_width=512,
            dtype="bfloat16", depth=depth, norm="pre", attention_implementation=implementation,
        )  # fmt: skip
        graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))

        def loss(state):
            logits = nnx.merge(graphdef, state)(tokens)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

        compiled = jax.jit(jax.value_and_grad(loss)).lower(state).compile()
        kernel = "moda_weighted_sums_backward" if depth == "mudd" else "moda_mixture_backward"
        assert (kernel in compiled.as_text()) is (implementation is None)
        return compiled(state)

    (loss, expected), (came_loss, came) = map(gradients, ("xla", None))
    np.testing.assert_allclose(came_loss, loss, rtol=1e-3)
    norm = optax.tree.norm(expected)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, came, expected)) < 0.02 * norm


@pytest.mark.gpu
def test_the_gradient_is_added_in_place():
    hidden, direction, dresult, dhidden = draw(batch=2, tokens=512, slots=9, columns=1024)
    result = softmax_mixture(hidden, direction, jnp.int32(5), epsilon=EPSILON)
    backward = functools.partial(softmax_mixture_backward, epsilon=EPSILON)
    compiled = (
        jax.jit(backward, donate_argnums=(5,))
        .lower(hidden, direction, jnp.int32(5), result, dresult, dhidden)
        .compile()
    )
    place = dhidden.unsafe_buffer_pointer()
    assert compiled(hidden, direction, jnp.int32(5), result, dresult, dhidden)[1].unsafe_buffer_pointer() == place
    assert compiled.memory_analysis().temp_size_in_bytes < hidden.nbytes / 4
