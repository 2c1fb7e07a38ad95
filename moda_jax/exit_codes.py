"""How a command ends, as a number that launchers, shell loops and schedulers act on. Each number stands here once.

`until python train.py ...; do :; done` and the like should run the command again after STOPPED and PEER_LOST, and stop
at all others.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What the exit code of train.py, generate.py, evaluate.py says.

    Attributes:
        FINISHED: all is done.
        CANNOT_GO_ON: the run cannot go on, see its last line; also a bug, with its traceback.
        USER_ERROR: a mistake in the command, the config or the data: the same command ends in the same way.
        PEER_LOST: another process of the run ended or gave no sign of life; the same command resumes from the newest
            checkpoint (EX_UNAVAILABLE of sysexits.h).
        STOPPED: a signal or a preemption notice stopped the run, and its last step is saved; the same command goes on
            there (EX_TEMPFAIL of sysexits.h).
        INTERRUPTED: Ctrl-C outside of training, or a second one: 128 + SIGINT, as shells count.
    """

    FINISHED = 0
    CANNOT_GO_ON = 1
    USER_ERROR = 2
    PEER_LOST = 69
    STOPPED = 75
    INTERRUPTED = 130


class RunStoppedError(RuntimeError):
    """A run that cannot go on, through no mistake in its config; the message is for the person who started it."""
