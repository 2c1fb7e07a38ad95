"""Evaluates a run: `python evaluate.py --workdir=DIRECTORY` and any of

    --data=NAME=PATH        perplexity on a text file or directory; may be given several times
    --tasks=piqa,hellaswag  downstream tasks by lm-evaluation-harness; moda_paper: the paper's ten
    --attention-maps        a picture of where each head looks, over the sequence and over the depth slots; of a run on
                            images over the patches of the validation image --image=NUMBER
    --depth-probes          attention's mass on each depth slot, and the validation loss when slots are hidden

Tables go to stdout; JSON and pictures to --output, by default DIRECTORY/evaluation.
"""

from pathlib import Path

from absl import flags

from moda_jax.config import Config
from moda_jax.data.cache import cache_directory
from moda_jax.inference.depth_probes import PROBE_TOKENS
from moda_jax.inference.evaluation import (
    check_perplexity,
    run_attention_maps,
    run_depth_probes,
    run_perplexity,
    run_tasks,
)
from moda_jax.inference.load import load_run
from moda_jax.tasks.registry import find_task
from moda_jax.training import runtime
from moda_jax.training.console import print_result, run_command, user_errors
from moda_jax.training.workdir import read_run_config

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory, as train.py's --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Where the run's tokenizer.json is, if it was moved.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for JSON and pictures.")
_CONTEXT = flags.DEFINE_integer("context", None, "Tokens that the model reads; by default data.sequence_length.")
_DATA = flags.DEFINE_multi_string("data", [], "NAME=PATH of a domain for perplexity.")
_FEATURE = flags.DEFINE_string("feature", "text", "The text field of a JSON line, the column of a .parquet file.")
_STRIDE = flags.DEFINE_integer("stride", None, "Predictions per window; by default half of the context.")
_TASKS = flags.DEFINE_list("tasks", [], "Downstream tasks, separated by commas.")
_TASK_DIR = flags.DEFINE_string("task-dir", None, "Directory with tasks of your own, as lm-eval's YAML files.")
_FEWSHOT = flags.DEFINE_integer("num-fewshot", None, "Examples before a question; by default the task's number.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first so many documents of each task.")
_MAPS = flags.DEFINE_bool("attention-maps", False, "Draw attention maps of the first --data, or of validation text.")
_IMAGE = flags.DEFINE_integer("image", 0, "Of a run on images: number of the validation image that maps are of.")
_PROBES = flags.DEFINE_bool("depth-probes", False, "Probe the depth slots on the run's validation split.")
_PROBE_TOKENS = flags.DEFINE_integer("probe-tokens", PROBE_TOKENS, "About so many tokens for each probe.")


def main() -> None:
    """Checks the inputs, loads the run, and does what was asked for, in the order of the help."""
    with user_errors():
        if _WORKDIR.value is None:
            raise ValueError("--workdir: missing; name the directory of a run, as in --workdir=runs/quickstart")
        if not (_DATA.value or _TASKS.value or _MAPS.value or _PROBES.value):
            raise ValueError(
                "nothing to do; give --data=NAME=PATH, --tasks=NAME,..., --attention-maps or --depth-probes"
            )
        domains = check_perplexity(_DATA.value, _FEATURE.value)
        config = read_run_config(_WORKDIR.value)
        runtime.prepare(cache_directory(config.data))
        runtime.require_device()
        if find_task(config.train.task).items == "images":
            evaluate_images(config)
            return
        run = load_run(_WORKDIR.value, step=_STEP.value, tokenizer=_TOKENIZER.value)
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


def evaluate_images(config: Config) -> None:
    """The part of `main` for a run of the vision task, which has no text: attention maps alone."""
    from moda_jax.inference.image_run import load_image_run, run_image_maps  # Pillow is an extra

    if _DATA.value or _TASKS.value or _PROBES.value:
        raise ValueError(
            f"--workdir={_WORKDIR.value}: its train.task is {config.train.task!r}, for which there is --attention-maps "
            "alone; its metrics are in the run's metrics.jsonl"
        )
    run = load_image_run(_WORKDIR.value, step=_STEP.value)
    print_result(run_image_maps(run, Path(_OUTPUT.value or run.workdir / "evaluation"), number=_IMAGE.value))


if __name__ == "__main__":
    run_command(main)
