"""Weights & Biases as a tracker; needs the extra `wandb`.

The service's own variables hold: WANDB_PROJECT, WANDB_ENTITY, and WANDB_MODE=offline, by which everything stays in the
run's directory until `wandb sync` sends it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import wandb

from moda_jax.config import Config
from moda_jax.exit_codes import RunStoppedError
from moda_jax.training.workdir import WANDB_ID_FILE

_PROJECT = "moda-jax"


class WandbRun:
    """A run there, by an identity that is kept in the run's directory: a resumed run goes on with the same one.

    Steps are shown over a value of their own, "step": the service takes no second line for a step of its own count, and
    a run that resumes does some steps again, whose later values then stand beside the first ones.

    Args:
        config: of the run, shown with it.
        workdir: its directory.

    Raises:
        RunStoppedError: the service does not take it, or nobody is logged in.
    """

    def __init__(self, config: Config, workdir: Path):
        identity = workdir / WANDB_ID_FILE
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT), name=workdir.name, dir=str(workdir),
                id=identity.read_text(encoding="utf-8").strip(), resume="allow", config=config.to_dict(),
                allow_val_change=True, settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise RunStoppedError(
                f"train.trackers={config.train.trackers!r}: wandb cannot begin the run ({error}); WANDB_MODE=offline "
                "keeps it here, train.trackers=tensorboard does without"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; sent by the package in the background."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run there, once all was sent or is on disk."""
        self._run.finish()
