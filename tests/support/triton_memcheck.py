"""Runs the Triton kernels, forward and backward, and nothing else: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck python -m support.triton_memcheck     (in tests/)

Every array has an allocation of its own and ends where a tile does not, so that a load or store beyond it is seen.
"""

import os

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # else all arrays lie in one allocation
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp

from pallas_kernels import moda_attention

# B, T, N, K, H, S, depth_length, segments
CASES = [(1, 150, 4, 2, 64, 5, 3, True), (2, 65, 3, 1, 80, 17, 17, False), (1, 33, 8, 8, 128, 0, None, True)]


def run(batch, tokens, heads, kv_heads, head_dim, slots, length, segments) -> None:
    """One call and its gradients."""
    keys = jax.random.split(jax.random.key(0), 6)

    def draw(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    query = draw(keys[0], batch, tokens, heads, head_dim)
    sequence = [draw(key, batch, tokens, kv_heads, head_dim) for key in keys[1:3]]
    depth = [draw(key, batch, tokens, slots, kv_heads, head_dim) for key in keys[3:5]] if slots else []
    segment_ids = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32) // 40, (batch, tokens)) if segments else None

    @jax.jit
    def gradients(dout, *arrays):
        def attend(query, key, value, *depth):
            more = dict(zip(("depth_key", "depth_value"), depth, strict=True)) if depth else {}
            more |= {} if length is None else {"depth_length": jnp.int32(length)}
            return moda_attention(query, key, value, segment_ids=segment_ids, implementation="triton", **more)

        out, vjp = jax.vjp(attend, *arrays)
        return out, vjp(dout)

    results = jax.block_until_ready(gradients(draw(keys[5], *query.shape), query, *sequence, *depth))
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results)):
        raise SystemExit(f"case {(batch, tokens, heads, kv_heads, head_dim, slots)}: not finite")


if __name__ == "__main__":
    for case in CASES:
        run(*case)
        print("ran", case, flush=True)
