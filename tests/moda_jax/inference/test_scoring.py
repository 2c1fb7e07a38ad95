import numpy as np
import pytest
from support.saved_run import loaded_run, log_probs, tiny_run_config

from moda_jax.inference import scoring
from moda_jax.inference.scoring import Window, score_windows

RUN = tiny_run_config()


@pytest.fixture(scope="module")
def run():
    return loaded_run(RUN)


def direct(run, tokens):
    """Float64 log-probabilities [n] of tokens[1:] and which were the likeliest, from one plain forward pass."""
    every = log_probs(run, tokens[:-1])
    return every[np.arange(len(tokens) - 1), tokens[1:]], every.argmax(axis=-1) == tokens[1:]


def test_scores_are_those_of_the_forward_pass(run, monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", {"cpu": 100})  # several batches
    monkeypatch.setattr(scoring, "LOGITS", {"cpu": 2000})  # several blocks of logits, the last one ragged
    random, windows, done = np.random.default_rng(0), [], []
    for length, scored in ((5, 5), (64, 10), (1, 1), (30, 0), (33, 33), (6, 2), (5, 1), (64, 64)):
        windows.append(Window(random.integers(0, 257, length + 1).astype(np.int32), scored))
    scores = score_windows(run.model, run.params, windows, progress=done.append)
    scoring.target_log_probs.clear_cache()  # the block size is read while tracing
    for (tokens, scored), score in zip(windows, scores, strict=True):
        expected, likeliest = direct(run, tokens)
        first = len(tokens) - 1 - scored
        np.testing.assert_allclose(score.log_probs, expected[first:], rtol=0, atol=1e-5)
        assert score.greedy == likeliest[first:].all()
    assert sum(done) == sum(window.scored for window in windows) and len(done) > 3


def test_a_greedy_continuation_is_recognised(run):
    tokens = [100, 101]
    for _ in range(4):
        tokens.append(int(log_probs(run, tokens)[-1].argmax()))
    windows = [Window(np.int32(tokens), 4), Window(np.int32([*tokens[:-1], (tokens[-1] + 1) % 257]), 4)]
    assert [score.greedy for score in score_windows(run.model, run.params, windows)] == [True, False]


def test_a_window_that_does_not_fit_is_an_error(run):
    with pytest.raises(ValueError, match=r"window 0: 1 of 65 tokens, expected at most 64"):
        score_windows(run.model, run.params, [Window(np.zeros(66, np.int32), 1)])


def test_no_window(run):
    assert score_windows(run.model, run.params, []) == []
