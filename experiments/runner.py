"""Runs what is missing of a plan: one process per device, by seed, longest first, and keeps the results up to date.

    WORKDIR/corpus/               the prepared corpus, see `experiments.corpus`
    WORKDIR/cache/                compiled programs, shared by all runs
    WORKDIR/PLAN/ARM/seed_N/      (PLAN_tiny for a toy) a run's directory; result.json in it says that the run is done
    WORKDIR/PLAN/PLAN.json        the results so far, see `experiments.results`

The runner keeps no state of its own: what is done is what has a result.json. A stop (Ctrl-C, SIGTERM) lets every run
save and end; killed outright, its runs do so by themselves. The same command then goes on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import moda_jax
from experiments import corpus as corpus_lib
from experiments import results as results_lib
from experiments.plan import Arm, Plan
from experiments.worker import ORDER_FILE, RESULT_FILE
from moda_jax.exit_codes import ExitCode
from moda_jax.quantities import duration, quantity
from moda_jax.training.lock import LOCK_FILE, WorkdirLock
from moda_jax.training.metrics_file import read_metrics

_logger = logging.getLogger(__name__)

LOG_FILE = "run.log"
_PACKAGE = sys.modules["experiments"].__spec__.name  # moda_jax.experiments, where it is installed
_ROOT = Path(__file__).parents[1]
WORKER = ("-m", f"{_PACKAGE}.worker")
CPU = "cpu"
POLL_SECONDS = 0.5
TABLE_SECONDS = 30.0  # between two tables where stderr is no terminal
LIVE_SECONDS = 1.0
_PROBE_TOKENS = 2**17
_TINY_PROBE_TOKENS = 2**9
_LOG_LINES = 12  # of a failed run, in the runner's own log


@dataclasses.dataclass
class Job:
    """One run of the plan."""

    arm: Arm
    seed: int
    directory: Path
    cost: float
    device: str = ""
    process: subprocess.Popen | None = None
    began: float = 0.0
    failure: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm.name} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether the run has its result."""
        return (self.directory / RESULT_FILE).is_file()


