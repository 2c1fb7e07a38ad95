"""A run ends when its runner is gone, however that went: a SIGTERM then lets it save."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> bool:
    """From now on this process gets a SIGTERM when its parent ends.

    Linux alone can do that; elsewhere nothing is done, and such a run trains on until it is finished.

    Args:
        parent: the process that started this one.

    Returns:
        False if the parent has ended already: this process had better not begin.
    """
    if sys.platform != "linux":
        return True
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent
