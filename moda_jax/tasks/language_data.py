"""The data of a run that learns language: tokenizer, and tokens of both splits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from moda_jax.config import Config
from moda_jax.data.mixture import TokenMixture
from moda_jax.data.packing import Batch
from moda_jax.data.pipeline import TrainBatches, open_dataset, train_batches, validation_batches
from moda_jax.data.token_store import TokenDataset
from moda_jax.data.tokenizer import check_vocabulary, load_tokenizer
from moda_jax.parallel.batches import RowShare
from moda_jax.quantities import quantity

_logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"  # in a run's directory
_PADDING = 0.1  # share of the vocabulary that may be unused without a word: more than anybody pads


class LanguageData:
    """See `TaskData`. The constructor opens tokenizer and data; nothing but prepared data is written.

    Args:
        config: the run.
        share: the rows of every batch that this process reads.
        carried_tokenizer: where the run keeps a copy of its tokenizer.json, or will.

    Raises:
        ValueError: a mistake in config or data; the message names the field.

    Attributes:
        tokenizer, train_data, validation_data: the last one is None where `eval.interval_steps` is 0.
    """

    def __init__(self, config: Config, share: RowShare, carried_tokenizer: Path | None = None):
        self._config, self._share = config, share
        self.tokenizer = load_tokenizer(config.data, carried_tokenizer)
        check_vocabulary(self.tokenizer, config.model.vocab_size, config.data)
        unused = config.model.vocab_size - self.tokenizer.vocab_size
        if unused > _PADDING * config.model.vocab_size:
            _logger.warning(
                "model.vocab_size=%d: data.tokenizer=%r uses only %d of it",
                config.model.vocab_size, config.data.tokenizer, self.tokenizer.vocab_size,
            )  # fmt: skip
        self.train_data = open_dataset(config.data, "train", self.tokenizer)
        evaluates = config.eval.interval_steps > 0
        self.validation_data = open_dataset(config.data, "validation", self.tokenizer) if evaluates else None
        self._check_sample()

    def train_batches(self, position: int) -> TrainBatches:
        """This process's rows of the batches after global row `position`."""
        config, share = self._config, self._share
        return train_batches(
            self.train_data, config.data, batch_size=config.train.batch_size, seed=config.train.seed,
            position=position, process_index=share.index, process_count=share.count,
        )  # fmt: skip

    def validation_batches(self) -> Iterator[Batch]:
        """This process's rows of the validation split, or of the `eval.num_batches` batches spread over it."""
        config, share = self._config, self._share
        return validation_batches(
            self.validation_data, config.data, batch_size=config.train.batch_size, num_batches=config.eval.num_batches,
            process_index=share.index, process_count=share.count,
        )  # fmt: skip

    def fingerprints(self) -> dict[str, str]:
        """Of training data and tokenizer."""
        return {
            "dataset_fingerprint": self.train_data.fingerprint,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
        }

    @property
    def validation_fingerprint(self) -> str | None:
        """Of the validation split; None where it is not opened."""
        return None if self.validation_data is None else self.validation_data.fingerprint

    def accept_older(self, name: str, fingerprint: str) -> bool:
        """Takes the source as the first version read it, if that gives the data that a checkpoint speaks of.

        Since then more kinds of files are read, hidden names are not, and one text file is split by position.
        """
        if name != "dataset_fingerprint":
            return False
        config = self._config.data
        try:
            older = open_dataset(config, "train", self.tokenizer, as_before=True)
            if older.fingerprint != fingerprint:
                return False
            if self.validation_data is not None:
                self.validation_data = open_dataset(config, "validation", self.tokenizer, as_before=True)
        except ValueError:  # not a source of that version
            return False
        self.train_data = older
        _logger.warning(
            "data.source=%r: this run was begun when other files of it were read, or shared out otherwise; it goes on "
            "with the documents it began with", config.source,
        )  # fmt: skip
        return True

    def carried_files(self) -> Mapping[str, Path]:
        """The tokenizer.json, if there is one."""
        return {} if self._config.data.tokenizer == "bytes" else {TOKENIZER_FILE: Path(self.tokenizer.path)}

    def description(self) -> str:
        """Source and size; of a mixture each source's, and how often the run goes through it."""
        config, data = self._config, self.train_data
        if not isinstance(data, TokenMixture):
            return f"{config.data.source}: {_size(data)}"
        tokens = config.train.num_steps * config.train.batch_size * config.data.sequence_length / sum(data.rows)
        return "; ".join(
            f"{share / sum(data.rows):.4g} of {source}: {_size(part)}, {tokens * share / part.num_tokens:.2f} epochs"
            for (share, source), part in zip(config.data.sources, data.parts, strict=True)
        )

    @property
    def num_items(self) -> int:
        """Training tokens."""
        return self.train_data.num_tokens

    def _check_sample(self) -> None:
        """The sample is the last thing that a run does: a prompt that does not fit must not wait until then."""
        train, longest = self._config.train, self._config.model.max_sequence_length
        if not train.sample_prompt:
            return
        prompt_tokens = len(self.tokenizer.encode(train.sample_prompt))
        if prompt_tokens + train.sample_tokens > longest:
            raise ValueError(
                f"train.sample_tokens={train.sample_tokens}: expected at most {longest - prompt_tokens}, because the "
                f"prompt has {prompt_tokens} tokens and model.max_sequence_length={longest}"
            )


def _size(data: TokenDataset | TokenMixture) -> str:
    return f"{quantity(data.num_tokens)} training tokens in {data.num_documents} documents"
