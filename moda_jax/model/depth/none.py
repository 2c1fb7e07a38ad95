"""Depth residual alone: the plain transformer."""

from moda_jax.model.depth.mechanism import DepthMechanism


class NoDepth(DepthMechanism):
    """Nothing is kept and nothing read: every method is the base's."""
