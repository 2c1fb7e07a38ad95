"""Small models of every depth mechanism, for the contract suite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.quick_compile import QUICK

from moda_jax.config import TransformerConfig
from moda_jax.model.function import split_model

TINY = TransformerConfig(
    vocab_size=31, num_layers=4, width=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=24,
    max_sequence_length=32, dtype="float32", attention_implementation="xla", initializer_range=0.3,
)  # fmt: skip
# The fully tested mechanisms, each in the form that strains the loop most, and what else is run once.
FULL = {
    "moda": {"depth": "moda"},
    "attnres_block": {"depth": "attnres_block", "attnres_block": {"block_size": 3}, "norm": "pre"},
    "mhc": {"depth": "mhc", "norm": "pre"},
}
OTHERS = {
    "none": {"depth": "none"},
    "moda, projected": {"depth": "moda", "moda": {"attn_kv": True}, "norm": "pre"},
    "attnres_block of 1, post-norm": {"depth": "attnres_block", "attnres_block": {"block_size": 1}},
    "attnres_block of 2": {"depth": "attnres_block", "attnres_block": {"block_size": 2}, "norm": "pre"},
    "denseformer": {"depth": "denseformer"},
    "denseformer, dilated": {"depth": "denseformer", "denseformer": {"dilation": 2, "period": 2}, "norm": "pre"},
    "value_mixing": {"depth": "value_mixing", "value_mixing": {"stride": 2}},
    "value_mixing of all": {"depth": "value_mixing", "value_mixing": {"stride": 1}, "norm": "pre"},
    "attnres_block of 4": {"depth": "attnres_block", "attnres_block": {"block_size": 4}, "norm": "pre"},
}
# Their contract is slow.
FAMILY = {
    "value_residual": {"depth": "value_residual", "value_residual": {"learned": True}, "num_layers": 3},
    "attnres": {"depth": "attnres", "num_layers": 3},
    "attnres_delta": {"depth": "attnres_delta", "attnres_delta": {"null_source": True}, "num_layers": 3, "norm": "pre"},
    "attnres_delta, no null source": {"depth": "attnres_delta"},
    "hc": {"depth": "hc", "hc": {"streams": 3}, "num_layers": 3, "norm": "pre"},
    "hc of 4": {"depth": "hc", "norm": "pre"},
    # Without a residual stream large weights make gradients ill-conditioned, the independent model's too.
    "depth_attention": {"depth": "depth_attention", "num_layers": 3, "norm": "pre", "initializer_range": 0.02},
    "depth_attention, post-norm": {"depth": "depth_attention", "initializer_range": 0.02},
    # Here too: with weights of 0.3 the independent model is as far from its own result in float64 as ours.
    "mudd": {"depth": "mudd", "num_layers": 3, "norm": "pre", "initializer_range": 0.06},
    "mudd, post-norm": {"depth": "mudd", "num_layers": 3, "initializer_range": 0.1},
    "none, norm of the sum": {"depth": "none", "norm": "post_sum"},
    "moda, norm of the sum": {"depth": "moda", "norm": "post_sum"},
    "value_mixing, norm of the sum": {"depth": "value_mixing", "value_mixing": {"stride": 2}, "norm": "post_sum"},
    "value_residual, norm of the sum": {"depth": "value_residual", "norm": "post_sum"},
    "moda, window": {"depth": "moda", "moda": {"read": "window", "read_slots": 3, "null_slot": True}},
    "moda, window alone": {"depth": "moda", "norm": "pre", "moda": {"read": "window", "read_slots": 3}},
    "moda, chunk": {"depth": "moda", "moda": {"chunk": 3}},
    "moda, chunk and window": {"depth": "moda", "norm": "pre", "moda": {"chunk": 4, "read": "window", "read_slots": 3}},
    "moda, chunk and stride": {
        "depth": "moda",
        "moda": {"chunk": 8, "read": "stride", "read_stride": 2, "attn_kv": True, "key": "writer_norm"},
    },
    "moda, float8": {"depth": "moda", "moda": {"entry_dtype": "float8_e4m3fn"}},
    "moda, float8, chunk and window": {
        "depth": "moda",
        "num_layers": 3,
        "norm": "pre",
        "moda": {"entry_dtype": "float8_e4m3fn", "chunk": 4, "read": "window", "read_slots": 3, "attn_kv": True},
    },
    "moda, hybrid": {
        "depth": "moda",
        "norm": "pre",
        "moda": {"read": "hybrid", "read_slots": 3, "read_first": 1, "key": "reader_norm"},
    },
    "moda, top": {
        "depth": "moda",
        "moda": {"read": "top", "read_slots": 2, "key": "writer_norm", "query_rotated": False},
    },
    "moda, stride": {"depth": "moda", "norm": "pre", "moda": {"read": "stride", "read_stride": 2}},
    "moda, stride, biases": {
        "depth": "moda",
        "num_layers": 5,
        "moda": {"read": "stride", "read_stride": 2, "entry_bias": True, "null_slot": True, "key": "writer_norm"},
    },
    "moda, reader's norm": {
        "depth": "moda",
        "num_layers": 3,
        "moda": {"key": "reader_norm", "query_rotated": False, "attn_kv": True, "ffn_kv": False},
    },
    "moda, writer's norm": {"depth": "moda", "num_layers": 3, "moda": {"key": "writer_norm"}},
    "moda, separate": {"depth": "moda", "num_layers": 3, "moda": {"softmax": "separate"}, "norm": "post_sum"},
    "none, per-head norm": {"depth": "none", "qk_norm_per_head": True},
    "moda, per-head norm": {"depth": "moda", "num_layers": 3, "qk_norm_per_head": True},
    "moda, per-head norm of the writer": {
        "depth": "moda",
        "num_layers": 3,
        "norm": "pre",
        "qk_norm_per_head": True,
        "moda": {"key": "writer_norm"},
    },
    "moda, per-head norm of the reader": {
        "depth": "moda",
        "num_layers": 3,
        "norm": "post_sum",
        "qk_norm_per_head": True,
        "moda": {"key": "reader_norm"},
    },
    "value_residual, fixed": {"depth": "value_residual", "value_residual": {"first": 0.3}, "norm": "pre"},
}
CASES = FULL | OTHERS | FAMILY


def case_config(name, **fields):
    """The config of a case."""
    return TransformerConfig.from_dict(dataclasses.asdict(TINY) | CASES[name] | fields)


@functools.cache
def case_params(name):
    """Its parameters, perturbed: what starts as 0 or 1 would hide mistakes."""
    return perturbed(case_config(name))


MOST_LEAVES, LARGEST_LEAF = 64, 8192


@functools.partial(jax.jit, compiler_options=QUICK)
def _normal_values(key):
    """[MOST_LEAVES, LARGEST_LEAF]. A draw of fewer or smaller leaves has the first of these values: one program serves
    all models, where a draw of its own for each leaf of each model compiles for seconds."""
    return jax.vmap(lambda key: jax.random.normal(key, LARGEST_LEAF))(jax.random.split(key, MOST_LEAVES))


def with_noise(params, seed):
    """Parameters and 0.2 times normal values."""
    leaves, tree = jax.tree.flatten(params)
    noise = 0.2 * np.asarray(_normal_values(jax.random.key(seed)))
    noisy = [leaf + noise[i, : leaf.size].reshape(leaf.shape) for i, leaf in enumerate(map(np.asarray, leaves))]
    return jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in noisy])


def perturbed(config, seed=0):
    """Fresh parameters of a config with noise on all of them.

    Made one operation at a time: mechanisms share these, and each is compiled once.
    """
    return with_noise(split_model(config, jax.random.key(seed))[1], seed + 1)


def packed(seed=0, batch=2):
    """Tokens of three documents in a row: (tokens, segment_ids, positions), [B, 11]."""
    lengths = (3, 5, 3)
    tokens = np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, sum(lengths))).astype(np.int32)
    segment_ids = np.repeat([7, 0, 2], lengths).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    return tokens, *(jnp.asarray(np.broadcast_to(a, tokens.shape)) for a in (segment_ids, positions))


def relative_errors(got, expected):
    """Relative L2 error by the leaf's path; a leaf that is 0 in both has none."""
    return {
        jax.tree_util.keystr(path): float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6))
        for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    }


def assert_close(got, expected, tolerance):
    """Every leaf's relative L2 error is below the tolerance; the message names the worst."""
    errors = relative_errors(got, expected)
    name = max(errors, key=errors.get)
    assert errors[name] < tolerance, f"{name}: relative L2 error {errors[name]:.2e}, bound {tolerance:.0e}"
