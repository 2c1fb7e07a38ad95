"""The choice of the next token: greedy, temperature, top-k, top-p; one random key per row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn from the logits. The steps apply in this order: temperature, top-k, top-p.

    Attributes:
        temperature: 0: the likeliest token; else the token is drawn from softmax(logits / temperature).
        top_k: only the k likeliest tokens; None: all.
        top_p: only the fewest likeliest tokens whose probabilities reach p together; None: all.

    Raises:
        ValueError: a field out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share in (0, 1]")


GREEDY = SamplingConfig(temperature=0.0)


def sample(logits: Array, keys: Array, config: SamplingConfig) -> Array:
    """Draws a token per row.

    Args:
        logits: [B, V] float32.
        keys: [B] typed PRNG keys; a row's token depends on its own logits and key alone.
        config: static under jit.

    Returns:
        [B] int32.
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    draw = jax.vmap(jax.random.categorical)
    if config.top_k is None and config.top_p is None:
        return draw(keys, logits).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1, stable=True)  # of equal logits the smaller token comes first
    logits = jnp.take_along_axis(logits, order, axis=-1)
    kept = jnp.ones_like(logits, dtype=bool)
    if config.top_k is not None:
        kept &= (jnp.arange(logits.shape[-1]) < min(config.top_k, logits.shape[-1]))[None]
    if config.top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
        kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < config.top_p  # the likeliest always stays
    place = draw(keys, jnp.where(kept, logits, -jnp.inf))
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def row_keys(key: Array, prompts: Sequence[np.ndarray]) -> Array:
    """A key per prompt, from the prompt itself and not from its place in the batch.

    A prompt is continued alike alone and among others; several copies of one prompt are continued each in its own way.

    Args:
        key: a typed PRNG key, the seed's.
        prompts: token ids of each row.

    Returns:
        [B] typed PRNG keys.
    """
    seen: dict[bytes, int] = {}
    folds = []
    for prompt in prompts:
        content = np.asarray(prompt, np.int64).tobytes()
        copy = seen.get(content, 0)
        seen[content] = copy + 1
        digest = hashlib.blake2b(content, digest_size=4).digest()
        folds.append((int.from_bytes(digest, "little"), copy))
    return jax.vmap(lambda fold: jax.random.fold_in(jax.random.fold_in(key, fold[0]), fold[1]))(np.uint32(folds))
