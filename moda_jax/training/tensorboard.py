"""TensorBoard events, written in the caller's thread.

tensorboardX's own SummaryWriter hands events to a thread; on a full disk that thread dies, its queue fills, and the run
that waits for it hangs.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

_logger = logging.getLogger(__name__)


class EventFile:
    """Scalars in an events file. What cannot be written is left out, and said once; then a new file is tried.

    Args:
        directory: created if it is not there.
        purge_step: viewers drop what earlier files hold from this step on; None: nothing.
    """

    def __init__(self, directory: Path, purge_step: int | None = None):
        self._directory = directory
        self._purge_step = purge_step
        self._numbers = itertools.count()
        self._suffix = ""
        self._file: EventsWriter | None = None
        self._holds_scalars = False
        self._is_failing = False
        self.write(0, {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's scalars by their names, and hands them to the system."""
        try:
            if self._file is None:
                self._file = self._open()
            for name, value in values.items():
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._file.flush()
            self._holds_scalars = self._holds_scalars or bool(values)
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                _logger.error("%s: TensorBoard events are left out from step %d on (%s)", self._directory, step, error)
            self._is_failing = True
            self._abandon()

    def close(self) -> None:
        """Closes the file."""
        self._abandon()

    def _open(self) -> EventsWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._suffix, self._holds_scalars = f".{os.getpid()}.{next(self._numbers)}", False
        file = EventsWriter(str(self._directory / "events"), self._suffix)
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            file.write_event(Event(wall_time=time.time(), step=self._purge_step, session_log=start))
            self._purge_step = None
        return file

    def _abandon(self) -> None:
        """Lets the file go; a record that was cut off ends it for a reader, and without any it goes away."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                if not self._is_failing:
                    raise
        if self._is_failing and not self._holds_scalars:
            for path in self._directory.glob(f"*{self._suffix}"):
                path.unlink()
