"""The one live line of a run on a terminal."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from typing import TextIO

_REDRAW_SECONDS = 0.1


class StatusLine:
    """One line on a terminal that is overwritten in place; where the stream is no terminal, a log line now and then.

    Args:
        logger: where the plain lines go.
        stream: None for stderr.
    """

    _shown: StatusLine | None = None  # the one that stands on the terminal: log lines must step around it

    def __init__(self, logger: logging.Logger, stream: TextIO | None = None):
        self._logger = logger
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._text = ""
        self._drawn = -math.inf

    def show(self, text: str, *, milestone: bool) -> None:
        """Shows the text; where there is no terminal, only a milestone is worth a line."""
        if not self._live:
            if milestone:
                self._logger.info("%s", text)
            return
        self._text, StatusLine._shown = text, self
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._draw()

    def close(self) -> None:
        """Takes the line away."""
        if StatusLine._shown is self:
            self.hide()
            StatusLine._shown = None

    def hide(self) -> None:
        """Clears the line until the next `show`."""
        self._stream.write("\r\x1b[K")
        self._stream.flush()
        self._drawn = -math.inf

    def _draw(self) -> None:
        columns = os.get_terminal_size(self._stream.fileno()).columns or 80  # some terminals say 0
        self._stream.write(f"\r\x1b[K{self._text[: columns - 1]}")
        self._stream.flush()
        self._drawn = time.monotonic()

    @classmethod
    def hide_shown(cls) -> None:
        """Clears the line that stands on the terminal, if there is one."""
        if cls._shown is not None:
            cls._shown.hide()
