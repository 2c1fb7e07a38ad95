"""Finds a depth mechanism by what `model.depth` says."""

from __future__ import annotations

from moda_jax.class_path import find_class
from moda_jax.depth_config import MECHANISMS
from moda_jax.model.depth.mechanism import DepthMechanism


def find_mechanism(name: str) -> type[DepthMechanism]:
    """The class that `model.depth` names.

    Args:
        name: one of `MECHANISMS`, or "package.module:Class".

    Raises:
        ValueError: there is no such class, or it is no `DepthMechanism`.
    """
    return find_class("model.depth", name, MECHANISMS, DepthMechanism)
