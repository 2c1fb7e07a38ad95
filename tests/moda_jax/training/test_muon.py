"""Muon against plain NumPy in float64, which parameters it takes, and what its state is."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.mechanisms import case_config
from support.quick_compile import QUICK
from support.virtual_devices import run_module

from moda_jax.config import CheckpointConfig, MuonConfig, OptimizerConfig, TransformerConfig
from moda_jax.model.function import parameter_kinds
from moda_jax.parallel import parameters
from moda_jax.parallel.mesh import AXES
from moda_jax.parameter import ParameterKind, ParameterKinds
from moda_jax.tasks.language import language_params
from moda_jax.training.checkpoint import Checkpoints
from moda_jax.training.muon import is_matrix
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.state import initial_state

TINY = TransformerConfig(
    vocab_size=20, num_layers=3, width=16, num_heads=2, num_kv_heads=1, head_dim=8, ffn_width=24, depth_attn_kv=True,
    tie_embeddings=False,
)  # fmt: skip
STEPS = 3
# Of every way in which a kernel can be a matrix: its axes, its shape, and how to see it as [matrices, inputs, outputs].
KERNELS = {
    "up.kernel": (("width", "ffn"), (2, 6, 10), lambda x: x),
    "query.kernel": (("width", "heads", "head_dim"), (2, 6, 2, 4), lambda x: x.reshape(2, 6, 8)),
    "output.kernel": (("heads", "head_dim", "width"), (2, 4, 6), lambda x: x.reshape(1, 8, 6)),
    "pair.kernel": (
        ("width", "pair", "kv_heads", "head_dim"), (2, 6, 2, 1, 4),
        lambda x: x.transpose(0, 2, 1, 3, 4).reshape(4, 6, 4),
    ),
}  # fmt: skip
KINDS = ParameterKinds(
    (
        *((name, ParameterKind(axes, decays=True, is_cast=True)) for name, (axes, _, _) in KERNELS.items()),
        ("table.kernel", ParameterKind(("vocabulary", "width"))),
        ("head.kernel", ParameterKind(("width", "vocabulary"), decays=True)),
    )
)
CONFIG = OptimizerConfig(
    name="muon", learning_rate=0.1, warmup_steps=2, weight_decay=0.3, gradient_clip_norm=1e9,
    muon=MuonConfig(learning_rate=0.02, weight_decay=0.5, momentum=0.9),
)  # fmt: skip


def orthogonal(matrix, rounds=5):
    """Newton and Schulz's iteration with the quintic of Muon's author."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.sqrt(np.sum(x * x))
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def factor(update_rms, inputs, outputs):
    return math.sqrt(max(1, outputs / inputs)) if update_rms is None else update_rms * math.sqrt(max(inputs, outputs))


def nested(flat):
    return {name.split(".")[0]: {"kernel": value} for name, value in flat.items()}


@pytest.fixture(scope="module")
def gradients():
    random = np.random.default_rng(0)
    shapes = {name: shape for name, (_, shape, _) in KERNELS.items()} | {"table.kernel": (5, 6), "head.kernel": (6, 5)}
    return [{name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(STEPS + 1)]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def step(config, gradient, state, params):
    updates, state = make_optimizer(config, 10, KINDS).update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state


@pytest.mark.parametrize("update_rms", [0.2, None])
def test_updates_equal_a_float64_muon_and_adamw(gradients, update_rms):
    config = dataclasses.replace(CONFIG, muon=dataclasses.replace(CONFIG.muon, update_rms=update_rms))
    start, gradients = gradients[0], gradients[1:]
    params = jax.tree.map(jnp.float32, nested(start))
    state = make_optimizer(config, 10, KINDS).init(params)
    expected, momentum = dict(start), {name: np.zeros(value.shape) for name, value in start.items()}
    second = {name: np.zeros(value.shape) for name, value in start.items()}
    for n, gradient in enumerate(gradients, 1):
        share = n / 2 if n < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (n - 2) / 8)) / 2
        for name, g in gradient.items():
            if name in KERNELS:
                matrices = KERNELS[name][2]
                m = momentum[name] = 0.9 * momentum[name] + 0.1 * g
                ahead = 0.9 * m / (1 - 0.9 ** (n + 1)) + 0.1 * g / (1 - 0.9**n)
                stack = np.stack([orthogonal(matrix) for matrix in matrices(ahead)])
                new = -0.02 * share * (stack * factor(update_rms, *stack.shape[1:]) + 0.5 * matrices(expected[name]))
                expected[name] = back(name, matrices(expected[name]) + new)
            else:
                m = momentum[name] = 0.9 * momentum[name] + 0.1 * g
                v = second[name] = 0.95 * second[name] + 0.05 * g**2
                u = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8)
                decay = 0.3 if name == "head.kernel" else 0.0  # the embedding does not decay
                expected[name] = expected[name] - 0.1 * share * (u + decay * expected[name])
        params, state = step(config, jax.tree.map(jnp.float32, nested(gradient)), state, params)
        for name, value in expected.items():
            ours = params[name.split(".")[0]]["kernel"]
            np.testing.assert_allclose(ours, value, rtol=2e-5, atol=2e-6, err_msg=f"{name}, step {n}")


