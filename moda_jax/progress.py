"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else (a log file, a pipe)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

_logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 30.0


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm | ProgressLines:
    """tqdm's bar where stderr is a terminal, else `ProgressLines`; both are context managers and iterables.

    Args:
        iterable: what is gone through, if it is.
        **options: tqdm's; total, desc, unit, unit_scale and disable are understood by both.
    """
    return tqdm(iterable, **options) if sys.stderr.isatty() else ProgressLines(iterable, **options)


class ProgressLines:
    """tqdm's interface, as far as it is used here, with a log line every `INTERVAL_SECONDS`. Short work has none.

    Attributes:
        n, total: done, and to be done; total None: unknown.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: int | None = None,
        desc: str = "",
        unit: str = "it",
        disable: bool = False,
        **_: Any,
    ):
        self._iterable, self._desc, self._unit, self._disable = iterable, desc, unit.strip(), disable
        self.n, self.total = 0, len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self._began = self._spoken = time.monotonic()
        self._postfix = ""

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self.n += n
        now = time.monotonic()
        if self._disable or now - self._spoken < INTERVAL_SECONDS:
            return
        self._spoken = now
        done = f"{self.n} {self._unit}" if not self.total else f"{self.n} of {self.total} {self._unit}"
        left = ""
        if self.total and self.n:
            left = f", {(now - self._began) * (self.total - self.n) / self.n:.0f} s left"
        _logger.info("%s: %s%s%s", self._desc, done, left, self._postfix and f" ({self._postfix})")

    def set_postfix_str(self, text: str) -> None:
        """What is being done, for the next line."""
        self._postfix = text

    def close(self) -> None:
        """Does nothing: there is no bar to take away."""

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()
