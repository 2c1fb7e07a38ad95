"""Models to and from other libraries' files.

    python -m moda_jax.interop export --workdir=RUN --output=DIRECTORY [--step=N] [--ema] [--export-dtype=bfloat16]

writes config.json and model.safetensors (and tokenizer.json, if the run has one). A run with `depth="none"` becomes an
OLMo 2 checkpoint for transformers.

    python -m moda_jax.interop import --checkpoint=DIRECTORY --workdir=RUN [--config=FILE] [--config.SECTION.KEY=VALUE]

makes a run out of such a directory, at step 0, for train.py, generate.py and evaluate.py (`train.py --workdir=RUN`
trains it). The model's sizes come from the checkpoint, all else from the config; with `--config.model.depth=moda` an
OLMo 2 model becomes a MoDA model that starts close to it (see moda_jax/interop/depth_init.py). A directory of
OLMo-core's is read too, with DepthBench's MoDA blocks (see moda_jax/interop/olmo_core.py). A DeiT's safetensors in
timm's layout become a run of the vision task, with `--config=configs/deit_tiny.py:none` or another config of it, which
has to say how many heads there are: the file does not.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx
from ml_collections import config_flags

from moda_jax import command_help
from moda_jax.config import Config, TransformerConfig
from moda_jax.exit_codes import ExitCode
from moda_jax.inference.load import load_run, restore_params
from moda_jax.interop.deit import is_deit, load_deit
from moda_jax.interop.depth_init import OPEN_FIELDS, add_depth
from moda_jax.interop.exchange import TOKENIZER_FILE, export_model, is_olmo2, load_model
from moda_jax.interop.start import initial_params, of_images
from moda_jax.quantities import quantity
from moda_jax.training import runtime
from moda_jax.training.console import config_from_flags, print_result, run_command, user_errors
from moda_jax.training.trainer import TrainingRun
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY, CONFIG_FILE

FLAGS = flags.FlagValues()

config_flags.DEFINE_config_file(
    "config", None, "import: config of the run; by default configs/base.py's.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer("step", None, "export: checkpoint; by default the newest good one.", flag_values=FLAGS)
_EMA = flags.DEFINE_bool("ema", False, "export: the averaged weights (optimizer.ema_decay).", flag_values=FLAGS)
_OUTPUT = flags.DEFINE_string("output", None, "export: the directory to write.", flag_values=FLAGS)
_DTYPE = flags.DEFINE_enum(
    "export-dtype", "float32", ["float32", "bfloat16", "float16"], "export: of the tensors.", flag_values=FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "import: the directory, or the safetensors of a DeiT.", flag_values=FLAGS
)


def export_run() -> None:
    """`export`."""
    with user_errors():
        workdir, output = _required(_WORKDIR, "runs/quickstart"), Path(_required(_OUTPUT, "exported"))
        runtime.require_device()
        run = load_run(workdir, step=_STEP.value, ema=_EMA.value)
        config = run.config.model
        params = restore_params(run.workdir / CHECKPOINT_DIRECTORY / str(run.step), run.config, ema=_EMA.value)
        export_model(
            config, params, output, dtype=_DTYPE.value, end_of_text_id=run.tokenizer.end_of_text_id,
            tokenizer_file=getattr(run.tokenizer, "path", None),
        )  # fmt: skip
    kind = "transformers reads it as Olmo2ForCausalLM" if is_olmo2(config) else f"depth={config.depth!r}, own format"
    weights = f"step {run.step} of {run.workdir}" + (", averaged weights" if _EMA.value else "")
    print_result(f"{output}: {weights}, {_DTYPE.value}; {kind}")


def import_model() -> None:
    """`import`."""
    with user_errors():
        directory, workdir = Path(_required(_CHECKPOINT, "olmo2")), Path(_required(_WORKDIR, "runs/olmo2"))
        if (workdir / CONFIG_FILE).exists():
            raise ValueError(f"--workdir={workdir}: holds a run already; name a new directory")
        runtime.require_device()
        given = None if FLAGS["config"].value is None else config_from_flags(FLAGS)[0]
        images = is_deit(directory)
        check_task(given, images)
        try:
            base, model = load_deit(directory, num_heads=given.model.num_heads) if images else load_model(directory)
        except FileNotFoundError as error:
            raise ValueError(f"--checkpoint={directory}: {error}") from error
        if images and given.model.width != base.width:
            raise ValueError(
                f"model.width={given.model.width}: the checkpoint has {base.width}; name a config of its model, from "
                "which the number of heads is taken"
            )
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        del model
        config = run_config(directory, base, given)
        if config.model.depth != base.depth:
            key = jax.random.key(config.train.seed)
            params = add_depth(base, params, config.model, key, initial_params(config))
        run = TrainingRun(config, workdir)
        run.start_from(params)
    parameters = quantity(sum(leaf.size for leaf in jax.tree.leaves(params)))
    print_result(
        f"{workdir}: step 0, {parameters} parameters, depth={config.model.depth!r}; python train.py --workdir={workdir}"
    )


def check_task(config: Config | None, images: bool) -> None:
    """Checks that the config's task is the checkpoint's.

    Args:
        config: as given, or None.
        images: whether the checkpoint is a vision transformer.

    Raises:
        ValueError: it is not; or there is none for a vision transformer, whose images it has to name.
    """
    if images and config is None:
        raise ValueError("--config: missing; a vision transformer needs one, as in --config=configs/deit_tiny.py:none")
    if config is not None and images != of_images(config):
        what = "a vision transformer" if images else "a language model"
        raise ValueError(f"train.task={config.train.task!r}: the checkpoint is {what}")


def run_config(directory: Path, base: TransformerConfig, config: Config | None) -> Config:
    """The run's config: sizes of the checkpoint, all else as asked for.

    Args:
        directory: of the checkpoint; its tokenizer.json is used where the config names no other.
        base: the checkpoint's model.
        config: as given; None: defaults, and the checkpoint's own depth.

    Raises:
        ValueError: the config asks for a depth mechanism that the checkpoint's is not, and that cannot be added to it.
    """
    if config is None:
        model, data = base, Config().data
        data = dataclasses.replace(data, sequence_length=min(data.sequence_length, base.max_sequence_length))
        config = dataclasses.replace(Config(), data=data)
    else:
        wanted: dict[str, Any] = {field: getattr(config.model, field) for field in OPEN_FIELDS}
        if base.depth != "none":
            for field in ("depth", base.depth):
                if wanted[field] != getattr(base, field):
                    raise ValueError(
                        f"model.{field}={wanted[field]!r}: the checkpoint has {getattr(base, field)!r}; depth can only "
                        "be added to a checkpoint without"
                    )
        model, data = dataclasses.replace(base, **wanted), config.data
    places = (directory / TOKENIZER_FILE, directory / "tokenizer" / TOKENIZER_FILE)  # the second is OLMo-core's
    own_tokenizer = next((place for place in places if place.is_file()), None)
    if data.tokenizer == "bytes" and own_tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=str(own_tokenizer.absolute()))
    return dataclasses.replace(config, model=model, data=data)


def _required(flag: flags.FlagHolder, example: str) -> str:
    if flag.value is None:
        raise ValueError(f"--{flag.name}: missing, as in --{flag.name}={example}")
    return flag.value


def main() -> None:
    """Takes the command off the arguments, and runs it."""
    commands = {"export": export_run, "import": import_model}
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in commands:
        text = command_help.asked_for(sys.argv[1:], __doc__, FLAGS)
        if text is not None:
            print(text)
            sys.exit(int(ExitCode.FINISHED))
        sys.stderr.write(f"error: {command!r}: expected one of {', '.join(commands)}; see --help\n")
        sys.exit(int(ExitCode.USER_ERROR))
    sys.argv = [f"python -m moda_jax.interop {command}", *sys.argv[2:]]
    run_command(commands[command], FLAGS, __doc__)


if __name__ == "__main__":
    main()
