"""The kernels on a mesh of two GPUs: `python -m pytest -m gpu tests/pallas_kernels/test_partition_gpu.py`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import block, depth_attention, moda_attention, norm
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.device_count() < 2, reason=f"needs 2 GPUs, got {jax.device_count()} device(s)"),
]

P = PartitionSpec
B, T, S, K, G, H = 2, 512, 20, 4, 4, 64
LAYOUTS = {
    "rows": (P("a"),) * 5,
    "heads": (*(P(None, None, "a"),) * 3, *(P(None, None, None, "a"),) * 2),
    "tokens": (P(None, "a"),) * 5,
}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def draw():
    heads, keys, depth = (B, T, K * G, H), (B, T, K, H), (B, T, S, K, H)
    seeds = jax.random.split(jax.random.key(0), 5)
    return [
        jax.random.normal(seed, shape, jnp.bfloat16)
        for seed, shape in zip(seeds, (heads, keys, keys, depth, depth), strict=True)
    ]


def moda(*arrays):
    return moda_attention(*arrays, depth_length=jnp.int32(13), return_lse=True)


def depth(query, key, value, depth_key, depth_value):
    del key, value
    return depth_attention(query, depth_key, depth_value, depth_length=jnp.int32(13), return_lse=True)


def gradients(op, *arrays):
    """(out, lse, five gradients)."""
    results, pullback = jax.vjp(op, *arrays)
    return (*results, *pullback((jnp.cos(results[0]), jnp.sin(results[1]))))


def accumulated(*arrays):
    """What several layers' slots add up to, in buffers that a reverse scan carries."""
    query, key, value, depth_key, depth_value = arrays
    part = moda(*arrays)

    def layer(buffers, length):
        call = Call(query, key, value, Mask(True), DepthKV(depth_key, depth_value, length=length), H**-0.5)
        upstream = Upstream(query, part[1], jnp.zeros_like(part[1]))
        *gradients, dk, dv = block.backward(call, upstream, buffers=buffers)
        return (dk, dv), gradients[0]

    return jax.lax.scan(layer, (depth_key, depth_value), jnp.arange(4, 0, -1))


def on_two(function, kind, specs, arrays):
    """(results, compiled program) on two GPUs."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,), devices=jax.devices()[:2])
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*placed).compile()
        return compiled(*placed), compiled


def moved(program):
    """Elements of every array that a collective gives."""
    return [
        int(np.prod([int(size) for size in dimensions.split(",") if size]))
        for line in program.splitlines()
        if (match := re.search(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", line))
        for dimensions in re.findall(r"\w+\[([\d,]*)\]", match[1])
    ]


def assert_close(found, expected, bound=1e-2):
    """Relative L2: the same kernels on parts; sums over devices and merged blocks round differently."""
    for i, (mine, other) in enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)):
        mine, other = (np.asarray(x, np.float64) for x in (mine, other))
        error = np.linalg.norm(mine - other) / np.linalg.norm(other)
        assert error < bound, f"result {i}: relative L2 error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_op_and_its_gradients(layout, kind):
    arrays = draw()
    found, compiled = on_two(functools.partial(gradients, moda), KINDS[kind], LAYOUTS[layout], arrays)
    assert_close(found, jax.jit(functools.partial(gradients, moda))(*arrays))
    largest = max(moved(compiled.as_text()), default=0)  # XLA may sum the keys' and the values' gradients as one array
    assert largest <= (2 * B * T * K * H if layout == "tokens" else 0)  # queries have twice as many


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_depth_part_moves_nothing(layout, kind):
    arrays = draw()
    found, compiled = on_two(functools.partial(gradients, depth), KINDS[kind], LAYOUTS[layout], arrays)
    assert_close(
        [found[i] for i in (0, 1, 2, 5, 6)],
        [jax.jit(functools.partial(gradients, depth))(*arrays)[i] for i in (0, 1, 2, 5, 6)],
    )
    assert moved(compiled.as_text()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_buffers_are_added_to_in_place(kind):
    arrays = draw()
    found, compiled = on_two(accumulated, KINDS[kind], LAYOUTS["heads"], arrays)
    assert_close(found, jax.jit(accumulated)(*arrays))
    assert moved(compiled.as_text()) == []
    buffers = 2 * B * T * S * K * H * 2 // 2  # bytes of a device's part of both
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * buffers  # one pair beyond the caller's: not donated


@pytest.mark.parametrize("layout", ["rows", "heads"])
def test_the_norm_s_backward(layout):
    heads = 16
    seeds = jax.random.split(jax.random.key(1), 4)
    x, dy = (jax.random.normal(seed, (B, T, heads, H), jnp.bfloat16) for seed in seeds[:2])
    angles = jax.random.normal(seeds[2], (B, T, H // 2))
    arrays = [x, dy, jax.random.normal(seeds[3], (heads, H)), jnp.cos(angles), jnp.sin(angles)]

    def run(x, dy, scale, cos, sin):
        return norm.rms_norm_backward(x, dy, scale, (cos, sin), epsilon=1e-6, implementation="mosaic_gpu")

    split = P("a") if layout == "rows" else P(None, None, "a")
    table, scale = (P("a"), P()) if layout == "rows" else (P(), P("a"))
    found, compiled = on_two(run, AxisType.Auto, [split, split, scale, table, table], arrays)
    assert_close(found, jax.jit(run)(*arrays))
    assert max(moved(compiled.as_text())) <= 2 * B * T  # dscale, or two sums of every row