def back(name, matrices):
    """Stacked matrices as the kernel that they are of."""
    _, shape, _ = KERNELS[name]
    if name == "pair.kernel":
        return matrices.reshape(2, 2, 6, 1, 4).transpose(0, 2, 1, 3, 4)
    return matrices.reshape(shape)


def test_all_singular_values_of_an_update_come_near_one(gradients):
    config = dataclasses.replace(CONFIG, muon=MuonConfig(update_rms=None, weight_decay=0.0), warmup_steps=0)
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape), nested(gradients[0]))
    params, _ = step(
        config, jax.tree.map(jnp.float32, nested(gradients[0])), make_optimizer(config, 10, KINDS).init(zeros), zeros
    )
    for name, (_, _, matrices) in KERNELS.items():
        for matrix in matrices(np.asarray(params[name.split(".")[0]]["kernel"]) / 0.1):
            values = np.linalg.svd(matrix / factor(None, *matrix.shape), compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, f"{name}: {values}"


@pytest.mark.parametrize("name", ["moda, projected", "depth_attention", "mhc", "hc", "mudd", "attnres"])
def test_it_takes_the_matrices_between_activations(name):
    kinds = dict(parameter_kinds(case_config(name, tie_embeddings=False)).entries)
    taken = {parameter for parameter, kind in kinds.items() if is_matrix(kind)}
    projections = ("query", "key", "value", "output", "gate", "up", "down")
    added = {"moda, projected": ("ffn_kv", "attention_kv"), "depth_attention": ("depth_query", "depth_kv")}
    sides = projections + added.get(name, ())
    assert taken == {p for p in kinds if p.endswith(".kernel") and p.split(".")[-2] in sides}
    assert {side for side in sides if any(f".{side}." in p for p in taken)} >= set(projections)


@pytest.fixture(scope="module")
def abstract_state():
    optimizer = make_optimizer(OptimizerConfig(name="muon", warmup_steps=1), 10, parameter_kinds(TINY))
    return jax.eval_shape(functools.partial(initial_state, functools.partial(language_params, TINY), optimizer, 0))


def test_its_state_is_one_momentum_and_is_split_as_the_parameters_are(abstract_state):
    kinds = parameter_kinds(TINY)
    mesh = AbstractMesh((2, 4, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    shardings = parameters.state_shardings(mesh, abstract_state, kinds)
    inner = shardings.optimizer_state[1].inner_states
    momentum, adam = inner["muon"].inner_state[0], inner["adamw"].inner_state[0]
    specs = shardings.params
    assert momentum.count.spec == PartitionSpec()
    assert momentum.mu["layers"]["ffn"] == specs["layers"]["ffn"]
    assert momentum.mu["layers"]["attention"]["query"] == specs["layers"]["attention"]["query"]
    assert adam.mu["embedding"] == adam.nu["embedding"] == specs["embedding"]
    assert len(jax.tree.leaves((momentum.mu, adam.mu))) == len(jax.tree.leaves(specs))


def test_a_saved_state_goes_on_bit_for_bit(gradients, tmp_path):
    params = jax.tree.map(jnp.float32, nested(gradients[0]))
    state = make_optimizer(CONFIG, 10, KINDS).init(params)
    first, second = (jax.tree.map(jnp.float32, nested(gradient)) for gradient in gradients[1:3])
    params, state = step(CONFIG, first, state, params)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, {"params": params, "state": state}, {"step": 1})
    assert checkpoints.wait()
    restored, _ = checkpoints.restore(1, jax.eval_shape(lambda: {"params": params, "state": state}))
    checkpoints.close()
    straight = step(CONFIG, second, state, params)
    resumed = step(CONFIG, second, restored["state"], restored["params"])
    assert jax.tree.structure(straight) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@pytest.mark.slow
def test_steps_on_a_mesh_are_those_of_one_device(tmp_path):
    run_module("support.muon_mesh", tmp_path, devices=4)
    ours, expected = np.load(tmp_path / "mesh.npz"), np.load(tmp_path / "one.npz")
    assert len(expected["losses"]) == 4 and expected["losses"][-1] < expected["losses"][0]
    np.testing.assert_allclose(ours["losses"], expected["losses"], atol=1e-4, rtol=0)
    for name in expected:
        if name != "losses":
            reference = expected[name].astype(np.float64)
            error = np.linalg.norm(ours[name] - reference) / np.linalg.norm(reference)
            print(f"{name}: {error:.1e}")
            assert error < 2e-5, f"{name}: relative L2 error {error:.2e}"
    shards = json.loads((tmp_path / "shards.json").read_text())
    assert len(shards) == 15  # seven of a stack and of the last layer each, and the stack's depth entries
    for name, (here, everywhere) in shards.items():
        assert here * 4 == everywhere, name
