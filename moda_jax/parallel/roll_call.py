"""Waiting for the other processes at the start, with the names of those that are missing.

JAX's own start waits without a word. So before it, every process reports to process 0 on the coordinator's port, which
is free until then; when all are there process 0 lets them go and frees the port for JAX.

    process k -> 0   b"moda 3 hostname\\n"
    0 -> process k   b"go\\n"
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time

_logger = logging.getLogger(__name__)

SPEAK_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_GREETING = b"moda "
_GO = b"go\n"
_NAMED = 8  # of the missing ones


class PeersMissingError(RuntimeError):
    """Not all processes came in time."""


def roll_call(address: str, count: int, index: int, *, seconds: float = 300.0, speak: float = SPEAK_SECONDS) -> None:
    """Returns when all processes of the run are there.

    Args:
        address: HOST:PORT of process 0.
        count, index: processes of the run, and which one this is.
        seconds: how long to wait.
        speak: a line on who is awaited every so many seconds.

    Raises:
        ValueError: the address is not of this form, or process 0 cannot listen there.
        PeersMissingError: not all came in time; the message names who is missing.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator-address={address}: expected HOST:PORT")
    waiting = _Waiting(seconds, speak)
    if index == 0:
        _call(int(port), count, waiting)
    else:
        _report(host.strip("[]"), int(port), index, waiting)


class _Waiting:
    """The clock: when to speak, and when to give up."""

    def __init__(self, seconds: float, speak: float):
        self._began = time.monotonic()
        self._seconds, self._speak, self._lines = seconds, speak, 0

    def go_on(self, whom: str) -> None:
        """Speaks if it is time to.

        Raises:
            PeersMissingError: the time is over.
        """
        waited = time.monotonic() - self._began
        if waited >= self._seconds:
            raise PeersMissingError(f"gave up after {waited:.0f} s of waiting for {whom}; start all processes again")
        if waited >= self._speak * (self._lines + 1):
            self._lines += 1
            _logger.warning("waiting for %s (for %.0f s)", whom, waited)


def _call(port: int, count: int, waiting: _Waiting) -> None:
    """Process 0: hears all, then lets them go."""
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as open_sockets:
        listening = open_sockets.enter_context(_listen(port))
        while len(present) < count - 1:
            missing = [index for index in range(1, count) if index not in present]
            waiting.go_on(_names(missing, count))
            if not select.select([listening], [], [], _RETRY_SECONDS)[0]:
                _drop_closed(present)
                continue
            peer, _ = listening.accept()
            open_sockets.enter_context(peer)
            peer.settimeout(_RETRY_SECONDS)
            index = _heard(peer)
            if index is not None and 0 < index < count:
                present[index] = peer
            else:
                peer.close()
        listening.close()
        for peer in present.values():
            with contextlib.suppress(OSError):  # one that died just now is missed at the next step of the start
                peer.sendall(_GO)
        for peer in present.values():  # they close first, so that no connection keeps the port
            with contextlib.suppress(OSError):
                peer.recv(1)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(f"--coordinator-address: process 0 cannot listen on port {port} ({error.strerror})") from error


def _heard(peer: socket.socket) -> int | None:
    """The number that a process reports; None for what is no process of a run."""
    try:
        words = peer.recv(300).split()
        return int(words[1]) if len(words) == 3 and words[0] == _GREETING.strip() else None
    except (OSError, ValueError):
        return None


def _drop_closed(present: dict[int, socket.socket]) -> None:
    """Forgets processes that have gone again."""
    for index, peer in list(present.items()):
        if select.select([peer], [], [], 0)[0]:  # nothing is said before "go": readable means closed
            peer.close()
            del present[index]


def _report(host: str, port: int, index: int, waiting: _Waiting) -> None:
    """Another process: reports, and waits to be let go. Only one that cannot be heard speaks."""
    reason = ""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as call:
                call.sendall(_GREETING + b"%d %s\n" % (index, socket.gethostname().encode()))
                while True:
                    if select.select([call], [], [], _RETRY_SECONDS)[0]:
                        answer = call.recv(64)
                        if answer:  # also JAX's own service, which begins when all are there
                            return
                        reason = "it has gone again"
                        break
                    waiting.go_on("the others; process 0 has heard this one")
        except OSError as error:
            reason = error.strerror or str(error)
        waiting.go_on(f"process 0 at {host}:{port} ({reason})")
        time.sleep(_RETRY_SECONDS)


def _names(missing: list[int], count: int) -> str:
    shown = ", ".join(map(str, missing[:_NAMED]))
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"process{'es' if len(missing) > 1 else ''} {shown}{more} of {count}"
