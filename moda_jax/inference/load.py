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
from moda_jax.training.averaged import AveragedParams
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


def load_run(
    workdir: str | Path, *, step: int | None = None, tokenizer: str | None = None, ema: bool = False
) -> LoadedRun:
    """Loads a run's parameters, and nothing else of its training. Writes nothing: the run may still be training.

    Args:
        workdir: the run's directory.
        step: of the checkpoint; None: the newest good one, and newer ones are named in the log with what is wrong.
        tokenizer: the run's tokenizer.json; None: the copy in the run's directory, or the one at `data.tokenizer` if
            there is none.
        ema: the averaged weights (`optimizer.ema_decay`) instead.

    Raises:
        ValueError: no run or no checkpoint there, no averaged weights in it, `step` is damaged or, with None, every one
            is; or a tokenizer that is not the run's. The message says what is wrong, and what to do where something can
            be done.
    """
    config = read_run_config(workdir)
    workdir = Path(workdir)
    if not issubclass(find_task(config.train.task), LanguageModelling):
        raise ValueError(f"--workdir={workdir}: its train.task is {config.train.task!r}, which has no text to read")
    if ema:
        require_average(workdir, config)
    if tokenizer is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_implementation=None))
    directory = workdir / CHECKPOINT_DIRECTORY
    step = chosen_step(workdir, directory, step)
    loaded = load_tokenizer(config.data, workdir / TOKENIZER_FILE if tokenizer is None else None)
    _check_tokenizer(loaded, config, directory / str(step))
    params = restore_params(directory / str(step), config, ema=ema)
    model = model_function(config.model)
    return LoadedRun(workdir, config, model, inference_params(params, config.model), loaded, step)


def require_average(workdir: str | Path, config: Config) -> None:
    """Checks that a run keeps averaged weights.

    Raises:
        ValueError: it does not.
    """
    if not config.optimizer.ema_decay:
        raise ValueError(f"--ema: {workdir} has no averaged weights; it is trained with optimizer.ema_decay=0")


def restore_params(directory: Path, config: Config, *, padded: bool = False, ema: bool = False) -> Any:
    """The parameters of one checkpoint, float32, on the default device.

    Args:
        directory: of the step; its files were compared with their checksums.
        config: the run's.
        padded: with the vocabulary padded, as training has them.
        ema: their average instead; the config has one.

    Raises:
        CheckpointError: the parameters are not those of this config, or cannot be read.
    """
    expected = jax.eval_shape(functools.partial(_params, config), jax.random.key(0))
    with_padding = jax.eval_shape(functools.partial(language_params, config.model), jax.random.key(0))
    return restore_shapes(directory, *((with_padding, expected) if padded else (expected, with_padding)), ema=ema)


def restore_shapes(directory: Path, expected: Any, *others: Any, ema: bool = False) -> Any:
    """The parameters of one checkpoint, float32, on the default device.

    Args:
        directory: of the step; its files were compared with their checksums.
        expected: their shapes, nested dicts.
        *others: as the checkpoint may have them too; what it lacks then is zero.
        ema: their average instead.

    Raises:
        CheckpointError: it has others, or they cannot be read.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), expected)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    path = directory.absolute() / "state"
    try:
        saved = checkpointer.metadata(path).item_metadata.tree
        place_of_params = _place_of_average(saved) if ema else ("params",)
        if _shapes(_at(saved, place_of_params)) in map(_shapes, (expected, *others)):
            item = _alone(saved, place_of_params, wanted)
            how = ocp.checkpoint_utils.construct_restore_args(item)
            how = jax.tree.map(lambda leaf: dataclasses.replace(leaf, strict=False), how)  # pads with zeros, or cuts
            arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            return _at(checkpointer.restore(path, args=arguments), place_of_params)
    except Exception as error:  # for damaged files Orbax raises anything, bare Exceptions included
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{directory}: cannot be restored ({reason}); name another checkpoint with --step"
        ) from error
    finally:
        checkpointer.close()
    raise CheckpointError(f"{directory}: its parameters are not those that {CONFIG_FILE} describes")


def _place_of_average(tree: Any) -> tuple:
    """Where in a saved state the average lies (`AveragedParams`, whose fields are saved by their names).

    Raises:
        KeyError: there is none.
    """
    places: list[tuple[tuple, Any]] = [((), tree)]
    for path, node in places:  # grows as it is read
        if isinstance(node, dict) and set(node) == set(AveragedParams._fields):
            return (*path, "average")
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        places += [((*path, key), child) for key, child in children]
    raise KeyError("average")


def _at(tree: Any, path: tuple) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _alone(tree: Any, path: tuple, wanted: Any) -> Any:
    """A tree that has `wanted` at a place of a saved one, and nothing else."""
    if not path:
        return wanted
    below = _alone(tree[path[0]], path[1:], wanted)
    if isinstance(tree, dict):
        return {path[0]: below}
    return [below if number == path[0] else None for number in range(len(tree))]


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
