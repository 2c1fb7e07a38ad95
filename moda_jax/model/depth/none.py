"""Depth residual alone: the plain transformer."""

from typing import ClassVar

from moda_jax.model.depth.mechanism import DepthMechanism


class NoDepth(DepthMechanism):
    """Nothing is kept and nothing read: every method is the base's."""

    norms: ClassVar[tuple[str, ...]] = ("pre", "post", "post_sum")
