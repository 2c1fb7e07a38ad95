"""When one process of a run is lost, the others end: soon, in order, with a line that names it and the step.

Without this the others wait in a collective for somebody who does not come, until JAX aborts them with a page of stack.

Every process gives a sign of life once a second, a counter in the store of JAX's coordination service, from a thread of
its own. Process 0 reads all counters; one that stands still for too long is lost. The others read what process 0 found,
and watch process 0. A process that ends by an error says so in place of its counter. Where process 0 itself is gone JAX
aborts the others within milliseconds: that abort is caught, and ends in the same way.

Whoever ends writes the line to stderr, every thread's stack to a file, and leaves with `ExitCode.PEER_LOST`, without
JAX's shutdown, which waits for all. Process 0 goes last: the store dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax

from moda_jax.exit_codes import ExitCode

_logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
LINGER_SECONDS = 2.5  # process 0 stays so long after its verdict, so that all can read it
_BEATS = "moda/beats/"
_HOSTS = "moda/hosts/"
_NEWS = "moda/news/"
_FIRST = _NEWS + "beat"
_LOST = _NEWS + "lost"
_ALL_DONE = _NEWS + "all done"
_ENDED = "ended: "
_DONE = "done"
# What a collective raises when a peer has gone begins with a status of the RPC library; the type varies.
_RPC_ERRORS = (RuntimeError, ValueError)
_STATUSES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION")


class Counters:
    """Which counters stand still.

    Args:
        seconds: for so long a counter may stand still.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._seen: dict[str, tuple[str, float]] = {}

    def lost(self, values: dict[str, str], now: float) -> tuple[str, str] | None:
        """The first name whose process is lost, and how; None if all live.

        Args:
            values: what the processes have written last, by name.
            now: seconds of any clock.
        """
        for name, value in sorted(values.items()):
            before, since = self._seen.get(name, (None, now))
            if value != before:
                since = now
            self._seen[name] = (value, since)
            if value.startswith(_ENDED):
                return name, value.removeprefix(_ENDED)
            if value != _DONE and now - since >= self._seconds:
                return name, f"no sign of life for {now - since:.0f} s"
        return None


