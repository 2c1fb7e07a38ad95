"""The Hopper kernels under `shard_map`: lowered for CUDA on an abstract mesh of 8 devices; no device is needed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from moda_jax.config import OptimizerConfig, TrainConfig, TransformerConfig
from moda_jax.data.packing import Batch
from moda_jax.model.function import model_function, parameter_kinds
from moda_jax.parallel.mesh import AXES, named_sharding, on_mesh
from moda_jax.parallel.parameters import state_shardings
from moda_jax.tasks.language import LanguageObjective, language_params
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.schedule import learning_rate_schedule
from moda_jax.training.state import initial_state
from moda_jax.training.train_step import make_train_step
from pallas_kernels import dispatch, norm
from pallas_kernels.mosaic_gpu import warpgroup

MODEL = TransformerConfig(
    vocab_size=256, num_layers=4, width=256, num_heads=16, num_kv_heads=8, head_dim=64, ffn_width=256,
    max_sequence_length=1024, dtype="bfloat16", attention_implementation="mosaic_gpu", depth_gradient_group=2,
)  # fmt: skip
KERNELS = (
    "moda_depth_forward", "moda_sequence_forward", "moda_sequence_dq", "moda_sequence_dkv", "moda_depth_backward",
)  # fmt: skip
B, T = 8, 1024


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 4, 1, 1), id="data2_fsdp4", marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), id="fsdp2_tensor2_context2", marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 8), id="context8", marks=pytest.mark.slow),
    ],
)
def test_the_train_step_lowers_for_cuda(sizes, monkeypatch):
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))
    norm._best.cache_clear()
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)
    config = TrainConfig(batch_size=B, num_steps=10)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10, parameter_kinds(MODEL))
    schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=1), 10)
    step = make_train_step(LanguageObjective(model_function(MODEL)), optimizer, schedule, config)
    state = jax.eval_shape(functools.partial(initial_state, functools.partial(language_params, MODEL), optimizer, 0))
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state, state_shardings(mesh, state, parameter_kinds(MODEL)),
    )  # fmt: skip
    rows = named_sharding(mesh, "batch", "tokens")
    integers = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
    batch = Batch(*(integers,) * 4, jax.ShapeDtypeStruct((B, T), np.float32, sharding=rows))
    text = jax.jit(on_mesh(mesh, step)).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
    norm._best.cache_clear()
    rows = B * T // math.prod(sizes[axis] for axis in (0, 1, 3))
    norms = [f"moda_rms_norm_backward_R{rows}_D{columns}" for columns in ("256", "1024_H64", "512_H64")]
    if sizes[2] > 1:  # of heads that are split over `tensor` the norm is XLA's
        assert not any(name in text for name in norms[1:])
        norms = norms[:1]
    for kernel in (*KERNELS, *norms):
        assert text.count(kernel) >= 2, kernel  # in the stacked layers and in the last one
    for kernel in ("deferred", "slots"):  # of the layers of a group, and of all of them together
        assert f"moda_depth_backward_accumulate_{kernel}_T" in text
