"""One run, one writer: a lock on the run's directory that dies with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

LOCK_FILE = "lock"


class WorkdirLock:
    """Holds the directory until `release`, or until the process ends in whatever way.

    The kernel keeps the lock (flock), not the file's being there: what a dead process left behind locks nothing. On a
    network file system it holds between machines where the system passes flock on to its server, as NFS 4 does.

    Args:
        workdir: the run's directory; created if it is not there.

    Raises:
        ValueError: another process holds it, and the message says which; or the directory cannot be locked.
    """

    def __init__(self, workdir: Path):
        path = workdir / LOCK_FILE
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"workdir={str(workdir)!r}: cannot be written ({error})") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(self._descriptor)
            self.release()
            raise ValueError(
                f"workdir={str(workdir)!r}: is in use by {holder}; one run has one writer. Use another --workdir, or "
                "end that process first"
            ) from error
        except OSError as error:
            self.release()
            raise ValueError(
                f"workdir={str(workdir)!r}: its file system offers no locks ({error}); use another --workdir"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content.encode(), 0)
        except OSError:  # a full disk: the name of the holder is missing, the lock holds all the same
            pass

    def release(self) -> None:
        """Lets the directory go; a second call does nothing. The file stays: removing it would race with the next."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # being written just now
        return "another process"
