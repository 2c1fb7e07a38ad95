"""Evaluates a run: `moda-evaluate --workdir=DIRECTORY` and any of

    --data=NAME=PATH        perplexity on a text file or directory; may be given several times
    --tasks=piqa,hellaswag  downstream tasks by lm-evaluation-harness; moda_paper: the paper's ten
    --attention-maps        a picture of where each head looks, over the sequence and over the depth slots; of a run on
                            images over the patches of the validation image --image=NUMBER
    --depth-probes          attention's mass on each depth slot, and the validation loss when slots are hidden

    --validation            of a run on images: its metrics over the validation split

Tables go to stdout; JSON and pictures to --output, by default DIRECTORY/evaluation. In a clone of the
repository `python evaluate.py` is the same as `moda-evaluate`.
"""

from pathlib import Path

from absl import flags

from moda_jax.inference.depth_probes import PROBE_TOKENS
from moda_jax.inference.evaluation import (
    check_perplexity,
    run_attention_maps,
    run_depth_probes,
    run_perplexity,
    run_tasks,
)
from moda_jax.inference.language_model import cache_of, load
from moda_jax.interop.exchange import is_export
from moda_jax.paths import expand_home
from moda_jax.tasks.registry import find_task
from moda_jax.training import runtime
from moda_jax.training.console import print_result, run_command, user_errors
from moda_jax.training.workdir import read_run_config

FLAGS = flags.FlagValues()

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run or of an exported model.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.", flag_values=FLAGS)
_EMA = flags.DEFINE_bool("ema", False, "Take the run's averaged weights (optimizer.ema_decay).", flag_values=FLAGS)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Where the run's tokenizer.json is, if it was moved.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for JSON and pictures.", flag_values=FLAGS)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens that the model reads; by default data.sequence_length.", flag_values=FLAGS
)
_DATA = flags.DEFINE_multi_string("data", [], "NAME=PATH of a domain for perplexity.", flag_values=FLAGS)
_FEATURE = flags.DEFINE_string(
    "feature", "text", "The text field of a JSON line, the column of a .parquet file.", flag_values=FLAGS
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "Predictions per window; by default half of the context.", flag_values=FLAGS
)
_TASKS = flags.DEFINE_list("tasks", [], "Downstream tasks, separated by commas.", flag_values=FLAGS)
_TASK_DIR = flags.DEFINE_string(
    "task-dir", None, "Directory with tasks of your own, as lm-eval's YAML files.", flag_values=FLAGS
)
_FEWSHOT = flags.DEFINE_integer(
    "num-fewshot", None, "Examples before a question; by default the task's number.", flag_values=FLAGS
)
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first so many documents of each task.", flag_values=FLAGS)
_MAPS = flags.DEFINE_bool(
    "attention-maps", False, "Draw attention maps of the first --data, or of validation text.", flag_values=FLAGS
)
_IMAGE = flags.DEFINE_integer(
    "image", 0, "Of a run on images: number of the validation image that maps are of.", flag_values=FLAGS
)
_VALIDATION = flags.DEFINE_bool(
    "validation", False, "Of a run on images: loss, top-1 and top-5 over its validation split.", flag_values=FLAGS
)
_PROBES = flags.DEFINE_bool(
    "depth-probes", False, "Probe the depth slots on the run's validation split.", flag_values=FLAGS
)
_PROBE_TOKENS = flags.DEFINE_integer(
    "probe-tokens", PROBE_TOKENS, "About so many tokens for each probe.", flag_values=FLAGS
)


def main() -> None:
    """The command `moda-evaluate`; ends the process."""
    run_command(evaluate, FLAGS, __doc__)


def evaluate() -> None:
    """Checks the inputs, loads the run, and does what was asked for, in the order of the help."""
    with user_errors():
        if _WORKDIR.value is None:
            raise ValueError("--workdir: missing; name the directory of a run, as in --workdir=runs/quickstart")
        if not (_DATA.value or _TASKS.value or _MAPS.value or _PROBES.value or _VALIDATION.value):
            raise ValueError(
                "nothing to do; give --data=NAME=PATH, --tasks=NAME,..., --attention-maps, --depth-probes or, of a run "
                "on images, --validation"
            )
        domains = check_perplexity(_DATA.value, _FEATURE.value)
        runtime.prepare(cache_of(_WORKDIR.value))
        runtime.require_device()
        if not is_export(expand_home(Path(_WORKDIR.value), "--workdir")):
            task = read_run_config(_WORKDIR.value).train.task
            if find_task(task).items == "images":
                evaluate_images(task)
                return
        if _VALIDATION.value:
            raise ValueError(
                f"--validation: {_WORKDIR.value} is no run on images; --data=NAME=PATH gives the perplexity on a text"
            )
        model = load(_WORKDIR.value, step=_STEP.value, tokenizer=_TOKENIZER.value, ema=_EMA.value)
        if model.is_export and (_PROBES.value or (_MAPS.value and not domains)):
            raise ValueError(
                f"--workdir={_WORKDIR.value}: an exported model has no validation split; give --attention-maps a text "
                "by --data=NAME=PATH, and --depth-probes the run"
            )
        run = model.run
        output, context = Path(_OUTPUT.value or run.workdir / "evaluation"), _CONTEXT.value
        if domains:
            print_result(run_perplexity(run, domains, output, context=context, stride=_STRIDE.value))
        if _TASKS.value:
            table = run_tasks(
                run, _TASKS.value, output, task_directory=_TASK_DIR.value, num_fewshot=_FEWSHOT.value,
                limit=_LIMIT.value, context=context,
            )  # fmt: skip
            print_result(table)
        if _MAPS.value:
            print_result(run_attention_maps(run, domains, output, context=context))
        if _PROBES.value:
            print_result(run_depth_probes(run, output, tokens=_PROBE_TOKENS.value))


def evaluate_images(task: str) -> None:
    """The part of `evaluate` for a run of the vision task, which has no text."""
    from moda_jax.inference.image_run import load_image_run, run_image_maps, run_validation  # Pillow is an extra

    if _DATA.value or _TASKS.value or _PROBES.value:
        raise ValueError(
            f"--workdir={_WORKDIR.value}: its train.task is {task!r}, for which there are --validation and "
            "--attention-maps alone"
        )
    run = load_image_run(_WORKDIR.value, step=_STEP.value, ema=_EMA.value)
    output = Path(_OUTPUT.value or run.workdir / "evaluation")
    if _VALIDATION.value:
        print_result(run_validation(run, output))
    if _MAPS.value:
        print_result(run_image_maps(run, output, number=_IMAGE.value))
