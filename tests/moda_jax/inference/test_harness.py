"""The adapter for lm-eval, on local tasks of its three kinds, without network."""

import json
import math

import numpy as np
import pytest
from support.local_tasks import ANSWERS, QUESTIONS, TEXTS, write_tasks
from support.saved_run import loaded_run, log_probs, tiny_run_config

from moda_jax.inference import evaluation
from moda_jax.inference.generation import Completion, generate
from moda_jax.inference.sampling import GREEDY

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
from moda_jax.inference import harness

TASKS = ["keyword_choice", "keyword_rolling", "keyword_generate"]


@pytest.fixture(scope="module")
def run():
    return loaded_run(tiny_run_config())


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The model and lm-eval's results."""
    directory = write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "cache")
        tasks, manager = harness.find_tasks(TASKS, directory)
        model = harness.HarnessModel(run)
        return model, harness.run_tasks(model, tasks, manager, num_fewshot=None, limit=None)


@pytest.fixture(scope="module")
def results(evaluated):
    return evaluated[1]


def log_probability(run, context, continuation):
    """log p(continuation | context) in float64, from one plain forward pass over exactly these tokens."""
    tokens = np.asarray([*context, *continuation])
    return log_probs(run, tokens[:-1])[len(context) - 1 :][np.arange(len(continuation)), continuation].sum()


class Request:
    def __init__(self, *args):
        self.args = args


def test_log_likelihoods_are_those_of_the_forward_pass(run, caplog):
    model = harness.HarnessModel(run)
    pairs = [("def f(x):", " return"), ("a", "b"), ("trailing  ", "space"), ("", "no context"), ("y" * 60, "cut left")]
    with caplog.at_level("WARNING", logger="moda_jax"):
        answers = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    assert (model.cuts.contexts, model.cuts.contexts_cut) == (5, 1)
    assert "1 of 5 contexts lost their beginning: they are longer than the context of 32 tokens" in caplog.text
    for (context, continuation), (came, greedy) in zip(pairs, answers, strict=True):
        spaces = len(context) - len(context.rstrip())  # lm-eval takes them for the continuation's
        context, continuation = context[: len(context) - spaces], " " * spaces + continuation
        context = list(context.encode()) or [256]
        context = context[len(context) + len(continuation) - 33 :] if len(context) == 60 else context
        assert came == pytest.approx(log_probability(run, context, list(continuation.encode())), abs=1e-5)
        assert not greedy
    greedy = generate(run.model, run.params, run.tokenizer, [b"def".decode()], max_tokens=1, sampling=GREEDY)[0].text
    if greedy and "\ufffd" not in greedy:
        assert model.loglikelihood([Request("def", greedy)], disable_tqdm=True)[0][1]


def test_a_choice_task(run, results):
    correct = correct_norm = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            continuation = list(f" {choice}".encode())
            stem = list(question["stem"].encode())[-(33 - len(continuation)) :]  # the model reads 32 tokens, predicts 1
            scores.append(log_probability(run, stem, continuation))
        lengths = [len(choice) for choice in question["choices"]]
        correct += int(np.argmax(scores) == question["answer"])
        correct_norm += int(np.argmax(np.divide(scores, lengths)) == question["answer"])
    values = results["results"]["keyword_choice"]
    assert values["acc,none"] == pytest.approx(correct / 3)
    assert values["acc_norm,none"] == pytest.approx(correct_norm / 3)


def test_a_rolling_task(run, results):
    total = 0.0
    for text in (document["text"].encode() for document in TEXTS):
        tokens, begin = [256, *text], 0
        while begin < len(text):  # each token once; the last window has a full context
            end = min(begin + 32, len(text))
            first = max(0, end - 32) if begin else 0
            total += log_probability(run, tokens[first : begin + 1], tokens[begin + 1 : end + 1])
            begin = end
    size = sum(len(document["text"]) for document in TEXTS)
    came = results["results"]["keyword_rolling"]["bits_per_byte,none"]
    assert came == pytest.approx(-total / size / math.log(2), abs=1e-5)


def test_windows_over_a_long_text_are_no_cuts(evaluated):
    assert evaluated[0].cuts == harness.Cuts(contexts=9, contexts_cut=1, prompts=2)  # a choice is too long


@pytest.mark.slow
def test_a_generating_task(run, results):
    assert 0 <= results["results"]["keyword_generate"]["exact_match,none"] <= 1
    model = harness.HarnessModel(run)
    options = {"until": [";"], "max_gen_toks": 4, "do_sample": False}
    requests = [Request(answer["question"], options) for answer in ANSWERS]
    requests += [Request("", {"until": "q", "max_gen_toks": 1}), Request("z" * 50, options)]
    texts = model.generate_until(requests, disable_tqdm=True)
    for request, text in zip(requests, texts, strict=True):
        prompt = np.int32(list(request.args[0].encode()) or [256])
        tokens = request.args[1]["max_gen_toks"]
        prompt = prompt[-(32 - tokens) :]  # what does not fit loses its beginning
        (expected,) = generate(
            run.model, run.params, run.tokenizer, [prompt], max_tokens=tokens, sampling=GREEDY,
            stop=list(request.args[1]["until"]),
        )  # fmt: skip
        assert text == expected.text


@pytest.fixture
def generated(run, monkeypatch):
    """Requests to what the generator was asked for, [(prompt, most tokens)], and what the model counted."""
    asked = []

    def record(model, params, tokenizer, prompts, *, max_tokens, **options):
        asked.extend(
            (bytes(prompt.tolist()).decode(), limit) for prompt, limit in zip(prompts, max_tokens, strict=True)
        )
        return [Completion("", limit, "length") for limit in max_tokens]

    monkeypatch.setattr(harness, "generate", record)

    def call(requests, **options):
        asked.clear()
        model = harness.HarnessModel(run, **options)
        model.generate_until(requests, disable_tqdm=True)
        return sorted(asked), model.cuts

    return call


