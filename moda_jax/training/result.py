"""What a run came to, for people and for the program that called it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moda_jax.exit_codes import ExitCode


class RunResult(NamedTuple):
    """What a run came to.

    Attributes:
        workdir: its directory.
        step: steps done.
        num_steps: steps of the whole run.
        resumed_finished: there was nothing to do.
        validation_loss: the last one; None if there was no evaluation.
        validation: the last evaluation in words, "loss 1.2345 nats per token, perplexity 3.437".
        sample: the text sample, or None.
        stopped_by: the signal or notice that ended the run early, or None.
    """

    workdir: Path
    step: int
    num_steps: int
    resumed_finished: bool
    validation_loss: float | None
    validation: str
    sample: str | None
    stopped_by: str | None = None

    @property
    def exit_code(self) -> ExitCode:
        """FINISHED or STOPPED."""
        return ExitCode.STOPPED if self.step < self.num_steps else ExitCode.FINISHED

    def __str__(self) -> str:
        if self.resumed_finished:
            text = f"{self.workdir}: this run is finished, step {self.step} of {self.num_steps}; nothing to do"
        elif self.step < self.num_steps:
            by = f" by {self.stopped_by}" if self.stopped_by else ""
            text = (
                f"{self.workdir}: stopped{by} at step {self.step} of {self.num_steps}; the same command goes on there"
            )
        else:
            text = f"{self.workdir}: finished, step {self.step} of {self.num_steps}"
        if self.validation_loss is not None:
            text += f"\nvalidation {self.validation}"
        if self.sample is not None:
            text += f"\nsample:\n{self.sample}"
        return text
