"""Stands for `experiments.worker`: counts to what its order says, keeps how far it came, and writes a result.

It holds the directory's lock, saves and stops at a SIGTERM (exit code 75), and appends a line per start to starts.txt
and a line per counted step to steps.txt. An arm called "bad" fails.
"""

import fcntl
import json
import signal
import sys
import time
from pathlib import Path

SECONDS_PER_STEP = 0.05


def main() -> int:
    directory = Path(sys.argv[1])
    lock = (directory / "lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    order = json.loads((directory / "order.json").read_text())
    with (directory / "starts.txt").open("a") as file:
        file.write("start\n")
    if order["arm"] == "bad":
        sys.stderr.write("the reason why\n")
        return 3
    saved = directory / "saved.txt"
    first = int(saved.read_text()) if saved.is_file() else 0
    for step in range(first + 1, order["config"]["train"]["num_steps"] + 1):
        time.sleep(SECONDS_PER_STEP)
        with (directory / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        if stopped:
            saved.write_text(str(step))
            return 75
    seed = order["config"]["train"]["seed"]
    result = {
        "plan": order["plan"], "arm": order["arm"], "seed": seed, "budget": order["budget"], "corpus": order["corpus"],
        "train_seconds": 1.0, "evaluation": {"validation": {"loss": 2.0 + seed, "targets": 10}},
    }  # fmt: skip
    (directory / "result.new").write_text(json.dumps(result))
    (directory / "result.new").rename(directory / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
