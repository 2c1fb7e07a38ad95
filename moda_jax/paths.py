"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(path: str | Path, field: str) -> Path:
    """The path with a leading "~" or "~user" replaced.

    Args:
        path: as it came.
        field: the field or argument that it came from, for the message.

    Raises:
        ValueError: there is no such home directory; a container may run under a user id that the system does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{field}={str(path)!r}: user {os.getuid()} has no home directory that is known here; write the path "
            "without '~', or set HOME"
        ) from error
