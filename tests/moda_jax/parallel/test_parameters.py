"""Logical axes of parameters and optimizer state, the vocabulary's padding, divisibility."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from moda_jax.config import OptimizerConfig, TransformerConfig
from moda_jax.model.function import parameter_kinds
from moda_jax.parallel import parameters
from moda_jax.parallel.mesh import AXES
from moda_jax.tasks.language import language_params
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.state import initial_state

MODEL = TransformerConfig(
    vocab_size=100278, num_layers=3, width=64, num_heads=8, num_kv_heads=4, head_dim=8, ffn_width=96,
    depth_attn_kv=True, tie_embeddings=False,
)  # fmt: skip


KINDS = parameter_kinds(MODEL)


@pytest.fixture(scope="module")
def state():
    """With every kind of parameter that a model can have."""
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10, KINDS)
    return jax.eval_shape(functools.partial(initial_state, functools.partial(language_params, MODEL), optimizer, 0))


def test_every_leaf_of_the_state_has_a_sharding(state):
    mesh = AbstractMesh((2, 4, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    shardings = parameters.state_shardings(mesh, state, KINDS)
    specs = shardings.params
    assert specs["embedding"]["table"].spec == PartitionSpec("tensor", "fsdp")
    assert specs["head"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    layers = specs["layers"]
    assert layers["attention"]["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["attention"]["output"]["kernel"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert layers["attention"]["key_norm"]["scale"].spec == PartitionSpec(None, "tensor")
    assert layers["depth"]["attention_kv"]["kernel"].spec == PartitionSpec(None, "fsdp", None, "tensor", None)
    assert specs["last_layer"]["ffn"]["down"]["kernel"].spec == PartitionSpec("tensor", "fsdp")
    adam = shardings.optimizer_state[1]
    assert adam.mu == adam.nu == specs
    assert adam.count.spec == shardings.step.spec == shardings.key.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 8}, "mesh.tensor=8: does not divide axis kv_heads (model.num_kv_heads) of size 4 of parameter"),
        ({"fsdp": 5}, "mesh.fsdp=5: does not divide axis width (model.width) of size 64 of parameter embedding.table"),
        ({"tensor": 5}, "mesh.tensor=5: does not divide axis vocabulary of size 100608 of parameter embedding.table"),
    ],
)
def test_what_does_not_divide_is_named(state, sizes, message):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes
    with pytest.raises(ValueError, match=re.escape(message)):
        parameters.check_divisible(sizes, state.params, KINDS)


def test_the_vocabulary_is_padded_with_zeros_and_cut_again():
    assert [parameters.padded_vocabulary(size) for size in (1, 257, 384, 385, 50304, 100278)] == [
        384, 384, 384, 768, 50304, 100608,
    ]  # fmt: skip
    random = np.random.default_rng(0)
    tree = {
        "embedding": {"table": jnp.float32(random.normal(size=(5, 4)))},
        "head": {"kernel": jnp.float32(random.normal(size=(4, 5)))},
        "final_norm": {"scale": jnp.ones(4)},
    }
    padded = parameters.pad_vocabulary(tree, KINDS, 8)
    assert padded["embedding"]["table"].shape == (8, 4) and padded["head"]["kernel"].shape == (4, 8)
    assert not np.any(padded["embedding"]["table"][5:]) and not np.any(padded["head"]["kernel"][:, 5:])
    jax.tree.map(np.testing.assert_array_equal, parameters.pad_vocabulary(padded, KINDS, 5), tree)
