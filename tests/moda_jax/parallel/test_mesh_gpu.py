"""Two GPUs train as one does: `python -m pytest -m gpu tests/moda_jax/parallel/test_mesh_gpu.py`."""

import dataclasses

import jax
import numpy as np
import pytest
from support.mesh_training import CONFIG, STEPS, build, on_mesh, packed_batch

from moda_jax.config import DataConfig, TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.device_count() < 2, reason=f"needs 2 GPUs, got {jax.device_count()} device(s)"),
]

MESHES = {"data2": {"data": 2}, "fsdp2": {"data": 1, "fsdp": 2}, "tensor2": {"data": 1, "tensor": 2},
          "context2": {"data": 1, "context": 2}}  # fmt: skip
# Losses' largest difference over 20 steps, and relative L2 error of the first gradients. In bfloat16 both runs differ
# from float32 by its rounding, which is 2^-9 for each of some operations in a row.
TOLERANCES = {"float32": (1e-4, 1e-5), "bfloat16": (2e-2, 5e-2)}


def config(dtype, depth):
    """float32: the XLA implementation. bfloat16: the best one for the device, which is the kernels on Hopper."""
    model = TransformerConfig(
        depth=depth,
        vocab_size=259, num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_width=512,
        max_sequence_length=512, dtype=dtype, attention_implementation="xla" if dtype == "float32" else None,
    )  # fmt: skip
    return dataclasses.replace(CONFIG, model=model, data=DataConfig(sequence_length=512))


def train(config, mesh=None):
    devices = jax.devices()[:2]
    placed = on_mesh(config, mesh) if mesh else config
    # Trying out algorithms for every matrix product takes most of a minute per program, and the values do not need it.
    options = {"xla_gpu_autotune_level": 0}
    initialize, step, program = build(placed, one_device=mesh is None, devices=devices, options=options)
    state, losses = initialize(), []
    for number in range(STEPS):
        state, metrics = step(state, program.distribution.place(packed_batch(config, number)), program.plan)
        losses.append(float(metrics.loss))
        if number == 0:
            moments = jax.tree.leaves_with_path(state.optimizer_state[1].mu)
            gradients = {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in moments}
    return np.array(losses), gradients


@pytest.fixture(
    scope="module", params=[("float32", "moda"), ("bfloat16", "moda"), ("bfloat16", "attnres")], ids="-".join
)
def one(request):
    return request.param, train(config(*request.param))


@pytest.mark.parametrize("name", MESHES)
def test_two_devices_train_as_one(one, name):
    (dtype, depth), (expected_losses, expected) = one
    loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
    losses, gradients = train(config(dtype, depth), MESHES[name])
    np.testing.assert_allclose(losses, expected_losses, atol=loss_tolerance, rtol=0)
    for key, reference in expected.items():
        gradient = gradients[key][: reference.shape[0]]
        error, size = np.linalg.norm(gradient - reference), np.linalg.norm(reference)
        # A read that weighs all slots alike at first leaves its norm's scale without a gradient: 0 on both sides.
        assert error <= gradient_tolerance * size, f"{key}: L2 error {error:.2e} of {size:.2e}"
