"""A sample of text from a model, so that a person sees what it learned.

Every token costs a forward pass over the whole (padded) text: right for a few hundred tokens at the end of a run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moda_jax.data.tokenizer import Tokenizer
from moda_jax.training.state import ModelFunction

Array = jax.Array


def sample_text(
    model: ModelFunction,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    key: Array,
    temperature: float = 0.8,
) -> str:
    """Continues a prompt with random tokens from softmax(logits / temperature).

    Args:
        model, params: see `TrainState`.
        tokenizer: of the training data.
        prompt: text; at least one token.
        num_tokens: tokens after the prompt; prompt and these must fit the model's longest sequence.
        key: a typed PRNG key; equal keys give equal text.
        temperature: above 0; below 1 makes likely tokens likelier.

    Returns:
        The prompt and its continuation, up to the first end-of-text token.

    Raises:
        ValueError: a prompt without tokens.
    """
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        raise ValueError(f"prompt={prompt!r}: gives no tokens")
    padded = np.zeros((1, len(ids) + num_tokens), np.int32)
    padded[0, : len(ids)] = ids
    continued = _continue(model, tokenizer.vocab_size, params, padded, len(ids), key, temperature)
    if not continued.is_fully_addressable:  # many processes: every one gets the text
        continued = multihost_utils.process_allgather(continued, tiled=True)
    tokens = np.asarray(continued)[0]
    ends = np.flatnonzero(tokens[len(ids) :] == tokenizer.end_of_text_id)
    stop = len(ids) + int(ends[0]) if ends.size else len(tokens)
    return tokenizer.decode(tokens[:stop])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(
    model: ModelFunction, vocab_size: int, params: Any, tokens: Array, start: Array, key: Array, temperature: Array
) -> Array:
    """tokens [1, T], filled in from `start` on. What stood there is never seen: attention is causal."""
    module = model.module(params)

    def body(place: Array, tokens: Array) -> Array:
        hidden = jax.lax.dynamic_slice_in_dim(module.hidden(tokens), place - 1, 1, axis=1)  # [1, 1, D]
        logits = module.logits(hidden)[0, 0, :vocab_size]  # the model's vocabulary may be padded beyond the tokenizer's
        token = jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)
        return tokens.at[0, place].set(token.astype(tokens.dtype))

    return jax.lax.fori_loop(start, tokens.shape[1], body, tokens)
