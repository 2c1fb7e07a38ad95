"""A small plan run by `experiments.runner` with `fake_worker`, in a process of its own: what is killed in tests.

python -m support.plan_process WORKDIR DATA RETURNED STEPS
"""

import functools
import logging
import sys
from pathlib import Path

from configs import depth_comparison
from experiments.plan import Arm, Budget, Corpus, Plan
from experiments.runner import Runner

WORKER = Path(__file__).parent / "fake_worker.py"


def small_plan(*names: str, steps: int = 20, seeds: tuple[int, ...] = (0, 1)) -> Plan:
    """Arms that differ in name alone."""
    config = functools.partial(depth_comparison.get_config, "none")
    budget = Budget(steps=steps, batch_size=4, sequence_length=64, learning_rate=1e-3, warmup_steps=1)
    arms = tuple(Arm(name, config) for name in names)
    corpus = Corpus("some text", "none", "a note", 512)
    return Plan("small", "?", arms, ((names[-1], names[0]),), seeds, budget, corpus)


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    workdir, data, returned = map(Path, sys.argv[1:4])
    plan = small_plan("a", "bad", "b", steps=int(sys.argv[4]))
    return Runner(plan, workdir, ["cpu:0", "cpu:1"], data, returned=returned, worker=(str(WORKER),)).run()


if __name__ == "__main__":
    sys.exit(main())
