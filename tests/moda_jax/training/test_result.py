from pathlib import Path

import pytest

from moda_jax.training.result import RunResult


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "runs/a: finished, step 60 of 60"),
        ({"resumed_finished": True}, "runs/a: this run is finished, step 60 of 60; nothing to do"),
        ({"step": 30}, "runs/a: stopped at step 30 of 60; the same command goes on there"),
        (
            {"step": 30, "stopped_by": "SIGTERM"},
            "runs/a: stopped by SIGTERM at step 30 of 60; the same command goes on there",
        ),
        (
            {"validation_loss": 0.5, "validation": "loss 0.5000 nats per token, perplexity 1.649", "sample": "def f"},
            "runs/a: finished, step 60 of 60\nvalidation loss 0.5000 nats per token, perplexity 1.649\nsample:\ndef f",
        ),
        ({"sample": ""}, "runs/a: finished, step 60 of 60\nsample:\n"),
    ],
)
def test_it_says_what_the_run_came_to(fields, text):
    values = {
        "workdir": Path("runs/a"), "step": 60, "num_steps": 60, "resumed_finished": False, "validation_loss": None,
        "validation": "", "sample": None,
    }  # fmt: skip
    assert str(RunResult(**values | fields)) == text


def test_its_exit_code_tells_a_stop_from_an_end():
    values = {
        "workdir": Path("runs/a"), "num_steps": 60, "resumed_finished": False, "validation_loss": None,
        "validation": "", "sample": None,
    }  # fmt: skip
    assert [RunResult(**values, step=step).exit_code for step in (0, 59, 60, 70)] == [75, 75, 0, 0]
