"""The blockwise op with tokens split over 8 virtual devices: `python -m support.split_tokens DIRECTORY`.

Per kind of mesh axes and per op: the compiled program (`NAME.hlo`) and, in `found.json`, the bytes of its temporaries;
and at few tokens the gradients, in `gradients.npz`, beside those of one device.
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

from pallas_kernels import depth_attention, moda_attention
from pallas_kernels.xla import blocks

TOKENS, FEW, SLOTS, N, K, H = 4096, 128, 32, 4, 2, 32
SPEC = PartitionSpec(None, "tokens")


def depth(query, key, value, depth_key, depth_value):
    del key, value
    return depth_attention(query, depth_key, depth_value, depth_length=11, implementation="xla")


moda = functools.partial(moda_attention, depth_length=11, implementation="xla")


def gradients(op, *arrays):
    return jax.grad(lambda *arrays: jnp.sum(jnp.sin(op(*arrays))), argnums=(0, 3, 4))(*arrays)


def manual(op, *arrays):
    """The op on each device's own tokens."""
    return jax.shard_map(functools.partial(gradients, op), in_specs=SPEC, out_specs=SPEC)(*arrays)


def shapes(tokens):
    heads = [(1, tokens, N, H), *2 * [(1, tokens, K, H)], *2 * [(1, tokens, SLOTS, K, H)]]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in heads]


# With explicit axes JAX refuses the product of queries and keys that are split over the same axis: depth alone.
CASES = {
    "automatic_depth": (AxisType.Auto, gradients, depth),
    "automatic_moda": (AxisType.Auto, gradients, moda),
    "explicit_depth": (AxisType.Explicit, gradients, depth),
    "manual_depth": (AxisType.Auto, manual, depth),
    "manual_moda": (AxisType.Auto, manual, moda),
}


def main(directory: Path) -> None:
    temporaries, found = {}, {}
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, shape.shape) for key, shape in zip(keys, shapes(FEW), strict=True)]
    for name, (kind, run, op) in CASES.items():
        mesh = jax.make_mesh((8,), ("tokens",), axis_types=(kind,))
        split = NamedSharding(mesh, SPEC)
        with jax.set_mesh(mesh):
            function = jax.jit(functools.partial(run, op), out_shardings=split)
            given = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=split) for shape in shapes(TOKENS)]
            compiled = function.lower(*given).compile(QUICK)
            (directory / f"{name}.hlo").write_text(compiled.as_text())
            temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
            if run is gradients:
                blocks.DEPTH["cpu"] = 2**14  # several blocks of few tokens
                few = [jax.device_put(array, split) for array in arrays]
                found[name] = jax.jit(functools.partial(run, op), compiler_options=QUICK)(*few)
                blocks.DEPTH["cpu"] = 2**18
    for op in (depth, moda):
        name = "one_depth" if op is depth else "one_moda"
        found[name] = jax.jit(functools.partial(gradients, op), compiler_options=QUICK)(*arrays)
    np.savez(
        directory / "gradients.npz", **{f"{n}_{i}": np.asarray(a) for n, t in found.items() for i, a in enumerate(t)}
    )
    (directory / "found.json").write_text(json.dumps(temporaries))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
