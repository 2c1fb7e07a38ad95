import json
import os
import signal
import socket

import pytest
from support.documents import start_python

from moda_jax.training.lock import WorkdirLock

HOLD = """
import sys, time
from pathlib import Path
from moda_jax.training.lock import WorkdirLock
lock = WorkdirLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_one_is_dead(tmp_path):
    holder = start_python(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        expected = rf"workdir='{tmp_path}': is in use by process {holder.pid} on {socket.gethostname()} since \d{{4}}-"
        for _ in range(2):
            with pytest.raises(ValueError, match=expected):
                WorkdirLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
        lock = WorkdirLock(tmp_path)  # the file is still there; the lock died with its owner
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        lock.release()
    finally:
        holder.kill()
        holder.communicate()


def test_a_released_directory_can_be_taken_again(tmp_path):
    first = WorkdirLock(tmp_path / "new")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        WorkdirLock(tmp_path / "new")
    first.release()
    first.release()
    WorkdirLock(tmp_path / "new").release()


def test_a_directory_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"workdir=.*file': cannot be written"):
        WorkdirLock(tmp_path / "file")


def test_a_holder_without_a_name_holds_all_the_same(tmp_path):
    lock = WorkdirLock(tmp_path)
    (tmp_path / "lock").write_text("")
    with pytest.raises(ValueError, match="is in use by another process"):
        WorkdirLock(tmp_path)
    lock.release()
