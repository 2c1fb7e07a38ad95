"""For hand-written backward passes: their gradients beside autodiff's of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers, float32."""
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def assert_gradients_equal(function, plain, arguments, *, argnums):
    """Of a random weighting of the output, by every argument in `argnums`."""
    weights = draw(*function(*arguments).shape, seed=9)
    np.testing.assert_allclose(function(*arguments), plain(*arguments), rtol=2e-5, atol=2e-6)
    gradients, expected = (
        jax.grad(lambda *a, f=f: jnp.sum(weights * f(*a)), argnums=argnums)(*arguments) for f in (function, plain)
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == wanted.dtype
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def numbers_kept(function, x) -> int:
    """Of activations, by the backward of `function(x)`; fails if any is wider than bfloat16, a number a row aside."""
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if leaf.ndim >= 3]
    assert all(leaf.dtype == jnp.bfloat16 or leaf.shape[-1] == 1 for leaf in kept)
    return sum(leaf.size for leaf in kept if leaf.dtype == jnp.bfloat16)
