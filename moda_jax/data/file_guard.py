"""Prepared files that must stay as they are while a run reads them."""

from __future__ import annotations

import os
from pathlib import Path


class DataLostError(RuntimeError):
    """A prepared file was changed while a run read it; the message names it."""


class FileGuard:
    """Notices that files changed under their reader.

    One that is overwritten gives other data. One that is merely deleted stays as it was for those who have it open.

    Args:
        paths: the files.
    """

    def __init__(self, *paths: Path):
        self._files = [(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in paths]
        self._states = [self._state(descriptor) for _, descriptor in self._files]

    def check(self) -> None:
        """Asks the system for each file's size and time of change; microseconds.

        Raises:
            DataLostError: one of them is not as it was.
        """
        for (path, descriptor), before in zip(self._files, self._states, strict=True):
            if self._state(descriptor) != before:
                raise DataLostError(
                    f"{path}: was changed while the run read it, so its data is not what the run began with; delete "
                    f"{path.parent} and start again from the last checkpoint"
                )

    def __del__(self) -> None:
        for _, descriptor in getattr(self, "_files", ()):
            os.close(descriptor)

    @staticmethod
    def _state(descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_size, status.st_mtime_ns
