"""`data.source`: one source, or several with weights, "0.7*python_stdlib + 0.3*/data/books"."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

from moda_jax.config_checks import require

MOST_ROWS_OF_A_PERIOD = 2**20

_WEIGHT = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLUS = re.compile(rf"\s\+(?=\s*{_WEIGHT}\s*\*)")  # only where a weight follows: a path may hold one
_TERM = re.compile(rf"\s*({_WEIGHT})\s*\*\s*(\S.*?)\s*")
_FORM = '"WEIGHT*SOURCE + WEIGHT*SOURCE", as in "0.7*python_stdlib + 0.3*/data/books"'


class WeightedSource(NamedTuple):
    """A source of a mixture.

    Attributes:
        rows: of a period of the mixture, in which every source has as many rows as its weight says; of one source
            alone 1.
        source: as `data.source` names it alone.
    """

    rows: int
    source: str


def weighted_sources(text: str) -> tuple[WeightedSource, ...]:
    """The sources that `data.source` names.

    Weights are decimal numbers and are kept exactly: the rows of a period are the smallest integers in their
    proportion.

    Args:
        text: of the field.

    Raises:
        ValueError: a mixture whose form, weights or sources cannot be; the message names the field.
    """
    parts = _PLUS.split(text)
    if len(parts) == 1 and not (_TERM.fullmatch(text) and " + " in text):
        return (WeightedSource(1, text),)
    terms = [_TERM.fullmatch(part) for part in parts]
    require(len(parts) > 1 and all(terms), "data.source", text, _FORM)
    weights, sources = [Fraction(term[1]) for term in terms], [term[2] for term in terms]
    require(min(weights) > 0, "data.source", text, "a weight above 0 of every source")
    twice = [source for source in sources if sources.count(source) > 1]
    require(not twice, "data.source", text, f"every source once; {(*twice, '')[0]!r} is there twice")
    unit = Fraction(math.gcd(*(w.numerator for w in weights)), math.lcm(*(w.denominator for w in weights)))
    rows = [int(weight / unit) for weight in weights]
    require(
        sum(rows) <= MOST_ROWS_OF_A_PERIOD, "data.source", text,
        f"weights of fewer digits: these repeat after {sum(rows)} rows only, at most {MOST_ROWS_OF_A_PERIOD} are taken",
    )  # fmt: skip
    return tuple(map(WeightedSource, rows, sources))
