"""Downstream tasks by EleutherAI's lm-evaluation-harness (lm-eval): the adapter, the paper's tasks, a table.

lm-eval is an extra: `python -m pip install "moda-jax[eval]"`. It needs no torch. This module imports it, so import this
module only where tasks are asked for.

Source of the ten tasks: arXiv 2603.15619, table 4 (PIQA, HellaSwag, WinoGrande, OpenBookQA, BoolQ, SciQ, ARC-easy,
ARC-challenge, COPA, MMLU).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moda_jax.inference.generation import generate
from moda_jax.inference.load import LoadedRun
from moda_jax.inference.sampling import SamplingConfig
from moda_jax.inference.scoring import Window, score_windows
from moda_jax.progress import progress_bar

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as missing:
    raise NotImplementedError(
        f'tasks need lm-eval ({missing.name} is not installed): python -m pip install "moda-jax[eval]"'
    ) from missing

TASK_GROUPS = {
    "moda_paper": (
        "piqa", "hellaswag", "winogrande", "openbookqa", "boolq", "sciq", "arc_easy", "arc_challenge", "copa", "mmlu",
    ),
}  # fmt: skip
MAX_GENERATED_TOKENS = 256  # where a task names no number
GENERATION_ROWS = 32  # prompts that are continued together


_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Cuts:
    """What did not fit the context. A score of a task with many cuts says little about the model.

    Attributes:
        contexts, contexts_cut: of the questions whose answers are given, and of these the ones that lost their
            beginning.
        prompts, prompts_cut: the same of the tasks that generate text.
        limits_lowered: continuations that may be shorter than their task asks.
    """

    contexts: int = 0
    contexts_cut: int = 0
    prompts: int = 0
    prompts_cut: int = 0
    limits_lowered: int = 0


class HarnessModel(TemplateLM):
    """A run as lm-eval's model.

    Args:
        run: the model.
        context: tokens that the model reads at most; what is longer loses its beginning, counted and said. None:
            `data.sequence_length`, the length that the model was trained at.

    Attributes:
        cuts: what did not fit, over all requests so far.
    """

    def __init__(self, run: LoadedRun, context: int | None = None) -> None:
        super().__init__()
        self._run = run
        self.max_length = run.config.data.sequence_length if context is None else context
        self.cuts = Cuts()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it also stands for an empty context."""
        return self._run.tokenizer.end_of_text_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests tells tokenizers apart by."""
        return self._run.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's tokens; this project's tokenizers add no special ones."""
        return self._run.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        rolling: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each (cache key, context, continuation), in order."""
        windows, cut = [], 0
        for _, context, continuation in requests:
            cut += len(context) + len(continuation) > self.max_length + 1
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}; set "
                    "a larger --context"
                )
            tokens = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
            windows.append(Window(tokens, len(continuation)))
        total = sum(window.scored for window in windows)
        with progress_bar(total=total, desc="Log-likelihoods", unit=" tokens", disable=disable_tqdm) as bar:
            scores = score_windows(
                self._run.model,
                self._run.params,
                windows,
                vocab_size=self._run.tokenizer.vocab_size,
                progress=bar.update,
            )
        answers = [(float(score.log_probs.sum()), score.greedy) for score in scores]
        if not rolling:  # windows over a long text lose nothing
            self.cuts.contexts += len(requests)
            self.cuts.contexts_cut += cut
            self._say_lost("contexts", cut, len(requests))
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, every token predicted once; the first one from end-of-text."""
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            pieces = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows += pieces
            counts.append(len(pieces))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm, rolling=True))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(float(sum(next(answers)[0] for _ in range(count))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings.

        The prompt comes first: a continuation is cut to what the prompt leaves of the context. Only a prompt that
        leaves nothing loses its beginning; it then makes room for the continuation that its task asks for, at most half
        of the context.
        """
        if requests and self.max_length < 2:
            raise ValueError(f"context={self.max_length}: expected at least 2 for a task that generates text")
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # by their options; in a group the long ones first
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        cut = lowered = 0
        with progress_bar(total=len(requests), desc="Generating", unit=" texts", disable=disable_tqdm) as bar:
            for options, indices in groups.items():
                stop, limit, sampling = generation_options(json.loads(options))
                whole = {i: self._prompt(requests[i].args[0]) for i in indices}
                prompts = {i: self._fitting(whole[i], limit) for i in indices}
                limits = {i: min(limit, self.max_length - len(prompts[i])) for i in indices}
                cut += sum(len(prompts[i]) < len(whole[i]) for i in indices)
                lowered += sum(limits[i] < limit for i in indices)
                indices.sort(key=lambda i, prompts=prompts: -len(prompts[i]))
                for begin in range(0, len(indices), GENERATION_ROWS):
                    rows = indices[begin : begin + GENERATION_ROWS]
                    completions = generate(
                        self._run.model, self._run.params, self._run.tokenizer, [prompts[i] for i in rows],
                        max_tokens=[limits[i] for i in rows], sampling=sampling, stop=stop,
                    )  # fmt: skip
                    for i, completion in zip(rows, completions, strict=True):
                        texts[i] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
                    bar.update(len(rows))
        self.cuts.prompts += len(requests)
        self.cuts.prompts_cut += cut
        self.cuts.limits_lowered += lowered
        self._say_lost("prompts", cut, len(requests))
        if lowered:
            _logger.warning(
                "%d of %d continuations may be shorter than their task asks: prompt and continuation share the "
                "context of %d tokens (--context)", lowered, len(requests), self.max_length,
            )  # fmt: skip
        return texts

    def _prompt(self, text: str) -> np.ndarray:
        return np.asarray(self.tok_encode(text) or [self.prefix_token_id], np.int32)

    def _fitting(self, prompt: np.ndarray, limit: int) -> np.ndarray:
        """The prompt, or what is kept of one that leaves no room for a single token."""
        if len(prompt) < self.max_length:
            return prompt
        return prompt[-(self.max_length - min(limit, self.max_length // 2)) :]

    def _say_lost(self, what: str, cut: int, total: int) -> None:
        if cut:
            _logger.warning(
                "%d of %d %s lost their beginning: they are longer than the context of %d tokens (--context); their "
                "scores count in the table", cut, total, what, self.max_length,
            )  # fmt: skip


def generation_options(options: dict[str, Any]) -> tuple[list[str], int, SamplingConfig]:
    """(stop strings, most tokens, sampling) of a task's generation_kwargs, in any spelling that lm-eval knows.

    Raises:
        ValueError: a limit without tokens.
    """
    known: dict[str, Any] = dict(normalize_gen_kwargs(options, default_max_gen_toks=MAX_GENERATED_TOKENS))
    if known["max_gen_toks"] < 1:
        raise ValueError(f"generation_kwargs: a limit of {known['max_gen_toks']} tokens; expected at least 1")
    temperature = float(known.get("temperature") or 0.0) if known["do_sample"] else 0.0
    stop = [text for text in known["until"] if text]
    return stop, known["max_gen_toks"], SamplingConfig(temperature, known.get("top_k") or None, known.get("top_p"))


def find_tasks(names: Sequence[str], task_directory: str | Path | None = None) -> tuple[list[str], TaskManager]:
    """The tasks that the names mean, and the manager that knows them.

    Args:
        names: of tasks, lm-eval's groups, or TASK_GROUPS.
        task_directory: with more tasks, as lm-eval's YAML files.

    Raises:
        ValueError: no such directory or no such task.
    """
    wanted = [task for name in names for task in TASK_GROUPS.get(name, (name,))]
    if not wanted:
        raise ValueError("--tasks: none given; name some, as in --tasks=piqa,hellaswag or --tasks=moda_paper")
    include = None
    if task_directory is not None:
        if not Path(task_directory).is_dir():
            raise ValueError(f"--task-dir={task_directory}: no such directory; expected one of lm-eval's YAML files")
        include = str(Path(task_directory).absolute())
        manager = TaskManager(include_path=include, include_defaults=False)
        if set(wanted) <= set(manager.all_tasks):  # lm-eval's own thousands need not be read
            return wanted, manager
    manager = TaskManager(include_path=include)
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*manager.all_tasks, *TASK_GROUPS], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise ValueError(
            f"--tasks={unknown[0]}: lm-eval {lm_eval.__version__} has no such task; {hint} (--task-dir adds your own)"
        )
    return wanted, manager


def run_tasks(
    model: HarnessModel, tasks: Sequence[str], manager: TaskManager, *, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """lm-eval's results, without its samples.

    Args:
        model: to be evaluated.
        tasks, manager: from `find_tasks`.
        num_fewshot: examples before each question; None: the task's own number.
        limit: only the first so many documents of each task, for a trial; None: all.

    Raises:
        ValueError: a task's data cannot be loaded.
    """
    try:
        return lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit,
            log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
    except (OSError, FileNotFoundError) as error:  # `datasets` raises these, and subclasses, for missing data
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--tasks={','.join(tasks)}: the data of a task could not be loaded ({type(error).__name__}: {reason}); "
            "lm-eval downloads it from the Hugging Face hub unless it is in the local cache"
        ) from error


def format_results(results: dict[str, Any]) -> str:
    """The results for a terminal: a line per task and metric."""
    lines = []
    for task, values in sorted(results["results"].items()):
        for name, value in values.items():
            metric, _, filters = name.partition(",")
            if not filters or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filters}")
            spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
            suffix = "" if filters == "none" else f" ({filters})"
            lines.append((task, f"{metric}{suffix}", f"{value:.4f}{spread}"))
    widths = [max(map(len, column)) for column in zip(*lines, ("task", "metric", "value"), strict=True)]
    return "\n".join(
        f"{task:{widths[0]}}  {metric:{widths[1]}}  {value}"
        for task, metric, value in [("task", "metric", "value"), *lines]
    )
