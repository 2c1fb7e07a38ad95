"""A mixture of tokenised sources: which row of which source stands at a place of the mixture.

Places are counted over the whole run, 0, 1, 2, ... They repeat with a period of P = n_1 + n_2 + ... in which source k
has n_k rows, the smallest integers in the proportion of the weights. In a period row j of source k stands where
(j + 1/2) / n_k puts it among all others, ties in the order of the sources: so the shares are exact in every period and
nearly so in every batch. From a place follow, without anything that was counted before, the source and how many rows of
it came earlier, so a mixture begins anywhere and is shared among any number of processes as one source is.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from moda_jax.data.cache import cache_key
from moda_jax.data.token_store import TokenDataset


@dataclasses.dataclass(frozen=True)
class MixedOrder:
    """The places of a mixture.

    Args:
        rows: n_k of every source, positive.
    """

    rows: tuple[int, ...]

    @property
    def period(self) -> int:
        """P."""
        return sum(self.rows)

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What stands at places of the mixture.

        Args:
            places: int64 [B], from 0.

        Returns:
            The source's number, and how many rows of that source stand before it; int64 [B] both.
        """
        periods, slots = np.divmod(np.asarray(places, np.int64), self.period)
        sources, ranks, _ = self._pattern
        return sources[slots], periods * np.asarray(self.rows)[sources[slots]] + ranks[slots]

    def place_of(self, source: int, number: int) -> int:
        """The place of a source's row `number`, from 0."""
        period, rank = divmod(number, self.rows[source])
        return period * self.period + int(self._pattern[2][source][rank])

    def counts(self, places: int) -> list[int]:
        """How many rows of every source stand at the first places."""
        periods, rest = divmod(places, self.period)
        slots = self._pattern[2]
        return [periods * n + int(np.searchsorted(slots[k], rest)) for k, n in enumerate(self.rows)]

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Of a slot of the period its source and its rank among that source's slots; and of a source its slots."""
        sources = np.repeat(np.arange(len(self.rows)), self.rows)
        ranks = np.concatenate([np.arange(n) for n in self.rows])
        # Equal fractions are equal floats, and others differ: the integers are below 2**21.
        order = np.lexsort((sources, (2 * ranks + 1) / (2 * np.asarray(self.rows)[sources])))
        sources, ranks = sources[order], ranks[order]
        return sources, ranks, [np.flatnonzero(sources == k) for k in range(len(self.rows))]


@dataclasses.dataclass(frozen=True)
class TokenMixture:
    """A split of several sources, tokenised each by itself.

    Attributes:
        parts: the sources' splits.
        rows: of every source in a period, see `MixedOrder`.
        name: the split in words, for messages.
    """

    parts: tuple[TokenDataset, ...]
    rows: tuple[int, ...]
    name: str

    @property
    def fingerprint(self) -> str:
        """Depends on the parts' fingerprints, their order, and their shares alone."""
        return cache_key(mixture=[[n, part.fingerprint] for n, part in zip(self.rows, self.parts, strict=True)])

    @property
    def num_tokens(self) -> int:
        """Of all parts."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_documents(self) -> int:
        """Of all parts."""
        return sum(part.num_documents for part in self.parts)
