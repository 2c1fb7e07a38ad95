"""Language modelling: the next token of a packed row of documents.

Axes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moda_jax.config import Config, TransformerConfig
from moda_jax.config_checks import require
from moda_jax.data.packing import Batch, batch_layout
from moda_jax.model.accounting import param_count, train_flops_per_token
from moda_jax.model.depth_probe import SlotChoice, depth_mass, filled_slots, probed_hidden
from moda_jax.model.function import ModelFunction, abstract_model, model_function, parameter_kinds, split_model
from moda_jax.model.not_finite import counted_layers
from moda_jax.numerics.cross_entropy import loss_sums, projected_loss_sums
from moda_jax.numerics.loss_chunks import LossSums
from moda_jax.parallel.batches import RowShare
from moda_jax.parallel.parameters import pad_vocabulary, padded_vocabulary
from moda_jax.parallel.vocabulary import loss_exchange
from moda_jax.quantities import quantity
from moda_jax.tasks.language_data import TOKENIZER_FILE, LanguageData
from moda_jax.tasks.sample import sample_text
from moda_jax.tasks.task import Metric, Objective, Task

Array = jax.Array


class LanguageObjective(Objective):
    """-log p(target) + z_loss * log(Z)^2, summed over the targets that the mask selects.

    Args:
        model: of a `Transformer`.
    """

    def __init__(self, model: ModelFunction):
        self._model = model

    def weight(self, batch: Batch) -> Array:
        """The number of targets."""
        return jnp.sum(batch.target_mask)

    def loss(self, params: Any, batch: Batch, z_loss: float) -> tuple[Array, LossSums]:
        """The objective, summed over the targets, and the sums that it is made of."""
        model = self._model
        hidden = model.hidden(params, batch.tokens, batch.segment_ids, batch.positions)  # [B, T, D]
        with jax.named_scope("loss"):
            return projected_loss_sums(
                z_loss, model.vocab_size(params), loss_exchange(),
                hidden, model.output_table(params), batch.targets, batch.target_mask,
            )  # fmt: skip


class LanguageModelling(Task):
    """A causal language model on text: `model.*` is its `Transformer`, `data.*` its text and tokenizer."""

    items: ClassVar[str] = "tokens"

    def __init__(self, config: Config):
        super().__init__(config)
        require(config.model.causal, "model.causal", config.model.causal, "True: a token is not told what comes next")
        require(config.model.stochastic_depth == 0, "model.stochastic_depth", config.model.stochastic_depth, "0")
        self.unit = "byte" if config.data.tokenizer == "bytes" else "token"

    @functools.cached_property
    def model(self) -> ModelFunction:
        """Of a `Transformer`."""
        return model_function(self.config.model)

    @functools.cached_property
    def objective(self) -> LanguageObjective:
        """Cross-entropy and z-loss."""
        return LanguageObjective(self.model)

    @property
    def layout(self) -> Batch:
        """Five arrays [B, T]."""
        return batch_layout(self.config.train.batch_size, self.config.data.sequence_length)

    def initial_params(self, key: Array) -> Any:
        """As `split_model`'s, the vocabulary padded."""
        return language_params(self.config.model, key)

    def older_shapes(self, state: Any) -> Any:
        """Checkpoints held the vocabulary without padding once."""
        return unpadded(state, self.config.model)

    def adapted(self, params: Any) -> Any:
        """With padding."""
        expected = abstract_model(self.config.model)[1]
        if jax.tree.map(jnp.shape, expected) != jax.tree.map(jnp.shape, params):
            raise ValueError("params: names or shapes differ from those of the config's model")
        return jax.jit(lambda params: _padded(params, self.config.model))(params)

    def open_data(self, share: RowShare, directory: Path | None = None) -> LanguageData:
        """Text and tokenizer; the run's own copy of a tokenizer.json counts."""
        return LanguageData(self.config, share, None if directory is None else directory / TOKENIZER_FILE)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Loss and perplexity."""
        return Metric("loss", f"nats per {self.unit}"), Metric("perplexity", digits=3)

    def values(self, means: Mapping[str, float]) -> dict[str, float]:
        """exp(loss) is the perplexity."""
        return {"loss": means["loss"], "perplexity": perplexity(means["loss"])}

    @property
    def items_per_row(self) -> int:
        """T."""
        return self.config.data.sequence_length

    @property
    def train_flops_per_item(self) -> float:
        """Of a token."""
        return train_flops_per_token(self.config.model, self.config.data.sequence_length)

    def description(self) -> list[tuple[str, str]]:
        """Model and attention."""
        model = self.config.model
        parameters = param_count(model)
        return [
            ("model", f"{quantity(parameters)} parameters ({parameters}), {model.num_layers} layers, "
                      f"depth={model.depth}, compute dtype {model.dtype}"),
            ("attention", model.attention_implementation or "the best implementation for this device"),
        ]  # fmt: skip

    def measures(self) -> dict[str, Callable[[Any, Any], Array]]:
        """Of a model with a depth stream: attention's mass on its slots over the batch's first micro-batch."""
        if not (self.config.eval.depth_mass and self.config.model.has_depth_probes):
            return {}

        def mass(params: Any, batch: Batch) -> Array:
            rows = batch.tokens.shape[0] // self.config.train.accumulation_steps
            tokens, segment_ids, positions = (x[:rows] for x in (batch.tokens, batch.segment_ids, batch.positions))
            module = self.model.module(params)
            choice = SlotChoice.of(filled_slots(module.config))
            return depth_mass(probed_hidden(module, tokens, segment_ids, positions, choice)[1])

        return {"depth_mass": mass}

    def sample(self, params: Any, data: LanguageData, key: Array) -> str | None:
        """Continues `train.sample_prompt`."""
        train = self.config.train
        if not train.sample_prompt:
            return None
        return sample_text(
            self.model, params, data.tokenizer, train.sample_prompt, num_tokens=train.sample_tokens, key=key
        )

    def tensors(self, params: Any, batch: Batch) -> Iterator[tuple[str, Array | tuple[int, int]]]:
        """Embedding, layers, final norm, logits, and the sums of the loss."""
        return language_tensors(self.model, params, batch)


def language_params(config: TransformerConfig, key: Array) -> Any:
    """Fresh parameters with the vocabulary padded, as training has them."""
    return _padded(split_model(config, key)[1], config)


def unpadded(state: Any, config: TransformerConfig) -> Any:
    """Shapes of a training state, or of its parameters, without the vocabulary's padding."""
    kinds = parameter_kinds(config)
    return jax.eval_shape(lambda state: pad_vocabulary(state, kinds, config.vocab_size), state)


def language_tensors(model: ModelFunction, params: Any, batch: Batch) -> Iterator[tuple[str, Array | tuple[int, int]]]:
    """As `Task.tensors`."""
    module = model.module(params)
    tokens, positions, segment_ids = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids))
    x = module.embedding(tokens)
    yield "embedding output", x
    hidden, counts, size = counted_layers(module, x, positions, segment_ids)
    for number, count in enumerate(counts):
        yield f"output of layer {number}", (int(count), size)
    yield "output of the final norm", hidden
    logits = module.logits(hidden)
    yield "logits", logits
    sums = loss_sums(logits, jnp.asarray(batch.targets), jnp.asarray(batch.target_mask))
    yield "loss", sums.loss
    yield "z-loss", sums.z_loss


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _padded(params: Any, config: TransformerConfig) -> Any:
    return pad_vocabulary(params, parameter_kinds(config), padded_vocabulary(config.vocab_size))
