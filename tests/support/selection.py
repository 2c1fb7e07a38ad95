"""Which cases of a test belong to the default run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest


def quick_of(cases: Iterable[str], quick: Collection[str]) -> list:
    """Parameters for `pytest.mark.parametrize`: all cases; those that `quick` does not name are marked `slow`.

    Raises:
        ValueError: a name in `quick` that is no case.
    """
    cases = list(cases)
    unknown = set(quick) - set(cases)
    if unknown:
        raise ValueError(f"quick={sorted(unknown)}: expected names among {cases}")
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def quick_of_named(cases: Mapping[str, tuple[Any, ...]], quick: Collection[str]) -> list:
    """The same for cases of several arguments, by name."""
    return [
        pytest.param(*cases[parameter.values[0]], id=parameter.values[0], marks=parameter.marks)
        for parameter in quick_of(cases, quick)
    ]


def quick_first(cases: Sequence[tuple[Any, ...]], quick: int) -> list:
    """The same for cases without names: those behind the first `quick` are marked `slow`."""
    return [pytest.param(case, marks=() if i < quick else pytest.mark.slow) for i, case in enumerate(cases)]
