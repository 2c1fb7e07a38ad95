"""What a plan is: arms (named configs), a budget that all of them share, and what is compared with what.

A plan is a Python file under `experiments/plans/` that defines `PLAN`. An arm is a config of the project with a rule
or two on top; everything that is not the arm's own is the budget's, so that two arms of one seed differ in nothing but
what their names say. The seed gives both the batches and the initial values: arms of one seed see the same batches in
the same order, and every parameter that two arms share starts from the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moda_jax import config_files
from moda_jax.config import Config, TransformerConfig
from moda_jax.model.accounting import param_count, train_flops_per_token

PLANS = Path(__file__).parent / "plans"
_FFN_MULTIPLE = 8

# `--tiny`: every arm as a toy, to see the machinery run.
_TINY_MODEL = {
    "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_width": 96, "max_sequence_length": 64,
    "initializer_range": 0.08, "layer_loop": "scan", "remat": "attention", "dtype": None,
}  # fmt: skip
TINY_VOCAB_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every arm of a plan gets.

    Attributes:
        steps, batch_size, accumulation_steps: of the optimizer; rows of `sequence_length` tokens.
        learning_rate, warmup_steps: of every arm; tuned on the baseline.
        evaluations: evaluations while training, evenly spread, of `evaluation_batches` batches each.
        checkpoint_interval_steps: 0: at the end only.
    """

    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    accumulation_steps: int = 1
    evaluations: int = 5
    evaluation_batches: int = 16
    checkpoint_interval_steps: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """Of a whole run."""
        return self.steps * self.tokens_per_step

    def of_tokens(self, tokens: int) -> Budget:
        """The same for another number of tokens; the warm-up keeps its share."""
        steps = max(1, round(tokens / self.tokens_per_step))
        return dataclasses.replace(self, steps=steps, warmup_steps=round(self.warmup_steps * steps / self.steps))