class Runner:
    """Runs a plan.

    Args:
        plan: what to run.
        workdir: holds all plans' runs.
        devices: from `find_devices`.
        data: a prepared corpus's directory.
        commit: of the tree, for the results; None: asked of git.
        returned: a directory that gets the small results, beside the plan's own.
        stream: where the table goes.
        worker: the program that does one run, as Python's arguments; the run's directory and this process's
            id are added.

    Raises:
        ValueError: another runner works here; or the directory holds results of another budget.
    """

    def __init__(
        self, plan: Plan, workdir: Path, devices: Sequence[str], data: Path, *, commit: str | None = None,
        returned: Path | None = None, stream: TextIO = sys.stderr, worker: Sequence[str] = WORKER,
    ):  # fmt: skip
        self._plan = plan
        self._directory = workdir / (f"{plan.name}_tiny" if plan.is_tiny else plan.name)
        self._lock = WorkdirLock(self._directory)
        self.devices = list(devices)
        self._data = data
        self._cache = workdir / "cache"
        self._commit = commit or _git_commit()
        self._returned = returned
        self._stream = stream
        self._worker = tuple(worker)
        self._stop_signals = 0
        self._drawn, self._lines = 0.0, 0
        self.jobs = [
            Job(arm, seed, self._directory / arm.name / f"seed_{seed}", plan.cost(arm))
            for seed in plan.seeds
            for arm in sorted(plan.chosen_arms, key=plan.cost, reverse=True)
        ]
        self._corpus = corpus_lib.facts(data)

    @property
    def results_file(self) -> Path:
        """Where the plan's results are kept."""
        return self._directory / f"{self._plan.name}.json"

    def run(self) -> ExitCode:
        """Runs everything that is missing: FINISHED all done, CANNOT_GO_ON some failed, STOPPED."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._lock.release()

    def _run(self) -> ExitCode:
        self._cache.mkdir(parents=True, exist_ok=True)
        self._collect()
        waiting = [job for job in self.jobs if not job.is_done]
        done = len(self.jobs) - len(waiting)
        _logger.info("%s: %d runs, %d done before, on %s", self._plan.name, len(self.jobs), done, self.devices)
        running: list[Job] = []
        while running or (waiting and not self._stop_signals):
            free = [device for device in self.devices if device not in {job.device for job in running}]
            for device in free if not self._stop_signals else ():
                job = next((job for job in waiting if not _is_locked(job.directory)), None)
                if job is None:
                    break  # another process still holds what is left; it is about to end
                waiting.remove(job)
                self._start(job, device)
                running.append(job)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if self._ended(job):
                    waiting.insert(0, job)
            self._show(running, waiting)
            time.sleep(POLL_SECONDS)
        self._collect()
        failed = [job for job in self.jobs if job.failure]
        missing = [job for job in self.jobs if not job.is_done and not job.failure]
        for job in failed:
            _logger.error("failed: %s (%s), log %s", job.name, job.failure, job.directory / LOG_FILE)
        if missing:
            _logger.warning("stopped: %d runs are not finished; the same command goes on", len(missing))
            return ExitCode.STOPPED
        return ExitCode.CANNOT_GO_ON if failed else ExitCode.FINISHED

    def _start(self, job: Job, device: str) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        config = self._plan.config(job.arm, job.seed, self._data, self._cache)
        order = {
            "plan": self._plan.name,
            "arm": job.arm.name,
            "budget": self._plan.budget_facts(),
            "config": config.to_dict(),
            "corpus": self._corpus,
            "commit": self._commit,
            "evaluation": {
                name: str(self._data / corpus_lib.EVALUATION / entry["directory"])
                for name, entry in (self._corpus["evaluation"].items() if self._plan.evaluates else ())
            },
            "probes": self._plan.probes,
            "probe_tokens": _TINY_PROBE_TOKENS if self._plan.is_tiny else _PROBE_TOKENS,
        }
        results_lib.write_json(job.directory / ORDER_FILE, order)
        environment = dict(os.environ)
        if device == CPU or device.startswith(f"{CPU}:"):
            environment["JAX_PLATFORMS"] = CPU
        else:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with (job.directory / LOG_FILE).open("ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, *self._worker, str(job.directory), str(os.getpid())], env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                cwd=_ROOT if _PACKAGE == "experiments" else job.directory,
            )  # fmt: skip
        job.device, job.began = device, time.monotonic()
        _logger.info("started %s on %s: %d steps", job.name, device, config.train.num_steps)

    def _ended(self, job: Job) -> bool:
        """Takes note of a process that has ended; whether the run is to be started again."""
        code, seconds = job.process.returncode, duration(time.monotonic() - job.began)
        job.device = ""
        if code == ExitCode.FINISHED and job.is_done:
            _logger.info("done %s in %s", job.name, seconds)
            self._collect()
        elif code == ExitCode.STOPPED or self._stop_signals:
            _logger.info("stopped %s after %s", job.name, seconds)
            return not self._stop_signals
        else:
            job.failure = f"exit code {code} after {seconds}"
            tail = (job.directory / LOG_FILE).read_text(errors="replace").splitlines()[-_LOG_LINES:]
            _logger.error("failed %s: %s\n%s", job.name, job.failure, "\n".join(f"    {line}" for line in tail))
        return False

    def _collect(self) -> None:
        """Brings the plan's results up to date, here and in the directory that is given back: all that lie here."""
        places = [path for arm in self._plan.arms for path in (self._directory / arm.name).glob(f"*/{RESULT_FILE}")]
        found = [json.loads(path.read_text()) for path in places]
        results_lib.save(self.results_file, results_lib.results_of(self._plan, found))
        if self._returned is not None:
            self._returned.mkdir(parents=True, exist_ok=True)
            results_lib.copy(self.results_file, self._returned / self.results_file.name)

    def _stop(self, number: int, frame: object) -> None:
        """Passes a stop on. A second one ends the runs at once."""
        self._stop_signals += 1
        for job in self.jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)
        _logger.warning("%s: the runs save and stop", signal.Signals(number).name)

    # The table.

    def _show(self, running: list[Job], waiting: list[Job]) -> None:
        live = self._stream.isatty()
        now = time.monotonic()
        if now - self._drawn < (LIVE_SECONDS if live else TABLE_SECONDS):
            return
        self._drawn = now
        lines = self.table(running, waiting)
        if live and self._lines:
            self._stream.write(f"\x1b[{self._lines}A\x1b[J")
        columns = shutil.get_terminal_size().columns if live else 200
        self._stream.write("".join(f"{line[: columns - 1]}\n" for line in lines))
        self._stream.flush()
        self._lines = len(lines)

    def table(self, running: list[Job], waiting: list[Job]) -> list[str]:
        """The running runs, line by line, and what is done and left."""
        lines, left = [], sum(job.cost for job in waiting)
        for job in running:
            entries = read_metrics(job.directory) or [{}]
            step, steps = entries[-1].get("step", 0), self._plan.steps(job.arm)
            left += job.cost * (1 - step / steps)
            loss, speed = entries[-1].get("loss"), entries[-1].get("tokens_per_second")
            lines.append(
                f"{job.device:>6}  {job.name:20} {step:>6}/{steps:<6} loss {'-' if loss is None else f'{loss:.4f}':>8}"
                f"  {'-' if speed is None else quantity(speed):>8} tokens/s  {duration(time.monotonic() - job.began)}"
            )
        done = [job for job in self.jobs if job.is_done]
        failed = [job for job in self.jobs if job.failure]
        seconds = self._seconds_per_cost(done)
        eta = duration(left * seconds / len(self.devices)) if seconds else "?"
        lines.append(
            f"{self._plan.name}: {len(done)} done, {len(running)} running, {len(waiting)} waiting"
            + (f", {len(failed)} failed: {', '.join(job.name for job in failed)}" if failed else "")
            + f" | {eta} left"
        )
        return lines

    def _seconds_per_cost(self, done: list[Job]) -> float | None:
        """From the runs that are done, training and all around it."""
        pairs = []
        for job in done:
            seconds = json.loads((job.directory / RESULT_FILE).read_text())["train_seconds"]
            if seconds:
                pairs.append((seconds, job.cost))
        return sum(s for s, _ in pairs) / sum(c for _, c in pairs) if pairs else None


