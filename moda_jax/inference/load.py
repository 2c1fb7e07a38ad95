"""A trained run, ready for use: its config, parameters in the compute dtype, and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moda_jax.config import Config
from moda_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from moda_jax.inference.decode import inference_params
from moda_jax.model.function import ModelFunction, model_function, split_model
from moda_jax.tasks.language import LanguageModelling, language_params
from moda_jax.tasks.language_data import TOKENIZER_FILE
from moda_jax.tasks.registry import find_task
from moda_jax.training.checkpoint import CheckpointError, check_step, find_good_step, saved_steps, warn_of_skipped
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY, CONFIG_FILE, read_run_config


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What `load_run` returns.

    Attributes:
        workdir: the run's directory.
        config: the run's, with the attention implementation that is best on this device.
        model: the model as a function of `params`.
        params: nested dicts; matrices in the compute dtype, norm scales float32.
        tokenizer: that the run was trained with.
        step: of the checkpoint.
    """

    workdir: Path
    config: Config
    model: ModelFunction
    params: Any
    tokenizer: Tokenizer
    step: int

    @property
    def unit(self) -> str:
        """What a token is: "byte" or "token"."""
        return "byte" if self.config.data.tokenizer == "bytes" else "token"


def load_run(workdir: str | Path, *, step: int | None = None, tokenizer: str | None = None) -> LoadedRun:
    """Loads a run's parameters, and nothing of its optimizer. Writes nothing: the run may still be training.

    Args:
        workdir: the run's directory.
        step: of the checkpoint; None: the newest good one, and newer ones are named in the log with what is wrong.
        tokenizer: the run's tokenizer.json; None: the copy in the run's directory, or the one at `data.tokenizer` if
            there is none.

    Raises:
        ValueError: no run or no checkpoint there, `step` is damaged or, with None, every one is; or a tokenizer that is
            not the run's. The message says what is wrong, and what to do where something can be done.
    """
    config = read_run_config(workdir)
    workdir = Path(workdir)
    if not issubclass(find_task(config.train.task), LanguageModelling):
        raise ValueError(f"--workdir={workdir}: its train.task is {config.train.task!r}, which has no text to read")
    if tokenizer is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_implementation=None))
    directory = workdir / CHECKPOINT_DIRECTORY
    step = chosen_step(workdir, directory, step)
    loaded = load_tokenizer(config.data, workdir / TOKENIZER_FILE if tokenizer is None else None)
    _check_tokenizer(loaded, config, directory / str(step))
    params = restore_params(directory / str(step), config)
    model = model_function(config.model)
    return LoadedRun(workdir, config, model, inference_params(params, config.model), loaded, step)


def restore_params(directory: Path, config: Config, *, padded: bool = False) -> Any:
    """The parameters of one checkpoint, float32, on the default device.

    Args:
        directory: of the step; its files were compared with their checksums.
        config: the run's.
        padded: with the vocabulary padded, as training has them.

    Raises:
        CheckpointError: the parameters are not those of this config, or cannot be read.
    """
    expected = jax.eval_shape(functools.partial(_params, config), jax.random.key(0))
    with_padding = jax.eval_shape(functools.partial(language_params, config.model), jax.random.key(0))
    return restore_shapes(directory, *((with_padding, expected) if padded else (expected, with_padding)))


def restore_shapes(directory: Path, expected: Any, *others: Any) -> Any:
    """The parameters of one checkpoint, float32, on the default device.

    Args:
        directory: of the step; its files were compared with their checksums.
        expected: their shapes, nested dicts.
        *others: as the checkpoint may have them too; what it lacks then is zero.

    Raises:
        CheckpointError: it has others, or they cannot be read.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), expected)}
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    path = directory.absolute() / "state"
    try:
        saved = checkpointer.metadata(path).item_metadata.tree["params"]
        if _shapes(saved) in map(_shapes, (expected, *others)):
            how = ocp.checkpoint_utils.construct_restore_args(wanted)
            how = jax.tree.map(lambda leaf: dataclasses.replace(leaf, strict=False), how)  # pads with zeros, or cuts
            arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            return checkpointer.restore(path, args=arguments)["params"]
    except Exception as error:  # for damaged files Orbax raises anything, bare Exceptions included
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{directory}: cannot be restored ({reason}); name another checkpoint with --step"
        ) from error
    finally:
        checkpointer.close()
    raise CheckpointError(f"{directory}: its parameters are not those that {CONFIG_FILE} describes")


def _params(config: Config, key: jax.Array) -> Any:
    return split_model(config.model, key)[1]


def _shapes(tree: Any) -> dict[str, tuple]:
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def chosen_step(workdir: Path, directory: Path, step: int | None) -> int:
    """The step that was asked for, or the newest good one. Its files are as they were written."""
    steps = saved_steps(directory)
    if not steps:
        raise ValueError(
            f"--workdir={workdir}: holds no checkpoint yet; train.py saves one every checkpoint.interval_steps"
        )
    if step is None:
        return _newest_good_step(workdir, directory)
    if step not in steps:
        raise ValueError(f"--step={step}: no such checkpoint; {workdir} holds {', '.join(map(str, reversed(steps)))}")
    try:
        check_step(directory, step)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; name another checkpoint with --step") from error
    return step


def _newest_good_step(workdir: Path, directory: Path) -> int:
    step, skipped = find_good_step(directory)
    if step is None:
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in skipped)
        raise CheckpointError(f"--workdir={workdir}: holds no good checkpoint: {reasons}")
    warn_of_skipped(skipped)
    return step


def _check_tokenizer(tokenizer: Tokenizer, config: Config, directory: Path) -> None:
    check_vocabulary(tokenizer, config.model.vocab_size, config.data)
    try:
        record = json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8"))
        trained = record["tokenizer_fingerprint"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory}: its record cannot be read ({error!r}); name another checkpoint with --step"
        ) from error
    if trained != tokenizer.fingerprint:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r}: is not the tokenizer that the run was trained with "
            f"({tokenizer.fingerprint}, the run's is {trained}); name the right file with --tokenizer"
        )
