"""Every mechanism on a mesh that splits rows, tokens, heads and parameters: as on one device, and its stream stays."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.mechanism_meshes import CONFIGS, mesh_of
from support.virtual_devices import run_module

from benchmarks.collectives import find_collectives
from moda_jax.config import MeshConfig
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.transformer import Transformer
from moda_jax.parallel.mesh import RULES, mesh_sizes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains the model of a name, once, and gives the directory of what came of it."""
    directory = tmp_path_factory.mktemp("mechanisms")

    @functools.cache
    def run(name):
        run_module("support.mechanism_meshes", directory, name)
        return directory

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_one_device(runs, name):
    directory = runs(name)
    ours, expected = np.load(directory / f"{name}.npz"), np.load(directory / f"one_{name}.npz")
    np.testing.assert_allclose(ours["losses"], expected["losses"], atol=1e-4, rtol=0)
    for leaf in expected.files:
        reference = expected[leaf].astype(np.float64)
        error = np.linalg.norm(ours[leaf][: len(reference)] - reference) / max(np.linalg.norm(reference), 1e-7)
        assert error < 1e-4, f"{leaf}: relative L2 error {error:.2e}"


def stream_sizes(config, sizes):
    """Elements of each buffer of the stream, whole and on one device."""
    model = config.model
    x = jnp.zeros((config.train.batch_size, config.data.sequence_length, model.width))
    mechanism = find_mechanism(model.depth)

    def begin():
        return Transformer(model, rngs=nnx.Rngs(0)).last_layer.depth.begin(model, x)[1].buffers

    for buffer, axes in zip(jax.eval_shape(begin), mechanism.stream_type.axes, strict=True):
        parts = [sizes[part] for axis in ("batch", "tokens", *axes) for part in RULES[axis]]
        yield buffer.size, buffer.size // math.prod(parts)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_collective_touches_the_stream(runs, name):
    mesh = mesh_of(name)
    sizes = mesh_sizes(MeshConfig(**mesh), math.prod(mesh.values()))
    found = find_collectives((runs(name) / f"{name}.hlo").read_text(), sizes)
    assert found
    forbidden = {size for pair in stream_sizes(CONFIGS[name], sizes) for size in pair}
    for collective in found:
        for _, dimensions in collective.arrays:
            assert math.prod(dimensions) not in forbidden, collective
