"""Models of one seed that share a parameter start it from the same bits, whatever else they have: runs are paired."""

import functools

import jax
import numpy as np
import pytest
from support.quick_compile import QUICK

from moda_jax.config import TransformerConfig
from moda_jax.model.function import split_model

BASE = {
    "vocab_size": 40, "num_layers": 3, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_width": 48,
    "depth": "none",
}  # fmt: skip


@functools.cache
def initial(**changes):
    config = TransformerConfig(**BASE | changes)
    params = jax.jit(lambda key: split_model(config, key)[1], compiler_options=QUICK)(jax.random.key(0))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize(
    ("changes", "extra", "resized"),
    [
        pytest.param({"depth": "moda", "depth_ffn_kv": False}, 0, 0, marks=pytest.mark.slow),
        ({"depth": "moda", "depth_ffn_kv": True, "depth_attn_kv": True}, 2, 0),
        pytest.param({"ffn_width": 56}, 0, 6, marks=pytest.mark.slow),
        ({"norm": "pre"}, 0, 0),
    ],
    ids=["depth", "projections", "wide", "pre"],
)
def test_shared_parameters_start_alike(changes, extra, resized):
    plain, other = initial(), initial(**changes)
    assert set(plain) <= set(other) and len(other) - len(plain) == extra
    different = [name for name, value in plain.items() if value.shape != other[name].shape]
    assert len(different) == resized and all("ffn" in name for name in different)
    for name in set(plain) - set(different):
        np.testing.assert_array_equal(plain[name], other[name], err_msg=name)
