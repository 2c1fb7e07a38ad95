"""A run that hangs says where: every thread's stack, when no step was done for too long."""

from __future__ import annotations

import faulthandler
import sys
import time
from typing import TextIO


class Watchdog:
    """Writes all threads' stacks to stderr when `beat` was not called for `seconds`, and again after every such time.

    The timer is a C thread that needs no GIL, so it speaks even when Python cannot. The run is not ended: what hangs
    may be a slow disk. One watchdog per process.

    Args:
        seconds: 0: never.
        stream: a file with a descriptor; None for stderr.
    """

    _REARM_SECONDS = 1.0  # arming starts a thread: not every step needs it

    def __init__(self, seconds: float, stream: TextIO | None = None):
        self._seconds = seconds
        self._stream = sys.__stderr__ if stream is None else stream
        self._armed = 0.0

    def beat(self) -> None:
        """Something went on: the time starts anew."""
        now = time.monotonic()
        if self._seconds and now - self._armed >= min(self._REARM_SECONDS, self._seconds / 4):
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._stream)
            self._armed = now

    def close(self) -> None:
        """Stops watching."""
        if self._armed:
            faulthandler.cancel_dump_traceback_later()
            self._armed = 0.0
