"""Depth mechanisms of somebody else's: ours with one method changed, found by `model.depth="support.tampered:NAME"`."""

import jax
import jax.numpy as jnp

from moda_jax.model.depth.attnres_block import BlockAttentionResiduals
from moda_jax.model.depth.mhc import ManifoldHyperConnections
from moda_jax.model.depth.moda import MixtureOfDepths
from moda_jax.model.depth.value_mixing import ValueMixing


def scaled(tree):
    """Every float array with other numbers: each channel times a factor of its own, which no norm takes away."""

    def other(a):
        if not jnp.issubdtype(jnp.result_type(a), jnp.inexact):
            return a
        return a * (1.0 + 0.4 * jnp.cos(jnp.arange(a.shape[-1], dtype=a.dtype)))

    return jax.tree.map(other, tree)


def changed(base, method):
    """A subclass whose `method` returns `scaled` values."""

    def tampered(self, *arguments, **options):
        return scaled(getattr(base, method)(self, *arguments, **options))

    return type(f"{base.__name__}_{method}", (base,), {method: tampered, "__module__": __name__})


# Every method that a layer or the model calls, on a mechanism that uses it.
METHODS = {
    "begin": MixtureOfDepths,
    "request": BlockAttentionResiduals,
    "input": MixtureOfDepths,
    "value_request": ValueMixing,
    "mixed": ValueMixing,
    "attended": MixtureOfDepths,
    "residual": ManifoldHyperConnections,
    "entries": MixtureOfDepths,
    "finish": BlockAttentionResiduals,
}
CLASSES = {method: changed(base, method) for method, base in METHODS.items()}
globals().update({cls.__name__: cls for cls in CLASSES.values()})
