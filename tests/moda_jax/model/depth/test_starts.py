"""A mechanism whose source starts from the plain transformer does so; and bad fields of a mechanism are named."""

import functools

import jax
import numpy as np
import pytest
from support.mechanisms import assert_close, case_config, packed
from support.quick_compile import QUICK

from moda_jax.config import TransformerConfig
from moda_jax.depth_config import MECHANISMS
from moda_jax.model.function import model_function, split_model


@functools.cache
def fresh_logits(norm, depth, **fields):
    config = case_config("none", norm=norm, num_layers=2, depth=depth, **fields)
    model = model_function(config)

    def run(key):
        return model(split_model(config, key)[1], *packed())

    return jax.jit(run, compiler_options=QUICK)(jax.random.key(0))


@pytest.mark.slow
def test_value_residual_without_the_first_value_is_the_plain_transformer():
    config = {"first": 0.0, "own": 1.0, "learned": True}
    logits = fresh_logits.__wrapped__("post", "value_residual", value_residual=config)
    assert_close(logits, fresh_logits("post", "none"), 1e-6)
    assert not np.allclose(fresh_logits("post", "value_residual"), logits, atol=1e-3)  # as published, it is not


def test_hyper_connections_start_as_the_plain_transformer():
    """All streams are the residual stream; the final norm divides their sum by n, but for its epsilon."""
    assert_close(fresh_logits("pre", "hc"), fresh_logits("pre", "none"), 1e-4)


def test_hyper_connections_are_pre_norm_only():
    with pytest.raises(ValueError, match=r"model\.norm='post': expected 'pre' with model.depth='hc'"):
        split_model(case_config("none", depth="hc"), jax.random.key(0))


@pytest.mark.slow
def test_denseformer_starts_as_the_plain_transformer():
    assert_close(fresh_logits("pre", "denseformer"), fresh_logits("pre", "none"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"entry_bias": True},
        {"read": "top", "read_slots": 2},
        {"key": "writer_norm", "query_rotated": False},
        {"key": "reader_norm", "query_rotated": False},
    ],
    ids=str,
)
def test_what_is_learned_beside_moda_starts_as_moda(options):
    """Biases and scores are 0 and all norms alike; two rotations at one position are none."""
    logits = fresh_logits.__wrapped__("post", "moda", moda=options)
    assert_close(logits, fresh_logits("post", "moda"), 1e-5)


@pytest.mark.parametrize(
    ("depth", "path", "value"),
    [
        ("attnres", "attention_read.vector", 0.0), ("attnres", "ffn_read.scale", 1.0),
        ("attnres_block", "output_read.vector", 0.0), ("attnres_delta", "ffn_read.scale", 1.0),
        ("mhc", "attention_connection.gate", 0.01), ("mhc", "ffn_connection.offset", 0.0),
    ],
)  # fmt: skip
def test_parameters_start_as_published(depth, path, value):
    config = case_config("none", norm="pre", num_layers=1, depth=depth)
    found = jax.jit(lambda key: split_model(config, key)[1], compiler_options=QUICK)(jax.random.key(0))
    for name in ("last_layer", "depth", *path.split(".")):
        found = found[name]
    np.testing.assert_array_equal(found, np.float32(value))


def test_dynamic_dense_connections_start_as_the_plain_transformer():
    """The three norms before attention start as one."""
    assert_close(fresh_logits("pre", "mudd"), fresh_logits("pre", "none"), 1e-6)


@pytest.mark.parametrize("depth", [name for name in MECHANISMS if not name.startswith(("moda", "none", "value"))])
def test_the_norm_of_the_sum_is_for_a_residual_stream_alone(depth):
    with pytest.raises(ValueError, match=rf"model\.norm='post_sum': expected 'pre'( or 'post')? with .*='{depth}'"):
        split_model(case_config("none", depth=depth, norm="post_sum"), jax.random.key(0))


def test_depth_attention_needs_heads_that_make_up_the_width():
    with pytest.raises(ValueError, match=r"model.width=20: expected model.num_heads \* model.head_dim = 16 with"):
        split_model(case_config("none", depth="depth_attention", width=20), jax.random.key(0))


@pytest.mark.parametrize(
    ("depth", "fields", "message"),
    [
        ("value_residual", {"learned": 1}, r"model.value_residual.learned=1: expected a value of type bool"),
        ("value_residual", {"first": float("inf")}, r"model.value_residual.first=inf: expected a finite number"),
        ("hc", {"streams": 1}, r"model.hc.streams=1: expected at least 2 residual streams"),
        ("mhc", {"streams": 1}, r"model.mhc.streams=1: expected at least 2 residual streams"),
        ("attnres_delta", {"null_source": "yes"}, r"model.attnres_delta.null_source='yes': expected a value of type"),
    ],
)
def test_bad_fields_are_named(depth, fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({"depth": depth, depth: fields})
