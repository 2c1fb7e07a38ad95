"""Rotary embedding, alone and behind a norm: hand-written backward passes, against autodiff of plain formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.hand_written_backward import assert_gradients_equal, draw, numbers_kept

from moda_jax.model.rotary import norm_rotate, rotate


def test_rotate():
    positions = jnp.int32([[0, 5, 100], [7, 1, 3]])
    theta = 50.0

    def plain(x):
        """Pair (i, i + H/2) as a complex number, times e^(i angle)."""
        half = x.shape[-1] // 2
        angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    assert_gradients_equal(lambda x: rotate(x, positions, theta), plain, (draw(2, 3, 2, 8),), argnums=(0,))


@pytest.mark.parametrize(("per_head", "theta"), [(False, 50.0), (True, 50.0), (True, None)])
def test_norm_rotate_is_the_norm_of_all_heads_or_of_each_and_then_the_rotation(per_head, theta):
    positions = jnp.int32([[0, 5, 100], [7, 1, 3]])
    scale = draw(8, seed=1) if per_head else draw(2, 8, seed=1)

    def plain(x, scale):
        flat = x if per_head else x.reshape(2, 3, 16)
        flat = scale.reshape(-1) * flat / jnp.sqrt(jnp.mean(flat**2, axis=-1, keepdims=True) + 0.1)
        return flat if theta is None else rotate(flat.reshape(x.shape), positions, theta)

    assert_gradients_equal(
        lambda x, scale: norm_rotate(x, scale, positions, 0.1, theta), plain, (draw(2, 3, 2, 8), scale), argnums=(0, 1)
    )


def test_places_of_two_coordinates_turn_half_of_the_pairs_each():
    x, places = draw(1, 2, 3, 8), jnp.int32([[[4, 7], [0, 2]]])
    got = rotate(x, places, 50.0)
    for coordinate, channels in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
        expected = rotate(x[..., jnp.array(channels)], places[..., coordinate], 50.0)
        np.testing.assert_allclose(got[..., jnp.array(channels)], expected, rtol=1e-6, atol=1e-6)


def test_what_is_kept_for_the_backward():
    """Nothing of a rotation; of a norm with a rotation behind it the input, not widened."""
    x, positions = jnp.zeros((2, 16, 4, 32), jnp.bfloat16), jnp.zeros((2, 16), jnp.int32)
    assert numbers_kept(lambda x: rotate(x, positions, 10.0), x) == 0
    assert numbers_kept(lambda x: norm_rotate(x, jnp.ones((4, 32)), positions, 1e-6, 10.0), x) == x.size
