"""SIGTERM, SIGINT and preemption notices: the first asks the run to stop in good order, the second signal ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

import jax
from jax.experimental import multihost_utils

from moda_jax.exit_codes import ExitCode

_logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody asked the run to stop; a context manager that listens while the run trains.

    The first SIGTERM or SIGINT sets `reason`; the second ends the process at once, with the exit code that shells give
    to the signal. A thread of its own reads the signals from a pipe, so neither waits for a long call into XLA.

    Where `jax.distributed` is initialised, its preemption service listens to SIGTERM instead and tells all processes:
    they stop at the same step. A SIGINT is passed on to it, and a second SIGINT ends the process. Listening needs the
    main thread; elsewhere (a notebook's worker) signals do what they did before.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._count = 0
        self._previous: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            _logger.info("not in the main thread: signals are not caught")
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="stop signals", daemon=True)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in _SIGNALS:
            if number == signal.SIGTERM and _has_preemption_service():
                continue
            self._previous[number] = signal.signal(number, _do_nothing)  # so that Python writes to the pipe
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._pipe[1])  # the thread reads to the end
        self._thread.join()
        os.close(self._pipe[0])
        self._pipe = None

    def reached_at(self, step: int) -> bool:
        """Whether the run must stop after this step; to be asked once after every step, in all processes alike."""
        if _has_preemption_service():
            if multihost_utils.reached_preemption_sync_point(step):
                self.reason = self.reason or "preemption notice"
                return True
            return False
        return self.reason is not None

    def _listen(self, pipe: int) -> None:
        while data := os.read(pipe, 16):
            for number in data:
                if number in self._previous:
                    self._received(signal.Signals(number))

    def _received(self, received: signal.Signals) -> None:
        self._count += 1
        if self._count > 1:
            os.write(2, f"{received.name} a second time: ending at once, without a checkpoint\n".encode())
            os._exit(128 + received)
        self.reason = received.name
        _logger.warning(
            "%s: stopping after this step and a checkpoint; a second signal ends the run at once", self.reason
        )
        if _has_preemption_service():
            os.kill(os.getpid(), signal.SIGTERM)  # all processes must stop at one step


@contextlib.contextmanager
def stops_before_training() -> Iterator[None]:
    """SIGTERM in a run's set-up ends the process with `ExitCode.STOPPED`: nothing is lost, and the run goes on later.

    Without a handler the first process of a container would not even notice. In a run of many processes JAX takes the
    signal from its start on, and the run stops at its first step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.stderr.write("SIGTERM before the first step: stopped; the same command begins again\n")
        sys.exit(int(ExitCode.STOPPED))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if not _has_preemption_service():  # whose own handler has taken the place of ours
            signal.signal(signal.SIGTERM, before)


def _has_preemption_service() -> bool:
    """Whether this process belongs to a group that passes preemption notices around."""
    return jax.distributed.is_initialized() and jax.config.jax_enable_preemption_service


def _do_nothing(number: int, frame: object) -> None:
    """A Python handler must be there for the wake-up pipe to be written to."""