def find_devices(wanted: str) -> list[str]:
    """Names for `CUDA_VISIBLE_DEVICES`, or "cpu".

    Args:
        wanted: "all", a number of GPUs, "cpu", or "cpu:N": N processes side by side on the CPU.

    Raises:
        ValueError: not of this form, or so many GPUs are not there.
    """
    kind, _, count = wanted.partition(":")
    if kind == CPU:
        if count and not count.isdigit():
            raise ValueError(f"--devices={wanted}: expected cpu or cpu:N")
        return [CPU] if not count else [f"{CPU}:{i}" for i in range(max(1, int(count)))]
    gpus = _gpus()
    if wanted == "all":
        return gpus or [CPU]
    if not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"--devices={wanted}: expected all, a number, cpu or cpu:N")
    if int(wanted) > len(gpus):
        raise ValueError(f"--devices={wanted}: this machine has {len(gpus)} GPUs")
    return gpus[: int(wanted)]


def _gpus() -> list[str]:
    """The GPUs' numbers, without starting JAX: a process that has met a device holds its memory."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
        count = sum(line.startswith("GPU ") for line in listing.splitlines())
    except (OSError, subprocess.CalledProcessError):
        count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return [str(number) for number in range(count)]


def _is_locked(directory: Path) -> bool:
    """Whether a process, of a runner that was killed, still trains there."""
    try:
        with (directory / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _git_commit() -> str:
    """The tree's commit, with "+" for changes on top; the version, where there is no repository."""
    if not (_ROOT / ".git").exists():  # of a repository around an installed package this is no commit
        return f"version {moda_jax.__version__}"
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10"], cwd=_ROOT, capture_output=True, text=True,
            check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"version {moda_jax.__version__}"
    return commit
