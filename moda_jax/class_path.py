"""Finds what a config names: a class of ours by its short name, or anybody's as "package.module:Class"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping


def find_class[T](field: str, name: str, ours: Mapping[str, str], base: type[T]) -> type[T]:
    """The class that a config field names.

    Args:
        field: of the config, for the message.
        name: a name of `ours`, or "package.module:Class".
        ours: name -> "package.module:Class".
        base: what the class must be derived from.

    Raises:
        ValueError: there is no such class, or it is not derived from `base`.
    """
    module_name, _, class_name = ours.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}={name!r}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{field}={name!r}: expected a subclass of {base.__name__}, got {found!r}")
    return found
