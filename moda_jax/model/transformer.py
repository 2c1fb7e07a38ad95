"""The decoder-only transformer: OLMo 2's block, with a depth mechanism in it.

Axes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import Embedding, Projection
from moda_jax.model.stack import Stack
from moda_jax.numerics.precision import compute_dtype

Array = jax.Array


class Transformer(Stack):
    """A causal language model: `depth="none"` is OLMo 2, `depth="moda"` adds the depth stream (arXiv 2603.15619).

    Args:
        config: see `TransformerConfig`.
        rngs: source of the parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs | InitialKeys) -> None:
        dtype, keys = compute_dtype(config.dtype), InitialKeys.of(rngs)
        super().__init__(config, rngs=keys)
        self.embedding = Embedding(
            config.vocab_size, config.width, initializer_range=config.initializer_range, dtype=dtype,
            rngs=keys.at("embedding"),
        )  # fmt: skip
        self.head = None if config.tie_embeddings else _untied_head(config, dtype, keys.at("head"))

    def __call__(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """Next-token logits.

        Args:
            tokens: [B, T] int32, T at most `config.max_sequence_length`.
            segment_ids: [B, T] int32; tokens of different segments do not see each other. None: one segment.
            positions: [B, T] int32, for the rotary embedding. None: 0..T-1.

        Returns:
            [B, T, V] float32.

        Raises:
            ValueError: wrong ranks or dtypes, or a sequence that is too long.
        """
        return self.logits(self.hidden(tokens, segment_ids, positions))

    def hidden(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """The final norm's output [B, T, D], which `logits` projects. Arguments as in `__call__`."""
        self._check_inputs(tokens, segment_ids, positions)
        return super().__call__(self.embedding(tokens), segment_ids, positions)

    def output_table(self) -> Array:
        """[V, D] float32, the rows that `logits` multiplies `hidden` with: the embedding, or an untied head's. A
        training state's have padding behind them."""
        return self.embedding.table[...] if self.head is None else self.head.kernel[...].T

    def logits(self, hidden: Array) -> Array:
        """hidden [B, T, D] to [B, T, V] float32; what a padded vocabulary has beyond V is cut off."""
        with jax.named_scope("logits"):
            logits = self.embedding.logits(hidden) if self.head is None else self.head(hidden)
            return logits[..., : self.config.vocab_size] if logits.shape[-1] > self.config.vocab_size else logits

    def _check_inputs(self, tokens, segment_ids, positions) -> None:
        for name, array in (("tokens", tokens), ("segment_ids", segment_ids), ("positions", positions)):
            if array is None:
                continue
            if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name}: got shape {array.shape} and dtype {array.dtype}, expected integers [B, T]")
            if array.shape != tokens.shape:
                raise ValueError(f"{name}: got shape {array.shape}, expected the tokens' {tokens.shape}")
        longest = self.config.max_sequence_length
        if tokens.shape[1] > longest:
            raise ValueError(f"tokens: got {tokens.shape[1]} tokens, expected at most max_sequence_length={longest}")


def _untied_head(config: TransformerConfig, dtype: jnp.dtype, rngs: InitialKeys) -> Projection:
    """The output projection of a model whose embedding is not tied to it: logits in float32."""
    return Projection(
        "btd,dv->btv", (config.width, config.vocab_size),
        initializer_range=config.initializer_range, dtype=dtype, out_dtype=jnp.float32, rngs=rngs,
    )  # fmt: skip
