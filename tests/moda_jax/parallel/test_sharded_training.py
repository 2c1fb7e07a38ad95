"""Training on meshes of 8 devices is training on one: losses, gradients, and what crosses between the devices.

All of it is slow but for one mesh of 4 devices.
"""

import json
import math

import numpy as np
import pytest
from support.mesh_training import CONFIG, MEMORY, MEMORY_MESHES, MESHES, QUICK_MESH, QUICK_NAME, STEPS
from support.virtual_devices import run_module

from benchmarks.collectives import find_collectives
from moda_jax.config import MeshConfig
from moda_jax.parallel.mesh import mesh_sizes
from moda_jax.parallel.parameters import padded_vocabulary


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("meshes")
    run_module("support.mesh_training", directory)
    run_module("support.mesh_training", directory, devices=16)
    return directory


def sizes(mesh):
    return mesh_sizes(MeshConfig(**mesh), math.prod(mesh.values()))


def assert_same_gradients(ours, expected):
    names = [name for name in expected if name != "losses"]
    assert len(names) == 25
    for name in names:
        gradient = ours[name]
        reference = expected[name].astype(np.float64)
        rows = reference.shape[0]
        assert not np.any(gradient[rows:])  # of the vocabulary's padding
        error = np.linalg.norm(gradient[:rows] - reference) / np.linalg.norm(reference)
        assert error < 1e-5, f"{name}: relative L2 error {error:.2e}"


def assert_same_losses(ours, expected):
    assert len(expected["losses"]) == STEPS and expected["losses"][-1] < expected["losses"][0]
    np.testing.assert_allclose(ours["losses"], expected["losses"], atol=1e-4, rtol=0)


def test_steps_on_a_small_mesh_are_those_of_one_device(tmp_path):
    run_module("support.mesh_training", tmp_path, devices=4)
    ours, expected = np.load(tmp_path / f"{QUICK_NAME}.npz"), np.load(tmp_path / "one.npz")
    assert_same_losses(ours, expected)
    assert_same_gradients(ours, expected)
    found = find_collectives((tmp_path / f"{QUICK_NAME}.hlo").read_text(), sizes(QUICK_MESH))
    assert {axis for c in found for axis in c.axes} == {"fsdp", "context"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_losses_and_gradients_are_those_of_one_device(runs, name):
    ours, expected = np.load(runs / f"{name}.npz"), np.load(runs / "one.npz")
    assert_same_losses(ours, expected)
    assert_same_gradients(ours, expected)


@pytest.mark.slow
def test_documents_that_end_inside_a_context_shard(runs):
    assert_same_gradients(np.load(runs / "boundary.npz"), np.load(runs / "one_boundary.npz"))


def stream_shape(mesh):
    """[B, T, S, K, H] of one device's depth stream and of its gradient."""
    of = sizes(mesh)
    rows = CONFIG.train.batch_size // CONFIG.train.accumulation_steps // (of["data"] * of["fsdp"])
    model = CONFIG.model
    tokens = CONFIG.data.sequence_length // of["context"]
    return rows, tokens, model.depth_slots, model.num_kv_heads // of["tensor"], model.head_dim


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_no_collective_touches_the_depth_stream(runs, name):
    mesh = MESHES[name]
    hlo = (runs / f"{name}.hlo").read_text()
    shape = stream_shape(mesh)
    assert f"f32[{','.join(map(str, shape))}]" in hlo
    found = find_collectives(hlo, sizes(mesh))
    assert found
    whole = math.prod(shape) * math.prod(sizes(mesh).values())
    for collective in found:
        for _, dimensions in collective.arrays:
            # Any layout, slice of the batch's mesh axes or reshape of it would have as many elements.
            assert math.prod(dimensions) not in (math.prod(shape), whole), collective


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_collectives_run_over_the_axes_that_the_design_says(runs, name):
    mesh = sizes(MESHES[name])
    found = find_collectives((runs / f"{name}.hlo").read_text(), mesh)
    kinds = {(c.kind, axis) for c in found for axis in c.axes}
    assert {axis for _, axis in kinds} == {axis for axis, size in mesh.items() if size > 1}
    assert not [c for c in found if c.kind in ("all-to-all", "collective-permute")], "no resharding"
    if mesh["fsdp"] > 1:
        gathered = [c for c in found if c.kind == "all-gather" and c.axes == ("fsdp",)]
        # 8 matrices of every layer of every micro-batch: forward and recomputation. Nothing gathers a stack of layers.
        executions = (CONFIG.model.num_layers - 1) * CONFIG.train.accumulation_steps
        assert sum(len(c.arrays) for c in gathered if c.times == executions) == 2 * 8
        table = CONFIG.model.width * padded_vocabulary(CONFIG.model.vocab_size) // mesh["tensor"]
        assert max(math.prod(shape) for c in gathered for _, shape in c.arrays) == table
        # Gradients of matrices go back in parts.
        assert all(c.sliced for c in found if c.kind == "all-reduce" and c.axes == ("fsdp",) and rank(c) > 1)
    if mesh["context"] > 1:
        assert ("all-gather", "context") in kinds and ("reduce-scatter", "context") in kinds


def rank(collective):
    return max(len(shape) for _, shape in collective.arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORY_MESHES)
def test_memory_of_a_device_falls_as_it_should(runs, name):
    found = json.loads((runs / "memory.json").read_text())
    mesh, one, ours = sizes(MEMORY_MESHES[name]), found["one"], found[name]
    shards = mesh["data"] * mesh["fsdp"] * mesh["context"]
    batch = 5 * 4 * MEMORY.train.batch_size * MEMORY.data.sequence_length  # bytes
    state = one["arguments"] - batch  # parameters and both moments
    assert ours["arguments"] - batch / shards == pytest.approx(state / (mesh["fsdp"] * mesh["tensor"]), rel=0.1)
    expected = one["temporaries"] / shards
    if mesh["tensor"] == 1:
        assert ours["temporaries"] == pytest.approx(expected, rel=0.1)
    else:  # heads and FFN channels are split as well, the residual stream is not
        assert expected / mesh["tensor"] < ours["temporaries"] < expected


@pytest.mark.slow
def test_gathered_parameters_are_not_kept_for_the_backward_pass(runs):
    """Not even where all that autodiff needs is: a layer's matrices are gathered again."""
    hlo = (runs / "everything_kept.hlo").read_text()
    model = MEMORY.model
    whole = f"{model.width},{model.ffn_width}]"
    assert f"f32[{whole}" in hlo
    assert f"f32[{model.num_layers - 1},{whole}" not in hlo