@pytest.mark.parametrize("spelling", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [32, 2048])
def test_a_limit_as_large_as_the_context_leaves_the_prompt_whole(generated, caplog, spelling, limit):
    prompts = ["def f(x):", "import os, sys", "q"]
    with caplog.at_level("WARNING", logger="moda_jax"):
        asked, cuts = generated([Request(prompt, {spelling: limit}) for prompt in prompts])
    assert asked == [("def f(x):", 23), ("import os, sys", 18), ("q", 31)]
    assert (cuts.prompts, cuts.prompts_cut, cuts.limits_lowered) == (3, 0, 3)
    assert "3 of 3 continuations may be shorter than their task asks: prompt and continuation share" in caplog.text


@pytest.mark.parametrize(("limit", "kept"), [(4, 28), (16, 16), (32, 16), (1000, 16)])
def test_a_prompt_that_loses_its_beginning_is_counted_and_said(generated, caplog, limit, kept):
    """One that has to be cut leaves the continuation what the task asks for, at most half of the context."""
    long = "".join(map(chr, range(40, 90)))
    with caplog.at_level("WARNING", logger="moda_jax"):
        asked, cuts = generated([Request(long, {"max_gen_toks": limit})])
    assert asked == [(long[-kept:], 32 - kept)]
    assert (cuts.prompts_cut, cuts.limits_lowered) == (1, int(limit > 16))
    assert "1 of 1 prompts lost their beginning: they are longer than the context of 32 tokens" in caplog.text
    asked, cuts = generated([Request(long[:31], {"max_gen_toks": limit})])  # fits, with one token to spare
    assert asked == [(long[:31], 1)] and (cuts.prompts_cut, cuts.limits_lowered) == (0, 1)


def test_a_context_of_one_token_is_no_place_to_generate(generated):
    with pytest.raises(ValueError, match=r"context=1: expected at least 2 for a task that generates text"):
        generated([Request("a", {})], context=1)


def test_the_cuts_stand_in_the_result_file(run, tmp_path, monkeypatch):
    directory = write_tasks(tmp_path / "tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "cache")
    evaluation.run_tasks(run, ["keyword_generate"], tmp_path, task_directory=str(directory), context=8)
    cuts = json.loads((tmp_path / "tasks.json").read_text())["cuts"]
    assert cuts == {
        "contexts": 0, "contexts_cut": 0, "prompts": 2, "prompts_cut": 1, "limits_lowered": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": None}, ([], 256, 0.0)),
        ({"until": [None, "", "a"], "max_tokens": 3}, (["a"], 3, 0.0)),
        ({"temperature": 0.5}, ([], 256, 0.5)),
        ({"do_sample": False, "temperature": 0.5, "max_gen_toks": "7"}, ([], 7, 0.0)),
    ],
)
def test_options_as_the_harness_reads_them(options, expected):
    stop, limit, sampling = harness.generation_options(options)
    assert (stop, limit, sampling.temperature) == expected


def test_a_limit_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"generation_kwargs: a limit of 0 tokens; expected at least 1"):
        harness.generation_options({"max_gen_toks": 0})


def test_the_table_and_the_paper_group(results):
    rows = [line.split() for line in harness.format_results(results).splitlines()]
    assert rows[0] == ["task", "metric", "value"]
    assert [row[:2] for row in rows[1:]] == [
        ["keyword_choice", "acc"], ["keyword_choice", "acc_norm"], ["keyword_generate", "exact_match"],
        ["keyword_rolling", "bits_per_byte"],
    ]  # fmt: skip
    assert len(harness.TASK_GROUPS["moda_paper"]) == 10


@pytest.mark.slow
def test_lm_eval_knows_the_papers_ten_tasks_and_not_just_any():
    tasks, manager = harness.find_tasks(["moda_paper"])
    assert len(tasks) == 10 and set(tasks) <= set(manager.all_tasks)
    with pytest.raises(ValueError, match=r"--tasks=piqqa: lm-eval .* has no such task; did you mean piqa or"):
        harness.find_tasks(["piqqa"])


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="--tasks: none given"):
        harness.find_tasks([])
    with pytest.raises(ValueError, match=r"--task-dir=.*none: no such directory"):
        harness.find_tasks(["a"], tmp_path / "none")
    directory = write_tasks(tmp_path / "tasks")
    (directory / "choice.json").unlink()
    tasks, manager = harness.find_tasks(["keyword_choice"], directory)
    with pytest.raises(ValueError, match=r"--tasks=keyword_choice: the data of a task could not be loaded \(FileNotF"):
        harness.run_tasks(harness.HarnessModel(run), tasks, manager, num_fewshot=None, limit=None)
    with pytest.raises(ValueError, match=r"a continuation of 40 tokens does not fit the context of 32"):
        harness.HarnessModel(run).loglikelihood([Request("a", "b" * 40)], disable_tqdm=True)


def test_without_lm_eval_the_error_says_what_to_install(run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "moda_jax.inference.harness")
    import moda_jax.inference

    monkeypatch.delattr(moda_jax.inference, "harness")
    with pytest.raises(NotImplementedError, match=r'tasks need lm-eval .*: python -m pip install "moda-jax\[eval\]"'):
        evaluation.run_tasks(run, ["piqa"], tmp_path)
