"""Continues prompts: `moda-generate --workdir=DIRECTORY --prompt="TEXT" [--prompt="TEXT" ...]`.

The text comes as it is generated; of several prompts one after the other, though they run as one batch. In a clone of
the repository `python generate.py` is the same as `moda-generate`.
"""

from absl import flags

from moda_jax.inference.generation import OrderedText
from moda_jax.inference.language_model import cache_of, load
from moda_jax.inference.sampling import SamplingConfig
from moda_jax.training import runtime
from moda_jax.training.console import result_stream, run_command, user_errors

FLAGS = flags.FlagValues()

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run or of an exported model.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.", flag_values=FLAGS)
_EMA = flags.DEFINE_bool("ema", False, "Take the run's averaged weights (optimizer.ema_decay).", flag_values=FLAGS)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Where the run's tokenizer.json is, if it was moved.", flag_values=FLAGS
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.", flag_values=FLAGS)
_MAX_TOKENS = flags.DEFINE_integer("max-tokens", 200, "Tokens per continuation.", flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token (greedy).", flag_values=FLAGS)
_TOP_K = flags.DEFINE_integer("top-k", None, "Draw from the k likeliest tokens only.", flag_values=FLAGS)
_TOP_P = flags.DEFINE_float(
    "top-p", None, "Draw from the fewest tokens whose probabilities reach p.", flag_values=FLAGS
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "A text that ends the continuation; may be given several times.", flag_values=FLAGS
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "The same seed gives the same text.", lower_bound=-(2**63), upper_bound=2**63 - 1, flag_values=FLAGS
)


def main() -> None:
    """The command `moda-generate`; ends the process."""
    run_command(generate_text, FLAGS, __doc__)


def generate_text() -> None:
    """Loads the run, generates, and writes prompts and continuations to stdout."""
    with user_errors():
        if _WORKDIR.value is None:
            raise ValueError("--workdir: missing; name the directory of a run, as in --workdir=runs/quickstart")
        SamplingConfig(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)  # says what is wrong before anything is loaded
        runtime.prepare(cache_of(_WORKDIR.value))
        runtime.require_device()
        model = load(_WORKDIR.value, step=_STEP.value, tokenizer=_TOKENIZER.value, ema=_EMA.value)
        shown = OrderedText(_PROMPT.value, result_stream())
        model.generate(
            *_PROMPT.value, max_tokens=_MAX_TOKENS.value, temperature=_TEMPERATURE.value, top_k=_TOP_K.value,
            top_p=_TOP_P.value, stop=_STOP.value, seed=_SEED.value, on_text=shown.add, on_end=shown.end,
        )  # fmt: skip
