"""`depth_scan` on a mesh of somebody else's, 8 virtual devices: `python -m support.own_mesh DIRECTORY`.

Stores loss and gradients with automatic, explicit and manual axes, and on one device.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.quick_compile import QUICK

from moda_jax import DepthStream, MoDAAttention, depth_scan

B, T, D, N, K, H, L = 4, 16, 8, 4, 2, 4, 3
SPEC = PartitionSpec("rows", "tokens")


def stack():
    """(graph, params stacked over layers)."""

    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(key):
        return MoDAAttention(
            D, N, K, H, ffn_kv=True, initializer_range=0.3, implementation="xla", dtype="float32",
            rngs=nnx.Rngs(params=key),
        )  # fmt: skip

    return nnx.split(build(jax.random.split(jax.random.key(0), L)))


def block(graph, params, x, stream):
    """Attention among the tokens of a shard: with manual axes a device sees no other; else the mask says the same."""
    layer = nnx.merge(graph, params)
    segment_ids = jnp.broadcast_to(jnp.arange(x.shape[1]) // (T // 4), x.shape[:2])
    y, stream = layer(x, stream, segment_ids=segment_ids)
    return x + y, layer.write_ffn(x, stream)


def loss(graph, params, x):
    stream = DepthStream.like(x, 2 * L, K, H)
    y, stream = depth_scan(functools.partial(block, graph), params, x, stream)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(stream.value))


def main(directory: Path) -> None:
    graph, params = stack()
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    plain = functools.partial(loss, graph)

    def manual(params, x):
        def local(params, x):
            # A shard's tokens start at position 0; of a rotation only differences within a segment count.
            return jax.lax.psum(plain(params, x), ("rows", "tokens"))

        return jax.shard_map(local, in_specs=(PartitionSpec(), SPEC), out_specs=PartitionSpec())(params, x)

    found = {}
    # With explicit axes JAX refuses attention over tokens that are split: rows alone are.
    for name, kind, spec, function in (
        ("automatic", AxisType.Auto, SPEC, plain), ("explicit", AxisType.Explicit, PartitionSpec("rows"), plain),
        ("manual", AxisType.Auto, SPEC, manual),
    ):  # fmt: skip
        mesh = jax.make_mesh((2, 4), ("rows", "tokens"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
            run = jax.jit(jax.value_and_grad(function, argnums=(0, 1)), compiler_options=QUICK)
            found[name] = run(replicated, placed)
    found["one"] = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)), compiler_options=QUICK)(params, x)
    flat = {
        f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for name, tree in found.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    np.savez(directory / "found.npz", **flat)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
