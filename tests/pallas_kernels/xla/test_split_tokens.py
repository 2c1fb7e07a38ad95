"""Depth is local to a token: with tokens split over devices no depth array moves, whatever kind of mesh it is."""

import json
import re

import numpy as np
import pytest
from support.split_tokens import CASES, SLOTS, TOKENS, H, K, N
from support.virtual_devices import run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("split_tokens")
    run_module("support.split_tokens", directory)
    return directory


def moved(program):
    """Elements of every array that a collective gives."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    for line in program.splitlines():
        match = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
        if match:
            for dimensions in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                yield int(np.prod([int(size) for size in dimensions.split(",") if size]))


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_size_of_depth_kv_moves(directory, name):
    sizes = list(moved((directory / f"{name}.hlo").read_text()))
    if name == "automatic_moda":
        assert max(sizes) == TOKENS * N * H  # a query has to see all keys
    else:
        assert max(sizes, default=0) <= 1


@pytest.mark.parametrize("name", CASES)
def test_temporaries_are_less_than_one_depth_array(directory, name):
    """With the depth part alone less than a device's share of one."""
    temporaries = json.loads((directory / "found.json").read_text())[name]
    depth_array = 4 * TOKENS * SLOTS * K * H
    assert temporaries < (depth_array if name.endswith("moda") else depth_array // 8)


@pytest.mark.parametrize("op", ["automatic_depth", "automatic_moda", "explicit_depth"])
def test_gradients_are_those_of_one_device(directory, op):
    found = np.load(directory / "gradients.npz")
    for i in range(3):
        expected = found[f"one_{op.split('_')[1]}_{i}"]
        error = np.linalg.norm(found[f"{op}_{i}"] - expected) / np.linalg.norm(expected)
        assert error < 1e-6, f"gradient {i}: relative L2 error {error:.2e}"
