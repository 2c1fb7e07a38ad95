"""The layer and the loop on a mesh of somebody else's: partitioned by XLA, with explicit axes, and in `shard_map`."""

import numpy as np
import pytest
from support.virtual_devices import run_module


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("own_mesh")
    run_module("support.own_mesh", directory)
    return np.load(directory / "found.npz")


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["automatic", "explicit", "manual"])
def test_loss_and_gradients_are_those_of_one_device(found, axes):
    names = [name.removeprefix("one") for name in found.files if name.startswith("one")]
    assert len(names) == 9  # the loss, seven parameters, x
    for name in names:
        ours, expected = found[f"{axes}{name}"], found[f"one{name}"].astype(np.float64)
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{axes}{name}: relative L2 error {error:.2e}"