class Peers:
    """This process's part in the watch; one per process.

    Args:
        client: of JAX's distributed runtime.
        address: HOST:PORT of process 0.
        index, count: of this process, and how many there are.
        seconds: `train.peer_timeout_seconds`: the others have ended so long after a process was lost.
        leave: ends the process with a code.
    """

    def __init__(
        self,
        client: Any,
        address: str,
        index: int,
        count: int,
        seconds: float,
        leave: Callable[[int], None] = os._exit,
    ):
        self._client, self._address, self._index, self._count, self._seconds = client, address, index, count, seconds
        self._leave = leave
        self._counters = Counters(0.6 * seconds)  # the rest is for telling the others
        self._step: int | None = None
        self._stream: TextIO = sys.stderr
        self._stacks: TextIO | None = None
        self._done, self._all_done, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Begins to watch, and to catch aborts."""
        self._beat(0)
        self._catch_aborts()
        self._thread.start()

    def at_step(self, step: int) -> None:
        """The step that is being done, for the line."""
        self._step = step

    def write_to(self, directory: Path) -> None:
        """From here on what native libraries write to stderr, and in the end the stacks, goes to a file in there.

        Python's own lines go where they went. Without a directory that can be written, all stays as it is.
        """
        path = directory / f"{self._index}.log"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._stacks = path.open("a", encoding="utf-8")
        except OSError as error:
            _logger.warning("%s: cannot be written (%s); stacks of a lost process's peers go to stderr", path, error)
            return
        sys.stderr.flush()
        self._stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        if sys.stderr is sys.__stderr__:
            sys.stderr = sys.__stderr__ = self._stream
        os.dup2(self._stacks.fileno(), 2)
        faulthandler.enable(self._stacks)

    def await_verdict(self, error: BaseException) -> None:
        """To be asked about an exception: if it may come from the loss of a peer, waits until that is clear.

        Does not return if a peer is lost.
        """
        if isinstance(error, jax.errors.JaxRuntimeError) or str(error).startswith(_STATUSES):
            _logger.debug("%s", error)
            time.sleep(self._seconds + LINGER_SECONDS)

    def end(self, code: int, reason: str) -> None:
        """This process ends by an error: tells the others why, and leaves without waiting for them."""
        self._stopped.set()
        with contextlib.suppress(*_RPC_ERRORS):  # the store may be gone, and there is nobody left to tell
            self._put(_BEATS + str(self._index), f"{_ENDED}it ended with exit code {code}: {reason}")
            if self._index == 0:
                self._put(
                    _LOST, f"process 0 ({socket.gethostname()}) was lost: it ended with exit code {code}: {reason}"
                )
        self._go(code)

    def stop(self) -> None:
        """This process is done; returns when all are, or does not return if one is lost meanwhile."""
        self._done.set()
        while self._thread.is_alive() and not self._all_done.wait(BEAT_SECONDS):
            pass
        self._stopped.set()

    # The watching thread.

    def _watch(self) -> None:
        number = 0
        while not self._stopped.wait(BEAT_SECONDS):
            number += 1
            try:
                self._beat(number)
                verdict = self._judge() if self._index == 0 else self._read()
            except _RPC_ERRORS as error:
                if self._stopped.is_set() or self._index == 0:
                    return
                if not self._is_reachable():
                    self._lost(f"process 0 at {self._address} was lost: it cannot be reached")
                _logger.debug("the coordination service: %s", error)
                continue
            if self._all_done.is_set():
                return
            if verdict is not None and not self._stopped.is_set():
                self._lost(verdict)

    def _beat(self, number: int) -> None:
        if self._index == 0:
            self._put(_FIRST, str(number))
        else:
            self._put(_BEATS + str(self._index), _DONE if self._done.is_set() else str(number))
        if number == 0 and self._index:
            self._put(_HOSTS + str(self._index), socket.gethostname())

    def _judge(self) -> str | None:
        """Process 0: the first process that is lost, as a sentence."""
        beats = {key.removeprefix(_BEATS): value for key, value in self._client.key_value_dir_get(_BEATS)}
        # JAX's start has ended in all of them, so one that never counted is lost too.
        beats = {str(index): beats.get(str(index), "") for index in range(1, self._count)}
        if self._done.is_set() and set(beats.values()) == {_DONE}:
            self._put(_ALL_DONE, _DONE)
            self._all_done.set()
        found = self._counters.lost(beats, time.monotonic())
        if found is None:
            return None
        host = dict(self._client.key_value_dir_get(_HOSTS)).get(_HOSTS + found[0], "host unknown")
        verdict = f"process {found[0]} ({host}) was lost: {found[1]}"
        self._put(_LOST, verdict)
        return verdict

    def _read(self) -> str | None:
        """The others: what process 0 found, and whether it lives."""
        news = dict(self._client.key_value_dir_get(_NEWS))
        if _LOST in news:
            return news[_LOST]
        if _ALL_DONE in news:
            self._all_done.set()
            return None
        found = self._counters.lost({"0": news.get(_FIRST, "")}, time.monotonic())
        return None if found is None else f"process 0 at {self._address} was lost: {found[1]}"

    def _put(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    # The end.

    def _lost(self, verdict: str) -> None:
        """Says it, keeps the stacks, and ends the process. Only the first call does; others wait for the end."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)
            return
        step = "before the first step" if self._step is None else f"at step {self._step}"
        where = ""
        with contextlib.suppress(OSError):
            stacks = sys.__stderr__ if self._stacks is None else self._stacks
            faulthandler.dump_traceback(stacks, all_threads=True)
            where = "" if self._stacks is None else f". Stacks: {self._stacks.name}"
        with contextlib.suppress(OSError):
            self._stream.write(
                f"error: process {self._index} of {self._count} ends {step}, because {verdict}. The same command "
                f"resumes from the newest checkpoint{where}\n"
            )
        self._go(ExitCode.PEER_LOST)

    def _go(self, code: int) -> None:
        if self._index == 0:
            time.sleep(LINGER_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._leave(code)

    def _catch_aborts(self) -> None:
        """JAX aborts this process as soon as process 0 has gone: SIGABRT, in a thread of JAX's."""
        if self._index == 0:
            return
        signature = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._on_abort = signature(self._aborted)  # kept: C holds no reference
        install = ctypes.CDLL(None).signal
        install.argtypes, install.restype = [ctypes.c_int, signature], ctypes.c_void_p
        install(signal.SIGABRT, self._on_abort)

    def _aborted(self, number: int) -> None:
        """In the thread that aborts. Returning from here lets the abort go on."""
        if not self._is_reachable():
            self._lost(f"process 0 at {self._address} was lost: it cannot be reached")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(sys.__stderr__ if self._stacks is None else self._stacks, all_threads=True)

    def _is_reachable(self) -> bool:
        """Whether process 0 still listens. By a socket: JAX's own thread may be the one that aborts."""
        host, _, port = self._address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
                return True
        except OSError:
            return False


_peers: Peers | None = None


def current() -> Peers | None:
    """This process's watch; None for a run of one process."""
    return _peers


def start(address: str, seconds: float) -> Peers:
    """Begins the watch over the processes that `jax.distributed.initialize` has brought together."""
    global _peers
    from jax._src import distributed  # its client has no public name

    state = distributed.global_state
    _peers = Peers(state.client, address, state.process_id, state.num_processes, seconds)
    _peers.start()
    return _peers
