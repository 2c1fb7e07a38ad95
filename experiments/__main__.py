"""Experiments: what is compared with what, run, and reported with intervals.

    python -m experiments PLAN [--devices=all] [--seeds=0,1] [--arms=none,depth] [--workdir=DIR] [--tokens=N] [--tiny]
                               [--data=FILE.tar.xz | --corpus=DIR [--tokenizer=FILE]] [--return=DIR]
    python -m experiments speed PLAN [the same] [--steps=200] [--output=FILE]
    python -m experiments prepare PLAN --corpus=DIR --output=FILE.tar.xz [--tokenizer=FILE]
    python -m experiments report PLAN [--from=FILE ...] [--output=DIR]

A run that is done is not done again; interrupted, the same command goes on. `speed` measures the tokens per second that
arms of equal time are planned from. See docs/experiments.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import corpus as corpus_lib
from experiments.plan import PLANS, Plan, load_plan, plan_names
from experiments.runner import Runner, find_devices
from moda_jax.exit_codes import ExitCode


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("experiments", "moda_jax"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        if arguments[:1] == ["prepare"]:
            return _prepare(arguments[1:])
        if arguments[:1] == ["report"]:
            return _report(arguments[1:])
        if arguments[:1] == ["speed"]:
            return _speed(arguments[1:])
        return _run(arguments)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return ExitCode.USER_ERROR


def _run(arguments: Sequence[str]) -> int:
    flags = _run_flags().parse_args(arguments)
    return _runner(_plan(flags), flags).run()


def _speed(arguments: Sequence[str]) -> int:
    """Short runs of every arm, and the record of their speeds."""
    from experiments.results import load, write_json

    parser = _run_flags()
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: PLAN.json beside the plan, which reads it")
    flags = parser.parse_args(arguments)
    runner = _runner(_plan(flags).speed_trial(flags.steps), flags)
    code = runner.run()
    runs = load(runner.results_file)["runs"]
    if code == ExitCode.FINISHED:
        environment = runs[0]["environment"]
        record = {
            "tokens_per_second": {run["arm"]: run["tokens_per_second"] for run in runs},
            **{name: environment[name] for name in ("device", "date", "commit", "jax")},
            "how": f"median over the second half of {flags.steps} steps; {len(runner.devices)} runs side by side",
        }
        write_json(flags.output or _beside(flags.plan), record)
        print(record["tokens_per_second"])
    return code


def _beside(plan: str) -> Path:
    """The file of measured speeds that a plan reads, by the plan's name or path."""
    return Path(plan).with_suffix(".json") if plan.endswith(".py") else PLANS / f"{plan}.json"


def _run_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", metavar="PLAN", help=f"{', '.join(plan_names())}; or a file of your own")
    parser.add_argument("--devices", default="all", help="all, a number of GPUs, cpu or cpu:N (default: %(default)s)")
    parser.add_argument("--seeds", help="comma-separated; default: the plan's")
    parser.add_argument("--arms", help="comma-separated; default: all of the plan's")
    parser.add_argument("--workdir", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--tokens", type=float, help="of each run, instead of the plan's budget")
    parser.add_argument("--tiny", action="store_true", help="every arm as a toy, on a toy's text")
    parser.add_argument("--data", type=Path, help="a corpus as `prepare` wrote it")
    parser.add_argument("--corpus", type=Path, help="a directory with train/ and held_out/ of .jsonl(.xz) files")
    parser.add_argument("--tokenizer", type=Path, help="with --corpus: a tokenizer.json; default: one is trained")
    parser.add_argument("--return", dest="returned", type=Path, help="put the small results there, too")
    parser.add_argument("--commit", help="of this tree, where there is no git")
    return parser


def _plan(flags: argparse.Namespace) -> Plan:
    return chosen(load_plan(flags.plan), tiny=flags.tiny, tokens=flags.tokens, seeds=flags.seeds, arms=flags.arms)


def _runner(plan: Plan, flags: argparse.Namespace) -> Runner:
    """The runner of a plan, once the corpus is there."""
    devices = find_devices(flags.devices)
    workdir = flags.workdir.absolute()
    data = _data(plan, flags, workdir)
    return Runner(plan, workdir, devices, data, commit=flags.commit, returned=flags.returned)


def chosen(
    plan: Plan, *, tiny: bool = False, tokens: float | None = None, seeds: str | None = None, arms: str | None = None
) -> Plan:
    """The plan with what the command line says otherwise.

    Raises:
        ValueError: a value that is not of its form, or an arm that the plan does not have.
    """
    if tiny:
        plan = plan.tiny()
    if tokens is not None:
        if tokens < plan.budget.tokens_per_step:
            raise ValueError(f"--tokens={tokens:g}: expected at least a step's, {plan.budget.tokens_per_step}")
        plan = dataclasses.replace(plan, budget=plan.budget.of_tokens(round(tokens)))
    if seeds is not None:
        names = [name.strip() for name in seeds.split(",")]
        if not all(name.isdigit() for name in names) or len(set(names)) < len(names):
            raise ValueError(f"--seeds={seeds}: expected different numbers with commas between them, as in --seeds=0,1")
        plan = dataclasses.replace(plan, seeds=tuple(map(int, names)))
    if arms is not None:
        plan = dataclasses.replace(plan, only=tuple(plan.arm(name.strip()).name for name in arms.split(",")))
    return plan


def _data(plan: Plan, flags: argparse.Namespace, workdir: Path) -> Path:
    """The prepared corpus, made or unpacked before any run starts."""
    directory = workdir / ("corpus_tiny" if plan.is_tiny else "corpus")
    if plan.is_tiny:
        from experiments.toy import write_toy_corpus

        text = write_toy_corpus(workdir / "corpus_toy_text")
        return corpus_lib.prepare(text, directory, vocab_size=plan.corpus.vocab_size)
    if flags.data is not None:
        return corpus_lib.unpack(flags.data, directory)
    if flags.corpus is not None:
        return corpus_lib.prepare(flags.corpus, directory, flags.tokenizer, plan.corpus.vocab_size)
    if (directory / corpus_lib.CORPUS_FILE).is_file():
        return directory
    raise ValueError(f"PLAN={plan.name}: no text; give --data=FILE.tar.xz (see prepare), --corpus=DIR, or --tiny")


def _prepare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments prepare", description=corpus_lib.__doc__)
    parser.add_argument("plan", metavar="PLAN")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the .tar.xz; its directory stays beside it")
    flags = parser.parse_args(arguments)
    plan = load_plan(flags.plan)
    directory = flags.output.with_name(flags.output.name.removesuffix(".tar.xz"))
    corpus_lib.prepare(flags.corpus, directory, flags.tokenizer, plan.corpus.vocab_size)
    corpus_lib.pack(directory, flags.output)
    print(f"{flags.output}: {flags.output.stat().st_size / 1e6:.1f} MB")
    return 0


def _report(arguments: Sequence[str]) -> int:
    from experiments.report import main as report_main

    return report_main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
