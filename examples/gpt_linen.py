"""A GPT in Flax Linen with mixture-of-depths attention by `nnx.bridge`: dropout, remat, optax, four devices, decoding.

    python examples/gpt_linen.py [STEPS]

It learns the bytes of this file. `MoDAAttention` is an NNX layer; `nnx.bridge.to_linen` makes a Linen one of it, whose
parameters stand among the others. The layers are a Python loop here: simple, and with plain autodiff, under which each
layer keeps a copy of the depth stream. `gpt_nnx.py` has the loop that keeps one.
"""

import functools
import os
import sys
from pathlib import Path

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moda_jax import AttentionCache, DepthStream, MoDAAttention

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, DROPOUT = 2, 64, 4, 2, 16, 0.1
BATCH, TOKENS = 8, 64
OPTIMIZER = optax.adamw(3e-3, weight_decay=0.01)


class Block(nn.Module):
    """A layer. With a cache the next tokens of a text, else whole rows."""

    training: bool

    @nn.compact
    def __call__(self, x, stream, cache=None):
        sizes = {"width": WIDTH, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        attention = nnx.bridge.to_linen(MoDAAttention, **sizes, name="attention")
        inputs = nn.RMSNorm()(x)
        if cache is None:
            y, stream = attention(inputs, stream)
        else:
            y, stream, cache = attention(inputs, stream, cache, nnx_method="decode")
        x = x + y
        y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.RMSNorm()(x))))
        return x + nn.Dropout(DROPOUT, deterministic=not self.training)(y), stream, cache


class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, 256], and the caches if there are any."""

    training: bool = False

    @nn.compact
    def __call__(self, tokens, caches=(None,) * LAYERS):
        x = nn.Embed(256, WIDTH)(tokens)
        stream = DepthStream.empty(*x.shape[:2], slots=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        block, after = nn.remat(Block) if self.training else Block, []
        for number, cache in enumerate(caches):
            x, stream, cache = block(self.training, name=f"layer_{number}")(x, stream, cache)
            after.append(cache)
        return nn.Dense(256)(nn.RMSNorm()(x)), after


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, optimizer_state, tokens, key):
    """One update; tokens [B, T + 1]."""

    def loss(params):
        logits, _ = GPT(training=True).apply({"params": params}, tokens[:, :-1], rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, value


@jax.jit
def decode(params, tokens, caches):
    return GPT().apply({"params": params}, tokens, caches)


def main(steps: int = 100) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    source = np.random.default_rng(0)
    params = jax.jit(GPT().init)(jax.random.key(0), text[None, :TOKENS])["params"]
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, everywhere)
        optimizer_state = jax.device_put(OPTIMIZER.init(params), everywhere)
        losses = []
        for step in range(steps):
            starts = source.integers(0, len(text) - TOKENS, BATCH)
            tokens = jax.device_put(np.stack([text[start : start + TOKENS + 1] for start in starts]), rows)
            key = jax.random.fold_in(jax.random.key(1), step)
            params, optimizer_state, loss = train_step(params, optimizer_state, tokens, key)
            losses.append(loss)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte, on {len(tokens.sharding.device_set)} devices")

        written, next_tokens, per_token = text[None, :16], text[None, :16], []
        caches = [AttentionCache.empty(1, TOKENS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM) for _ in range(LAYERS)]
        while written.shape[1] < 48:
            logits, caches = decode(params, next_tokens, caches)
            per_token.append(np.asarray(logits))
            next_tokens = np.asarray(logits[:, -1:].argmax(-1), np.int32)
            written = np.concatenate([written, next_tokens], axis=1)
        print(repr(bytes(written[0].astype(np.uint8)).decode("utf-8", "replace")))
        whole, _ = jax.jit(GPT().apply)({"params": params}, written[:, :-1])
        print(
            f"decoding and one pass over the whole differ by {np.abs(np.concatenate(per_token, 1) - whole).max():.1e}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
