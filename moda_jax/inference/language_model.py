"""A trained language model as one object, from a run or from an exported model: `moda_jax.load`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from moda_jax.config import Config, DataConfig
from moda_jax.data.cache import cache_directory
from moda_jax.data.tokenizer import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer
from moda_jax.inference import generation, perplexity
from moda_jax.inference.decode import inference_params
from moda_jax.inference.load import LoadedRun, load_run
from moda_jax.inference.sampling import SamplingConfig
from moda_jax.interop import exchange
from moda_jax.model.function import model_function, split_module
from moda_jax.model.transformer import Transformer
from moda_jax.paths import expand_home
from moda_jax.training.workdir import read_run_config

_TEXTS = "texts"  # the name of what `evaluate` is given


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A trained model with its tokenizer and config; `moda_jax.load` makes one.

    Attributes:
        run: the same for the functions of `moda_jax.inference`: the model as a function, and its parameters.
        is_export: it comes from an exported model, which knows nothing of the data that it was trained on.
    """

    run: LoadedRun
    is_export: bool = False

    @functools.cached_property
    def model(self) -> Transformer:
        """The model, from tokens [B, T] int32 to logits [B, T, V] float32. Its matrices are in the compute dtype."""
        return self.run.model.module(self.run.params)

    @property
    def tokenizer(self) -> Tokenizer:
        """What it was trained with."""
        return self.run.tokenizer

    @property
    def config(self) -> Config:
        """The run's; of an exported model only `config.model` and `config.data.tokenizer` say something."""
        return self.run.config

    @property
    def step(self) -> int:
        """The checkpoint's; 0 for an exported model."""
        return self.run.step

    def generate(
        self,
        *prompts: str | np.ndarray,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
        on_end: Callable[[int], None] | None = None,
    ) -> list[generation.Completion]:
        """Continues prompts, all of them as one batch.

        Args:
            *prompts: texts, or their token ids, of at least one token each.
            max_tokens: tokens of a continuation at most.
            temperature: 0: always the likeliest token (greedy).
            top_k, top_p: draw from the k likeliest tokens only; from the fewest whose probabilities reach p.
            stop: a text, or several, that ends a continuation and is not part of it.
            seed: the same seed gives the same text.
            on_text: called with a prompt's index and its next piece of text, as soon as it is certain.
            on_end: called with a prompt's index when its continuation has ended.

        Returns:
            A completion per prompt: its `text`, `num_tokens`, and the `reason` why it ended.

        Raises:
            ValueError: no prompt, one that does not fit the model's context, or an option out of range.
        """
        run = self.run
        return generation.generate(
            run.model, run.params, run.tokenizer, prompts, max_tokens=max_tokens,
            sampling=SamplingConfig(temperature, top_k, top_p), stop=(stop,) if isinstance(stop, str) else stop,
            key=jax.random.key(seed), on_text=on_text, on_end=on_end,
        )  # fmt: skip

    def loss(self, *texts: str | bytes, context: int | None = None, stride: int | None = None) -> float:
        """Mean loss of the texts in nats per token; arguments and errors as in `evaluate`."""
        return self.evaluate(*texts, context=context, stride=stride).loss

    def evaluate(
        self, *texts: str | bytes, context: int | None = None, stride: int | None = None
    ) -> perplexity.DomainResult:
        """Loss, perplexity and bits per byte over documents.

        Args:
            *texts: documents; each is ended by the end-of-text token, which is predicted too.
            context: tokens that the model reads at most; None: `config.data.sequence_length`.
            stride: of a document that is longer, predictions per window; None: half of the context.

        Raises:
            ValueError: no text; a context beyond the model's, or a stride beyond the context.
        """
        documents = [text.encode("utf-8") if isinstance(text, str) else text for text in texts]
        if not documents or not all(documents):
            raise ValueError(f"texts: got {len(documents)}, {documents.count(b'')} of them empty; expected some text")
        domain = perplexity.Domain(_TEXTS, documents)
        (result,) = perplexity.evaluate_domains(self.run, [domain], context=context, stride=stride)
        return result


def load(
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    ema: bool = False,
) -> LanguageModel:
    """Loads a trained language model. Nothing is written, and a run may still be training.

    Args:
        directory: of a run; or of a model that `python -m moda_jax.interop export` or transformers (OLMo 2) wrote.
        step: of a run's checkpoint; None: the newest good one.
        tokenizer: a tokenizer.json; None: the one that lies in the directory, or what the run was trained with.
        ema: a run's averaged weights (`optimizer.ema_decay`) instead of the last ones.

    Raises:
        ValueError: neither is there, or it is damaged, or has no averaged weights, or the tokenizer is not the model's.
            The message says what is wrong, and what to do where something can be done.
    """
    directory = expand_home(Path(directory), "directory")
    tokenizer = None if tokenizer is None else str(tokenizer)
    if not exchange.is_export(directory):
        return LanguageModel(load_run(directory, step=step, tokenizer=tokenizer, ema=ema))
    if step is not None:
        raise ValueError(f"step={step}: {directory} holds an exported model, which has no steps")
    if ema:
        raise ValueError(f"ema=True: {directory} holds an exported model, which has one set of weights")
    return LanguageModel(_load_export(directory, tokenizer), is_export=True)


def cache_of(directory: str | os.PathLike[str]) -> Path:
    """The cache directory of what `load` loads, for compiled programs.

    Raises:
        ValueError: as `load`.
    """
    directory = expand_home(Path(directory), "directory")
    return cache_directory(DataConfig() if exchange.is_export(directory) else read_run_config(directory).data)


def _load_export(directory: Path, tokenizer: str | None) -> LoadedRun:
    model_config, module = exchange.load_model(directory)
    own = directory / exchange.TOKENIZER_FILE
    if tokenizer is None and own.is_file():
        tokenizer = str(own)
    if tokenizer is None:
        if model_config.vocab_size != ByteTokenizer.vocab_size:
            raise ValueError(
                f"{directory}: holds no {exchange.TOKENIZER_FILE}, and {model_config.vocab_size} tokens are not bytes; "
                "name one, as in tokenizer='tokenizer.json'"
            )
        tokenizer = "bytes"
    length = min(DataConfig().sequence_length, model_config.max_sequence_length)
    data = DataConfig(tokenizer=tokenizer, sequence_length=length)
    loaded = load_tokenizer(data)
    check_vocabulary(loaded, model_config.vocab_size, data)
    params = inference_params(split_module(module)[1], model_config)
    return LoadedRun(directory, Config(model=model_config, data=data), model_function(model_config), params, loaded, 0)
