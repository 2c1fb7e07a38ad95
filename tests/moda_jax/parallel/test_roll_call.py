"""Processes are played by threads: a roll call knows sockets only."""

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moda_jax.parallel.roll_call import PeersMissingError, roll_call


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_are_let_go_when_the_last_has_come():
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(roll_call, address, 3, 0)
        second = threads.submit(roll_call, address, 3, 1)
        time.sleep(0.3)
        assert not first.done() and not second.done()
        roll_call(address, 3, 2)
        assert first.result(10) is second.result(10) is None
    with socket.create_server(("", int(address.split(":")[1]))):  # the port is free again, for JAX
        pass


def test_process_0_says_for_whom_it_waits(caplog):
    address = f"127.0.0.1:{free_port()}"
    stranger = threading.Timer(0.1, lambda: socket.create_connection(address.split(":")).close())
    stranger.start()  # a port scanner is nobody
    with ThreadPoolExecutor(1) as threads, caplog.at_level(logging.WARNING, logger="moda_jax"):
        other = threads.submit(roll_call, address, 4, 2, seconds=3)
        with pytest.raises(PeersMissingError, match=r"gave up after \d s of waiting for processes 1, 3 of 4;"):
            roll_call(address, 4, 0, seconds=1.5, speak=0.6)
        with pytest.raises(PeersMissingError, match=r"waiting for process 0 at 127\.0\.0\.1:\d+ \(.+\)"):
            other.result(10)
    assert "waiting for processes 1, 3 of 4 (for 1 s)" in caplog.text


def test_the_others_say_that_process_0_is_not_there(caplog):
    port = free_port()
    with caplog.at_level(logging.WARNING, logger="moda_jax"), pytest.raises(PeersMissingError):
        roll_call(f"127.0.0.1:{port}", 2, 1, seconds=1.2, speak=0.5)
    assert f"waiting for process 0 at 127.0.0.1:{port} (Connection refused)" in caplog.text


def test_a_process_that_goes_again_is_missed_again():
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(roll_call, address, 2, 0, seconds=2)
        for _ in range(100):
            try:
                with socket.create_connection(address.split(":")) as call:
                    call.sendall(b"moda 7 host\n")  # no number of this run
                    assert call.recv(8) == b""
                break
            except OSError:
                time.sleep(0.02)
        with pytest.raises(PeersMissingError, match="process 1 of 2"):
            first.result(10)


def test_a_taken_port_and_a_wrong_address_are_mistakes():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"process 0 cannot listen on port {port} .Address already in use"):
            roll_call(f"127.0.0.1:{port}", 2, 0)
    with pytest.raises(ValueError, match="--coordinator-address=host: expected HOST:PORT"):
        roll_call("host", 2, 1)
