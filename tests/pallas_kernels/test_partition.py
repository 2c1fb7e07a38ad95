"""Kernels on a mesh of the caller's: each device runs on its own rows, KV heads and tokens, and nothing else moves."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from support.callers_mesh import CASES, MANY_SLOTS, MANY_TOKENS, B, H, K, S, T
from support.tolerances import FLOAT32
from support.virtual_devices import run_module

from pallas_kernels import biased_gelu, block, depth_attention, dispatch, layer_norm, moda_attention, norm
from pallas_kernels.mosaic_gpu import warpgroup
from pallas_kernels.operands import Call, DepthKV, Upstream
from pallas_kernels.partition import Rule, partitioned

P = PartitionSpec
MESH = AbstractMesh((2, 4, 2), ("rows", "heads", "tokens"), axis_types=(AxisType.Explicit,) * 3)
QUERY, KEY = ("batch", "tokens", "kv_heads group", "head_dim"), ("batch", "keys", "kv_heads", "head_dim")
RULE = Rule((QUERY, KEY), (QUERY,), frozenset({"group", "keys", "head_dim"}), (("group", 2),))
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def array(*shape, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def axes(query, key, kv_heads=4, tokens=16):
    return RULE.axes(MESH, [array(4, tokens, 2 * kv_heads, 8), array(4, 16, kv_heads, 8)], [query, key])


def test_what_may_be_split_stays_split():
    found = axes(P("rows", "tokens", "heads", None), P("rows", "tokens", "heads", None))
    assert found == {"batch": ("rows",), "tokens": ("tokens",), "kv_heads": ("heads",)}
    assert RULE.spec(QUERY, found) == P(("rows",), ("tokens",), ("heads",), None)
    assert RULE.spec(KEY, found) == P(("rows",), None, ("heads",), None)


def test_an_operand_that_lies_whole_follows_the_others():
    assert axes(P(), P(("rows", "tokens"))) == {"batch": ("rows", "tokens")}


def test_heads_are_split_by_axes_that_divide_the_kv_heads():
    assert axes(P(None, None, ("tokens", "heads")), P(), kv_heads=2) == {"kv_heads": ("tokens",)}
    assert axes(P(None, None, "heads"), P(), kv_heads=2) == {}


def test_an_axis_splits_one_dimension():
    assert axes(P("heads"), P(None, None, "heads")) == {"batch": ("heads",)}


def test_tokens_that_do_not_divide_are_taken_whole():
    assert axes(P(None, "tokens"), P(), tokens=15) == {}


def test_on_one_device_the_function_gets_all():
    seen = []
    result = partitioned(
        lambda axes, x: seen.append(axes) or (x + 1,), Rule((("n",),), (("n",),), frozenset()), [jnp.arange(3)]
    )
    assert seen == [{}]
    np.testing.assert_array_equal(result[0], [1, 2, 3])


def test_a_name_that_no_dimension_has_alone_has_a_size():
    rule = RULE.mapped("mapped0", (True, False)).for_shardy()
    assert rule.operand_mappings[0][0] == "mapped0"
    assert rule.operand_mappings[1][0] == "batch"
    assert rule.factor_sizes == {"group": 2}
    assert set(rule.need_replication_factors) == {"group", "keys", "head_dim"}


@pytest.fixture
def for_the_chip(monkeypatch):
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    monkeypatch.setattr(dispatch, "preferred", lambda: ("mosaic_gpu",))
    for module in (norm, layer_norm, biased_gelu):
        module._best.cache_clear()
    yield
    for module in (norm, layer_norm, biased_gelu):
        module._best.cache_clear()


def lower(function, shapes, specs, dtypes=None):
    """For CUDA, on a mesh with explicit axes, which needs no device."""
    dtypes = [jnp.bfloat16] * len(shapes) if dtypes is None else dtypes
    operands = [
        array(*shape, dtype=dtype, sharding=NamedSharding(MESH, spec))
        for shape, spec, dtype in zip(shapes, specs, dtypes, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def moved(text):
    """Sizes of what collectives give, in StableHLO."""
    found = re.findall(r"stablehlo\.(?:all_gather|all_reduce|all_to_all|collective_permute|reduce_scatter)", text)
    return len(found)


def test_the_kernels_lower_for_a_part_under_explicit_axes(for_the_chip):
    """Rows and heads: T = 136 tokens of 2 of 4 rows and 1 of 4 KV heads each, and no collective."""
    heads, depth = P("rows", None, "heads"), P("rows", None, None, "heads")

    def gradients(*arrays):
        def loss(*arrays):
            return jnp.sum(moda_attention(*arrays, implementation="mosaic_gpu").astype(jnp.float32))

        return jax.grad(loss, argnums=range(5))(*arrays)

    shapes = [(4, 136, 8, 64), (4, 136, 4, 64), (4, 136, 4, 64), (4, 136, 5, 4, 64), (4, 136, 5, 4, 64)]
    text = lower(gradients, shapes, [heads] * 3 + [depth] * 2)
    for kernel in ("moda_sequence_forward", "moda_sequence_dq", "moda_sequence_dkv"):
        assert f"{kernel}_T136_U136_N2_K1_H64" in text
    for kernel in ("moda_depth_forward", "moda_depth_backward"):
        assert f"{kernel}_T272_S5_N2_K1_H64" in text
    assert moved(text) == 0


def test_depth_attention_lowers_for_a_device_s_own_tokens(for_the_chip):
    tokens = P("rows", "tokens")
    shapes = [(4, 144, 8, 64), (4, 144, 5, 4, 64), (4, 144, 5, 4, 64)]

    def gradients(*arrays):
        def loss(*arrays):
            return jnp.sum(depth_attention(*arrays, implementation="mosaic_gpu").astype(jnp.float32))

        return jax.grad(loss, argnums=range(3))(*arrays)

    text = lower(gradients, shapes, [tokens] * 3)
    assert "moda_depth_forward_T144_S5_N8_K4_H64" in text
    assert "moda_depth_backward_T144_S5_N8_K4_H64" in text
    assert moved(text) == 0


def test_deferred_gradients_lower_for_a_device_s_own_heads(for_the_chip):
    """A call that defers, and the pass that gives no query's gradient."""
    heads, depth = P("rows", None, "heads"), P("rows", None, None, "heads")

    def gradients(query, dout, rows, key, value, *buffers):
        upstream = Upstream(dout, rows, rows)
        slots = DepthKV(key, value, length=5, deferred=3)
        run = functools.partial(block.backward, implementation="mosaic_gpu")
        first = run(Call(query, depth=slots), upstream, buffers=buffers)
        call = Call(query, depth=dataclasses.replace(slots, length=3, deferred=None), query_gradient=False)
        return first, run(call, upstream, buffers=first[3:])

    shapes = [(4, 136, 8, 64), (4, 136, 8, 64), (4, 136, 8), *[(4, 136, 5, 4, 64)] * 4]
    dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 4]
    text = lower(gradients, shapes, [heads] * 3 + [depth] * 4, dtypes)
    for kernel in ("deferred", "slots"):
        assert f"moda_depth_backward_accumulate_{kernel}_T272_S5_N2_K1_H64" in text
    assert moved(text) == 0