@dataclasses.dataclass(frozen=True)
class Arm:
    """One named config.

    Attributes:
        name: of the arm, also of its directory.
        config: () -> the config that it starts from.
        changes: {"section.field": value} on top.
        parameters_of: an arm whose number of parameters this one gets at the least: its FFN is widened to the next
            multiple of 8.
        time_of: an arm whose wall-clock time this one gets, by the plan's measured speeds; its schedule is planned for
            the steps that it then does.
        text: what it is, for the report.
    """

    name: str
    config: Callable[[], ConfigDict]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters_of: str | None = None
    time_of: str | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text of a plan, for the report.

    Attributes:
        name, licence, note: in words.
        vocab_size: of its tokenizer.
    """

    name: str
    licence: str
    note: str
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan.

    Attributes:
        name: of the plan: its file's.
        question: what it asks, in a sentence.
        arms: in the order of the report; the first is the baseline, with which speeds are compared.
        comparisons: pairs (arm, other): the report says how much lower the first one's loss is.
        seeds: of the runs.
        budget, corpus: see there.
        learning_rate_note: how the learning rate was found.
        evaluates: every run ends with the losses on whole sets.
        probes: and one with a depth stream with depth probes.
        speeds: {arm: tokens per second}, measured; None where no arm needs it. `speed_record` says on what.
        note: what a reader of the report must know besides.
        is_tiny: see `tiny`.
        only: arms that are run, by name; None: all.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    comparisons: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    budget: Budget
    corpus: Corpus
    learning_rate_note: str = ""
    evaluates: bool = True
    probes: bool = True
    speeds: dict[str, float] | None = None
    speed_record: dict[str, Any] | None = None
    note: str = ""
    is_tiny: bool = False
    only: tuple[str, ...] | None = None

    @property
    def chosen_arms(self) -> tuple[Arm, ...]:
        """The arms that are run."""
        return tuple(arm for arm in self.arms if self.only is None or arm.name in self.only)

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ValueError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"plan {self.name}: no arm {name!r}; its arms are {', '.join(a.name for a in self.arms)}")

    def steps(self, arm: Arm) -> int:
        """Optimizer steps of an arm's run.

        Raises:
            ValueError: the arm gets another's time, and one of the two speeds was not measured.
        """
        if arm.time_of is None:
            return self.budget.steps
        speeds = self.speeds or {}
        pair = self._speed_arm(arm).name, arm.time_of
        missing = [name for name in pair if name not in speeds]
        if missing:
            raise ValueError(
                f"plan {self.name}: arm {arm.name!r} gets the time of {arm.time_of!r}, but the tokens per second of "
                f"{' and '.join(missing)} are not in the plan's measured speeds"
            )
        return round(self.budget.steps * speeds[pair[0]] / speeds[pair[1]])

    def _speed_arm(self, arm: Arm) -> Arm:
        """The arm with the same model and no rule about time, whose speed is this one's."""
        for other in self.arms:
            if other.time_of is None and self.model(other) == self.model(arm):
                return other
        return arm

    def model(self, arm: Arm) -> TransformerConfig:
        """The arm's model."""
        if arm.name not in self._models:
            self._models[arm.name] = self._make_model(arm)
        return self._models[arm.name]

    @functools.cached_property
    def _models(self) -> dict[str, TransformerConfig]:
        """By arm, those that were asked for: a config file takes long to evaluate."""
        return {}

    def _make_model(self, arm: Arm) -> TransformerConfig:
        values = arm.config().to_dict()["model"]
        values |= {key.removeprefix("model."): value for key, value in arm.changes.items() if key.startswith("model.")}
        if self.is_tiny:
            layers = 2 + values["num_layers"] // 12
            values |= _TINY_MODEL | {"vocab_size": TINY_VOCAB_SIZE, "num_layers": layers}
            values["moda"] = values["moda"] | {"read_slots": 3, "read_first": 1, "read_stride": 2}
        config = TransformerConfig.from_dict(values)
        if arm.parameters_of is not None:
            config = widened(config, param_count(self.model(self.arm(arm.parameters_of))))
        return config

    def config(self, arm: Arm, seed: int, data: Path, cache: Path) -> Config:
        """The whole config of a run.

        Args:
            arm: of the plan.
            seed: of batches and initial values.
            data: a prepared corpus, see `experiments.corpus`.
            cache: directory for compiled programs, shared by all runs.
        """
        budget, steps = self.budget, self.steps(arm)
        values = arm.config().to_dict()
        values["model"] = dataclasses.asdict(self.model(arm))
        values["data"] |= {
            "source": f"tokens:{data / 'tokens'}", "tokenizer": str(data / "tokenizer.json"), "cache_dir": str(cache),
            "sequence_length": budget.sequence_length,
        }  # fmt: skip
        values["optimizer"] |= {"learning_rate": budget.learning_rate, "warmup_steps": budget.warmup_steps}
        values["train"] |= {
            "num_steps": steps, "batch_size": budget.batch_size, "accumulation_steps": budget.accumulation_steps,
            "seed": seed, "sample_prompt": "", "log_interval_steps": max(1, steps // 150),
        }  # fmt: skip
        interval = max(1, math.ceil(steps / budget.evaluations))
        values["eval"] |= {"interval_steps": interval, "num_batches": budget.evaluation_batches}
        values["checkpoint"] |= {"interval_steps": budget.checkpoint_interval_steps, "keep_last": 1}
        for key, value in arm.changes.items():
            section, field = key.split(".")
            if section != "model":
                values[section][field] = value
        return Config.from_dict(values)

    def cost(self, arm: Arm) -> float:
        """How long a run takes, beside other arms: seconds where speeds were measured, else in units of FLOPs."""
        tokens = self.steps(arm) * self.budget.tokens_per_step
        speeds = self.speeds or {}
        name = self._speed_arm(arm).name
        if all(self._speed_arm(other).name in speeds for other in self.arms):
            return tokens / speeds[name]
        return tokens * train_flops_per_token(self.model(arm), self.budget.sequence_length)

    def budget_facts(self) -> dict[str, Any]:
        """What results must agree in to be of one plan: the budget and each arm's model and steps."""
        arms = {arm.name: {"steps": self.steps(arm), "model": dataclasses.asdict(self.model(arm))} for arm in self.arms}
        return {"budget": dataclasses.asdict(self.budget), "arms": arms, "tiny": self.is_tiny}

    def speed_trial(self, steps: int) -> Plan:
        """A plan that measures tokens per second: one short run of every arm that is not given another's time."""
        arms = tuple(arm for arm in self.arms if arm.time_of is None)
        budget = dataclasses.replace(
            self.budget, steps=steps, warmup_steps=min(self.budget.warmup_steps, steps), evaluations=1,
            evaluation_batches=1,
        )  # fmt: skip
        return dataclasses.replace(
            self, name=f"{self.name}_speed", arms=arms, comparisons=(), seeds=self.seeds[:1], budget=budget,
            speeds=None, speed_record=None, evaluates=False, probes=False,
        )  # fmt: skip

    def tiny(self) -> Plan:
        """Every arm as a toy: two seeds, a few steps, a small vocabulary. The speeds are made up."""
        budget = Budget(
            steps=40, batch_size=4, sequence_length=64, learning_rate=5e-3, warmup_steps=4, evaluations=2,
            evaluation_batches=2,
        )  # fmt: skip
        speeds = {arm.name: 1.0 if self.model(arm).depth == "none" else 0.8 for arm in self.arms}
        record = {"note": "made up, for a toy", "tokens_per_second": speeds}
        corpus = Corpus("a few modules of Python's standard library", "PSF-2.0", "a toy", TINY_VOCAB_SIZE)
        return dataclasses.replace(
            self, budget=budget, seeds=self.seeds[:2], speeds=speeds, speed_record=record, corpus=corpus, is_tiny=True,
            learning_rate_note="not tuned", note="A toy: it shows that the machinery runs, and nothing else.",
        )  # fmt: skip


def widened(config: TransformerConfig, parameters: int) -> TransformerConfig:
    """The model with its FFN as wide as it takes to have at least `parameters`, a multiple of 8."""
    width, per_unit = config.ffn_width, 3 * config.width * config.num_layers
    missing = parameters - param_count(config)
    if missing > 0:
        width = math.ceil((width + math.ceil(missing / per_unit)) / _FFN_MULTIPLE) * _FFN_MULTIPLE
    return dataclasses.replace(config, ffn_width=width)


def measured_speeds(name: str | Path) -> tuple[dict[str, float], dict[str, Any]]:
    """A committed measurement: tokens per second by arm, and the whole record.

    Args:
        name: of one of ours, `experiments/plans/NAME.json`, or the path of a file.
    """
    path = PLANS / f"{name}.json" if isinstance(name, str) else name
    record = json.loads(path.read_text())
    return record["tokens_per_second"], record


def load_plan(name: str) -> Plan:
    """A plan.

    Args:
        name: of one of ours, or the path of a file of one's own that defines `PLAN`.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    names, path = plan_names(), Path(name)
    if name not in names and not (path.suffix == ".py" and path.is_file()):
        raise ValueError(f"PLAN={name!r}: no such plan; known: {', '.join(names)}; or the path of a file of your own")
    config_files.make_importable()
    if name in names:
        module, path = importlib.import_module(f"experiments.plans.{name}"), PLANS / f"{name}.py"
    else:
        spec = importlib.util.spec_from_file_location(f"experiments_plan_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    plan = getattr(module, "PLAN", None)
    if not isinstance(plan, Plan):
        raise ValueError(f"{path}: its PLAN is {plan!r}, expected an `experiments.plan.Plan`")
    if plan.name != path.stem:
        raise ValueError(f"{path}: its plan is called {plan.name!r}, expected {path.stem!r}")
    return plan


def plan_names() -> list[str]:
    """The plans that there are."""
    return sorted(path.stem for path in PLANS.glob("*.py") if path.stem != "__init__" and not path.stem.startswith("_"))
