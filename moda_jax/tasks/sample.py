"""A sample of text from a model, so that a person sees what it learned."""

from __future__ import annotations

from typing import Any

import jax

from moda_jax.data.tokenizer import Tokenizer
from moda_jax.inference.decode import inference_params, model_config
from moda_jax.inference.generation import generate
from moda_jax.inference.sampling import SamplingConfig
from moda_jax.model.function import ModelFunction


def sample_text(
    model: ModelFunction,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    key: jax.Array,
    temperature: float = 0.8,
) -> str:
    """Continues a prompt with random tokens from softmax(logits / temperature).

    Args:
        model, params: see `TrainState`.
        tokenizer: of the training data.
        prompt: text; at least one token.
        num_tokens: tokens after the prompt; prompt and these must fit the model's longest sequence.
        key: a typed PRNG key; equal keys give equal text.
        temperature: 0 for the likeliest tokens; below 1 makes likely tokens likelier.

    Returns:
        The prompt and its continuation, up to the first end-of-text token.

    Raises:
        ValueError: a prompt without tokens, or one that does not fit.
    """
    params = inference_params(params, model_config(model, params))
    completions = generate(
        model, params, tokenizer, [prompt],
        max_tokens=num_tokens, sampling=SamplingConfig(temperature=temperature), key=key,
    )  # fmt: skip
    return prompt + completions[0].text
