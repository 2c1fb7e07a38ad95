"""The vision task on a mesh is the vision task on one device."""

import numpy as np
import pytest
from support.virtual_devices import run_module


@pytest.mark.slow
@pytest.mark.precise
def test_steps_and_evaluation_on_a_mesh_are_those_of_one_device(tmp_path):
    run_module("support.vision_meshes", tmp_path, devices=4)
    ours, expected = np.load(tmp_path / "mesh.npz"), np.load(tmp_path / "one.npz")
    np.testing.assert_allclose(ours["losses"], expected["losses"], rtol=1e-4)
    assert len(expected.files) > 20
    for name in expected.files:
        error = np.linalg.norm(ours[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-4, f"{name}: relative L2 error {error:.2e}"
