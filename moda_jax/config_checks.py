"""Checks of config fields: what a ValueError says about a bad one."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

LARGEST_INT = 2**31 - 1  # what a device counts with; also keeps sizes that no machine has away from JAX


def require(condition: bool, field: str, came: Any, expected: str) -> None:
    """Raises the ValueError that every bad field gets: its name, what came, what was expected."""
    if not condition:
        raise ValueError(f"{field}={came!r}: expected {expected}")


def require_positive(section: str, config: Any, *fields: str) -> None:
    """`require` that each of a section's fields is above 0."""
    for field in fields:
        require(getattr(config, field) > 0, f"{section}.{field}", getattr(config, field), "a positive number")


def require_not_negative(section: str, config: Any, *fields: str) -> None:
    """`require` that each of a section's fields is 0 or above."""
    for field in fields:
        require(getattr(config, field) >= 0, f"{section}.{field}", getattr(config, field), "zero or a positive number")


def check_types(section: str, config: Any) -> None:
    """Every field holds its annotated type. An int is accepted for a float (and stored as one); a bool is no int."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if float in allowed and type(value) is int:
            object.__setattr__(config, field.name, float(value))
            continue
        names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
        require(type(value) in allowed, f"{section}.{field.name}", value, f"a value of type {names}")
        if type(value) is int:
            require(
                abs(value) <= LARGEST_INT, f"{section}.{field.name}", value, f"a number of at most {LARGEST_INT}"
            )  # fmt: skip
        if type(value) is float:
            require(value == value and abs(value) != float("inf"), f"{section}.{field.name}", value, "a finite number")
