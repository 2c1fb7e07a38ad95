"""The adapter for lm-eval, on local tasks of its three kinds, without network."""

import math

import numpy as np
import pytest
from support.local_tasks import ANSWERS, QUESTIONS, TEXTS, write_tasks
from support.saved_run import loaded_run, log_probs, tiny_run_config

from moda_jax.inference import evaluation
from moda_jax.inference.generation import generate
from moda_jax.inference.sampling import GREEDY

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
from moda_jax.inference import harness

TASKS = ["keyword_choice", "keyword_rolling", "keyword_generate"]


@pytest.fixture(scope="module")
def run():
    return loaded_run(tiny_run_config())


@pytest.fixture(scope="module")
def results(run, tmp_path_factory):
    directory = write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "cache")
        tasks, manager = harness.find_tasks(TASKS, directory)
        return harness.run_tasks(harness.HarnessModel(run), tasks, manager, num_fewshot=None, limit=None)


def log_probability(run, context, continuation):
    """log p(continuation | context) in float64, from one plain forward pass over exactly these tokens."""
    tokens = np.asarray([*context, *continuation])
    return log_probs(run, tokens[:-1])[len(context) - 1 :][np.arange(len(continuation)), continuation].sum()


class Request:
    def __init__(self, *args):
        self.args = args


def test_log_likelihoods_are_those_of_the_forward_pass(run):
    model = harness.HarnessModel(run)
    pairs = [("def f(x):", " return"), ("a", "b"), ("trailing  ", "space"), ("", "no context"), ("y" * 60, "cut left")]
    answers = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
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
        scores = [
            log_probability(run, list(question["stem"].encode()), list(f" {choice}".encode()))
            for choice in question["choices"]
        ]
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
