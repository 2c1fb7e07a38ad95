import re
import time

from support.documents import start_python

from moda_jax.training.watchdog import Watchdog

STUCK = """
import sys, threading, time, hashlib
from moda_jax.training.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

threading.Thread(target=waits_for_ever, daemon=True).start()
watchdog = Watchdog(1.0)

def hangs():
    time.sleep(2.5)

for _ in range(6):
    watchdog.beat()
    time.sleep(0.1)
print("steps are done", file=sys.stderr, flush=True)
hangs()
print("went on", file=sys.stderr, flush=True)
watchdog.close()
time.sleep(1.2)
"""


def test_every_threads_stack_is_printed_when_no_step_is_done():
    process = start_python(STUCK)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    before, _, after = errors.partition("steps are done\n")
    assert before == ""  # while steps are done it says nothing
    stuck, _, closed = after.partition("went on\n")
    assert closed == ""
    assert stuck.count("Timeout (0:00:01") >= 2  # and again, as long as it lasts
    assert re.search(r"in hangs\n", stuck) and re.search(r"in waits_for_ever\n", stuck)


def test_zero_seconds_is_never(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        watchdog = Watchdog(0.0, stream)
        watchdog.beat()
        time.sleep(0.05)
        watchdog.close()
    assert (tmp_path / "log").read_text() == ""
