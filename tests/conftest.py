"""Tests marked `gpu` are skipped, with a reason, where JAX sees no NVIDIA GPU."""

import jax
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()} here")
        for item in marked:
            item.add_marker(skip)