@pytest.mark.parametrize(("spec", "kernels", "sums"), [(P("rows", "tokens"), 1, 1), (P(None, None, "heads"), 0, 2)])
def test_the_norms_kernel_runs_on_whole_rows(for_the_chip, spec, kernels, sums):
    """Split rows: dscale is summed over devices. Rows that are cut: so are the means, and XLA's formula is used."""
    shapes = [(4, 16, 8, 64), (4, 16, 8, 64), (8, 64), (4, 16, 32), (4, 16, 32)]
    specs = [spec, spec, P(*tuple(spec)[2:]), P(*tuple(spec)[:2]), P(*tuple(spec)[:2])]

    def run(x, dy, scale, cos, sin):
        return norm.rms_norm_backward(x, dy, scale, (cos, sin), epsilon=1e-6)

    text = lower(run, shapes, specs, [jnp.bfloat16] * 2 + [jnp.float32] * 3)
    assert ("moda_rms_norm_backward_R16_D512_H64" in text) == bool(kernels)
    assert moved(text) == sums


@pytest.mark.parametrize(("spec", "kernels", "sums"), [(P("rows", "tokens"), 2, 2), (P(None, None, "heads"), 0, 4)])
def test_layer_norm_s_kernels_run_on_whole_rows(for_the_chip, spec, kernels, sums, monkeypatch):
    """As RMSNorm's; of rows that are cut forward and backward take two means each."""
    layer_norm._best.cache_clear()
    shapes = [(4, 16, 256), (4, 16, 256), (256,), (256,)]

    def run(x, dy, scale, bias):
        y = layer_norm.layer_norm(x, scale, bias, epsilon=1e-6)
        return y, layer_norm.layer_norm_backward(x, dy, scale, epsilon=1e-6)

    text = lower(run, shapes, [spec, spec, *[P(*tuple(spec)[2:])] * 2], [jnp.bfloat16] * 2 + [jnp.float32] * 2)
    names = ("moda_layer_norm_R16_D256", "moda_layer_norm_backward_R16_D256")
    assert sum(name in text for name in names) == kernels
    assert moved(text) >= sums


