"""Trains a model: `moda-train --config=quickstart [--config.SECTION.KEY=VALUE] [--workdir=DIRECTORY]`.

The same command resumes a run that was stopped, and says so when it is finished. `--workdir` alone does so too, with
the run's own config: `moda-train --workdir=RUN --config.train.num_steps=N` extends it. In a clone of the repository
`python train.py` is the same as `moda-train`.

Exit codes: 0 finished, 75 stopped and saved (run the same command again), 69 another process of the run was lost (the
same), 2 a mistake of the user's, 1 the run cannot go on; see `moda_jax.exit_codes`.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from moda_jax.data.cache import cache_directory
from moda_jax.exit_codes import ExitCode
from moda_jax.interop.start import starting_params
from moda_jax.parallel import launch
from moda_jax.training import runtime
from moda_jax.training.console import config_from_flags, print_result, run_command, user_errors
from moda_jax.training.signals import stops_before_training
from moda_jax.training.trainer import TrainingRun
from moda_jax.training.workdir import read_run_config

FLAGS = flags.FlagValues()
for _name in launch.FLAGS:
    FLAGS[_name] = flags.FLAGS[_name]

config_flags.DEFINE_config_file(
    "config", None, "Config: a name, or a file of your own; its argument after a colon: moda_700m:row4.",
    flag_values=FLAGS,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; by default runs/<name of the config>.", flag_values=FLAGS
)


def main() -> None:
    """The command `moda-train`; ends the process."""
    run_command(train, FLAGS, __doc__)


def train() -> ExitCode:
    """Builds and runs; what the run came to is printed on stdout, and is the exit code."""
    with user_errors(), stops_before_training():
        if FLAGS["config"].value is None and _WORKDIR.value is not None:
            read_run_config(_WORKDIR.value)  # says what is wrong: a run's own config is read as --config
        config, name = config_from_flags(FLAGS)
        launch.start_processes(config.train.peer_timeout_seconds)
        runtime.prepare(cache_directory(config.data), deterministic=config.train.deterministic)
        runtime.require_device()
        run = TrainingRun(config, _WORKDIR.value or Path("runs") / name, starting_params)
    result = run.train()
    if jax.process_index() == 0:
        print_result(result)
    return result.exit_code
