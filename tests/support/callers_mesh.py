"""The op as a kernel on a mesh of the caller's, 8 virtual devices: `python -m support.callers_mesh DIRECTORY`.

The kernel is `support.opaque_attention`, under the name of another. Of every case: the compiled program (`NAME.hlo`),
the bytes of its temporaries (`found.json`), and what it gives beside what one device gives (`values.npz`).
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.quick_compile import QUICK

from pallas_kernels import block, depth_attention, dispatch, moda_attention
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream

P = PartitionSpec
B, T, S, K, G, H = 4, 16, 6, 4, 2, 8
MANY_TOKENS, MANY_SLOTS = 512, 64  # of which the buffers are by far the largest arrays
NAMES = ("query", "key", "value", "depth_key", "depth_value")
ROWS_HEADS = (*(P("rows", None, "heads"),) * 3, *(P("rows", None, None, "heads"),) * 2)
TOKENS = (*(P("rows", "tokens", "heads"),) * 3, *(P("rows", "tokens", None, "heads"),) * 2)
KERNEL = "mosaic_gpu"


def draw(tokens=T, slots=S):
    heads, keys, depth = (B, tokens, K * G, H), (B, tokens, K, H), (B, tokens, slots, K, H)
    seeds = jax.random.split(jax.random.key(0), 5)
    return [
        jax.random.normal(seed, shape) for seed, shape in zip(seeds, (heads, keys, keys, depth, depth), strict=True)
    ]


def segments(batch, tokens):
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32) // 7, (batch, tokens))


def moda(implementation, *arrays):
    ids = segments(*arrays[0].shape[:2])
    return moda_attention(*arrays, depth_length=5, segment_ids=ids, implementation=implementation, return_lse=True)


def causal(implementation, *arrays):
    return moda_attention(*arrays, implementation=implementation, return_lse=True)


def depth(implementation, query, key, value, depth_key, depth_value):
    del key, value
    return depth_attention(
        query, depth_key, depth_value, depth_length=jnp.int32(5), depth_start=jnp.int32(1),
        implementation=implementation, return_lse=True,
    )  # fmt: skip


def gradients(op, implementation, *arrays):
    """The value and the gradients of all arrays."""

    def loss(*arrays):
        out, lse = op(implementation, *arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return jax.value_and_grad(loss, argnums=range(5))(*arrays)


def remat(op, implementation, *arrays):
    return gradients(lambda implementation, *arrays: jax.checkpoint(functools.partial(op, implementation))(*arrays),
                     implementation, *arrays)  # fmt: skip


def mapped(op, implementation, *arrays):
    """Over a second set of operands; keys and slots' values are shared."""
    query, key, value, depth_key, depth_value = arrays
    run = jax.vmap(functools.partial(gradients, op, implementation), in_axes=(0, None, None, 0, None))
    return run(jnp.stack([query, -query]), key, value, jnp.stack([depth_key, 2 * depth_key]), depth_value)


def accumulated(op, implementation, *arrays):
    """The gradients of slots of several layers, added up in one pair of buffers that a reverse scan carries."""
    del op
    query, key, value, depth_key, depth_value = arrays
    statistics = jnp.log(1 + jnp.sum(query**2, axis=-1))

    def layer(buffers, length):
        call = Call(query, key, value, Mask(True), DepthKV(depth_key, depth_value, length=length), 0.3)
        upstream = Upstream(jnp.sin(query), statistics, jnp.cos(statistics))
        *gradients, dk, dv = block.backward(call, upstream, buffers=buffers, implementation=implementation)
        return (dk, dv), gradients

    return jax.lax.scan(layer, (depth_key, depth_value), jnp.arange(4, 0, -1))


def manual(op, implementation, *arrays):
    """The op on each device's own part."""

    def local(*arrays):
        value, gradients_ = gradients(op, implementation, *arrays)
        return jax.lax.psum(value, ("rows", "heads")), gradients_

    return jax.shard_map(local, in_specs=ROWS_HEADS, out_specs=(P(), ROWS_HEADS), check_vma=False)(*arrays)


# What runs on which kind of axes with which layout.
CASES = {
    "automatic": (AxisType.Auto, ROWS_HEADS, gradients, moda),
    "automatic_tokens": (AxisType.Auto, TOKENS, gradients, causal),
    "automatic_documents": (AxisType.Auto, TOKENS, gradients, moda),
    "automatic_depth": (AxisType.Auto, TOKENS, gradients, depth),
    "automatic_accumulated": (AxisType.Auto, ROWS_HEADS, accumulated, moda),
    "automatic_remat": (AxisType.Auto, ROWS_HEADS, remat, moda),
    "automatic_vmap": (AxisType.Auto, ROWS_HEADS, mapped, moda),
    "explicit": (AxisType.Explicit, ROWS_HEADS, gradients, moda),
    "explicit_tokens": (AxisType.Explicit, TOKENS, gradients, causal),
    "explicit_depth": (AxisType.Explicit, TOKENS, gradients, depth),
    "explicit_vmap": (AxisType.Explicit, ROWS_HEADS, mapped, moda),
    "manual": (AxisType.Auto, ROWS_HEADS, manual, moda),
}


def compile_case(name, arrays):
    """A case's compiled program, and its operands where they lie."""
    kind, specs, run, op = CASES[name]
    mesh = jax.make_mesh((2, 2, 2), ("rows", "heads", "tokens"), axis_types=(kind,) * 3)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        return jax.jit(functools.partial(run, op, KERNEL)).lower(*placed).compile(QUICK), placed


def main(directory: Path, names: list[str]) -> None:
    dispatch.MODULES[KERNEL] = "support.opaque_attention"
    arrays = draw()
    temporaries, values, expected = {}, {}, {}
    for name in names or CASES:
        compiled, placed = compile_case(name, arrays)
        (directory / f"{name}.hlo").write_text(compiled.as_text())
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
        values[name] = compiled(*placed)
        _, _, run, op = CASES[name]
        run = gradients if run is manual else run
        if (run, op) not in expected:
            expected[run, op] = jax.jit(functools.partial(run, op, "xla"), compiler_options=QUICK)(*arrays)
        values[f"one_{name}"] = expected[run, op]
    if not names:
        compiled, _ = compile_case("automatic_accumulated", draw(MANY_TOKENS, MANY_SLOTS))
        temporaries["large_buffers"] = compiled.memory_analysis().temp_size_in_bytes
        dispatch.OPAQUE = ()
        jax.clear_caches()  # what was traced with the rule
        compiled, _ = compile_case("automatic", arrays)
        (directory / "without_rule.hlo").write_text(compiled.as_text())
    flat = {
        f"{name}.{i}": np.asarray(leaf) for name, tree in values.items() for i, leaf in enumerate(jax.tree.leaves(tree))
    }
    np.savez(directory / "values.npz", **flat)
    (directory / "found.json").write_text(json.dumps(temporaries))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