@pytest.mark.parametrize(("spec", "shape"), [(P("rows", "tokens"), "R16_D256"), (P("rows", None, "heads"), "R32_D64")])
def test_gelu_s_kernel_runs_on_rows_and_columns(for_the_chip, spec, shape, monkeypatch):
    biased_gelu._best.cache_clear()

    def run(x, bias, dy):
        return biased_gelu.biased_gelu_backward(x, bias, dy)

    columns = P(*tuple(spec)[2:])
    dtypes = [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    text = lower(run, [(4, 16, 256), (256,), (4, 16, 256)], [spec, columns, spec], dtypes)
    assert f"moda_gelu_backward_{shape}" in text
    assert moved(text) == 1  # the bias' gradient


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("callers_mesh")
    run_module("support.callers_mesh", directory)
    return directory


def gathered(program):
    """Elements of every array that a collective gives, in a compiled program."""
    for line in program.splitlines():
        match = re.search(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", line)
        if match:
            for dimensions in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                yield int(np.prod([int(size) for size in dimensions.split(",") if size]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_operands_moves_but_keys_that_other_tokens_see(directory, name):
    largest = max(gathered((directory / f"{name}.hlo").read_text()), default=0)
    if name.endswith(("tokens", "documents")):  # keys and values of a device's rows and heads, and the segment ids
        assert largest == B * T * K * H // 4
    else:
        assert largest <= 2  # the value, under vmap of two


@pytest.mark.slow
def test_without_the_rule_every_device_gets_all(directory):
    assert max(gathered((directory / "without_rule.hlo").read_text())) == B * T * S * K * H


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_device(directory, name):
    values = np.load(directory / "values.npz")
    names = [key for key in values.files if key.startswith(f"{name}.")]
    assert names
    for key in names:
        expected = values[f"one_{key}"].astype(np.float64)
        error = np.linalg.norm(values[key] - expected) / max(np.linalg.norm(expected), 1e-30)
        assert error < FLOAT32, f"{key}: relative L2 error {error:.2e}"


@pytest.mark.slow
def test_gradient_buffers_are_not_copied(directory):
    """The accumulating loop's temporaries are less than a device's part of one."""
    temporaries = json.loads((directory / "found.json").read_text())["large_buffers"]
    assert temporaries < 4 * B * MANY_TOKENS * MANY_SLOTS * K * H // 4
