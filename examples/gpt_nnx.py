"""A GPT in Flax NNX with mixture-of-depths attention: dropout, remat, optax, a mesh of four devices, decoding.

    python examples/gpt_nnx.py [STEPS]

It learns the bytes of this file, then writes some. Rows of a batch, parameters and optimizer state are split over four
devices; without any, JAX makes four of the CPU.

Axes: B rows, T tokens, D width, L layers.
"""

import functools
import os
import sys
from pathlib import Path

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moda_jax import AttentionCache, DepthStream, MoDAAttention, depth_scan

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, DROPOUT = 2, 64, 4, 2, 16, 0.1
BATCH, TOKENS = 8, 64
OPTIMIZER = optax.adamw(3e-3, weight_decay=0.01)


class Block(nnx.Module):
    """A layer: mixture-of-depths attention, then an FFN that writes an entry too."""

    def __init__(self, *, rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = MoDAAttention(WIDTH, HEADS, KV_HEADS, HEAD_DIM, ffn_kv=True, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT)

    def __call__(self, x, stream, key=None):
        """Over whole rows; with a key, under dropout."""
        y, stream = self.attention(self.attention_norm(x), stream)
        return self.feed_forward(x + y, stream, key)

    def decode(self, x, stream, cache):
        """The next tokens, whose earlier ones are in the cache."""
        positions = cache.places(x.shape[1])
        y, stream, cache = self.attention.decode(self.attention_norm(x), stream, cache)
        return *self.feed_forward(x + y, stream, None, positions), cache

    def feed_forward(self, x, stream, key, positions=None):
        inputs = self.ffn_norm(x)
        stream = self.attention.write_ffn(inputs, stream, positions)
        y = self.down(nnx.gelu(self.up(inputs)))
        return x + self.dropout(y, deterministic=key is None, rngs=key), stream


class GPT(nnx.Module):
    """Tokens [B, T] to logits [B, T, 256]; the layers' parameters are stacked, with a leading axis L."""

    def __init__(self, *, rngs):
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def layers(key):
            return Block(rngs=nnx.Rngs(params=key))

        self.embedding = nnx.Embed(256, WIDTH, rngs=rngs)
        self.layers = layers(jax.random.split(rngs.params(), LAYERS))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens, key=None):
        graph, params = nnx.split(self.layers)

        # depth_scan keeps each layer's input alone and computes the layer again for its gradient: that is the remat.
        # A layer's dropout has to be the same both times, so its key comes from its own place in the stream.
        def block(params, x, stream, *key):
            key = jax.random.fold_in(jax.random.wrap_key_data(key[0]), stream.length) if key else None
            return nnx.merge(graph, params)(x, stream, key)

        x = self.embedding(tokens)
        x, _ = depth_scan(block, params, x, empty_stream(x), *([] if key is None else [jax.random.key_data(key)]))
        return self.head(self.norm(x))

    def decode(self, tokens, caches):
        """Logits of the next tokens [B, T], and the layers' caches with them."""
        graph, params = nnx.split(self.layers)
        x, after = self.embedding(tokens), []
        stream = empty_stream(x)
        for number, cache in enumerate(caches):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=number: leaf[i], params))
            x, stream, cache = layer.decode(x, stream, cache)
            after.append(cache)
        return self.head(self.norm(x)), after


def empty_stream(x):
    """Two slots for each layer: one that attention writes, one that the FFN writes."""
    return DepthStream.empty(*x.shape[:2], slots=2 * LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(graph, params, optimizer_state, tokens, key):
    """One update; tokens [B, T + 1]."""

    def loss(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1], key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, value


@functools.partial(jax.jit, static_argnums=0)
def decode(graph, params, tokens, caches):
    return nnx.merge(graph, params).decode(tokens, caches)


def split_over(mesh, tree):
    """Puts an array on the mesh, split along its first axis that the devices divide, or else a copy on each."""

    def place(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size and size % mesh.size == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def main(steps: int = 100) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    source = np.random.default_rng(0)
    graph, params = nnx.split(GPT(rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        params = split_over(mesh, params)
        optimizer_state = split_over(mesh, OPTIMIZER.init(params))
        losses = []
        for step in range(steps):
            starts = source.integers(0, len(text) - TOKENS, BATCH)
            tokens = split_over(mesh, np.stack([text[start : start + TOKENS + 1] for start in starts]))
            key = jax.random.fold_in(jax.random.key(1), step)
            params, optimizer_state, loss = train_step(graph, params, optimizer_state, tokens, key)
            losses.append(loss)
        kernel = params["layers"]["up"]["kernel"][...]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte, on {len(kernel.sharding.device_set)} devices")

        # Decoding: the prompt at once, then a token at a time, each the likeliest.
        prompt = text[None, :16]
        caches = [AttentionCache.empty(1, TOKENS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM) for _ in range(LAYERS)]
        written, next_tokens, per_token = prompt, prompt, []
        while written.shape[1] < 48:
            logits, caches = decode(graph, params, next_tokens, caches)
            per_token.append(np.asarray(logits))
            next_tokens = np.asarray(logits[:, -1:].argmax(-1), np.int32)
            written = np.concatenate([written, next_tokens], axis=1)
        print(repr(bytes(written[0].astype(np.uint8)).decode("utf-8", "replace")))
        whole = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, written[:, :-1])
        print(
            f"decoding and one pass over the whole differ by {np.abs(np.concatenate(per_token, 1) - whole).max():.1e}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
