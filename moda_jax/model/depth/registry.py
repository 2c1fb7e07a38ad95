"""Finds a depth mechanism by what `model.depth` says."""

from __future__ import annotations

import importlib

from moda_jax.depth_config import MECHANISMS
from moda_jax.model.depth.mechanism import DepthMechanism


def find_mechanism(name: str) -> type[DepthMechanism]:
    """The class that `model.depth` names.

    Args:
        name: one of `MECHANISMS`, or "package.module:Class".

    Raises:
        ValueError: there is no such class, or it is no `DepthMechanism`.
    """
    module_name, _, class_name = MECHANISMS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.depth={name!r}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, DepthMechanism)):
        raise ValueError(f"model.depth={name!r}: expected a subclass of DepthMechanism, got {found!r}")
    return found
