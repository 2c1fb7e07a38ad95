"""`train.init_from`: the parameters that a run starts with, out of another run's directory, an export, or of a vision
transformer a checkpoint in timm's layout.

Parameters only: optimizer, step and data are those of a fresh run. Names and shapes must be those of the config's
model; what a depth mechanism has beside a source without it starts as its `added` says, close to the source. A head
over another number of classes begins anew.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moda_jax.config import Config, TransformerConfig
from moda_jax.data.tokenizer import load_tokenizer
from moda_jax.inference.load import restore_params, restore_shapes
from moda_jax.interop.deit import is_deit, load_deit
from moda_jax.interop.depth_init import with_added
from moda_jax.interop.exchange import load_model
from moda_jax.interop.olmo2 import SINGLE_FILE
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.function import split_model
from moda_jax.paths import expand_home
from moda_jax.tasks.language import LanguageModelling
from moda_jax.tasks.registry import find_task, make_task
from moda_jax.training.checkpoint import find_good_step, warn_of_skipped
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY, CONFIG_FILE, read_config

_logger = logging.getLogger(__name__)

# With other values the same parameters would be read as another model.
_SAME = ("num_heads", "num_kv_heads", "head_dim", "norm")
# What says how a model computes and not what.
_FREE = (
    "attention_implementation", "dtype", "remat", "layer_loop", "depth_gradient_dtype", "depth_gradient_group",
    "initializer_range", "max_sequence_length", "stochastic_depth",
)  # fmt: skip


def starting_params(config: Config) -> Any:
    """The parameters that `train.init_from` names, for the config's model.

    Args:
        config: of the run that starts.

    Returns:
        Nested dicts of float32 arrays, as the model names them.

    Raises:
        ValueError: nothing is there that parameters can be read from, or they are another model's: each parameter that
            differs is named, with both shapes.
        NotImplementedError: of another task than language modelling and vision.
    """
    field = f"train.init_from={config.train.init_from!r}"
    _check_task(config, field)
    place = expand_home(config.train.init_from, "train.init_from")
    images = of_images(config)
    if not (place.is_dir() or (images and place.is_file())):
        raise ValueError(f"{field}: no such directory; expected a run's, or an export's")
    if (place / CHECKPOINT_DIRECTORY).is_dir():
        base, params, what = _of_run(place, config, field)
    elif images:
        base, params = _of_deit(place, config, field)
        what = "a vision transformer in timm's layout"
    elif (place / CONFIG_FILE).is_file():
        base, params = _of_export(place, field)
        what = "an export"
    else:
        raise ValueError(f"{field}: holds no {CHECKPOINT_DIRECTORY}/ and no {CONFIG_FILE}: no run and no export")
    added: list[str] = []
    key = jax.random.key(config.train.seed)
    initial, old_classes = initial_params(config), base.image.num_classes
    if images and old_classes != config.model.image.num_classes:
        base, params = _with_fresh_head(base, params, config, key, initial)
    params = fitted(base, params, config.model, key, field, added, initial)
    _logger.info("starting from %s, %s: its parameters, a fresh optimizer, step 0", place, what)
    if base.image.num_classes != old_classes:
        _logger.info(
            "model.image.num_classes: %d in %s, %d now: the head begins anew", old_classes, place,
            base.image.num_classes,
        )  # fmt: skip
    if added:
        _logger.info("not in %s, and started close to what it does without: %s", place, ", ".join(added))
    return params


def of_images(config: Config) -> bool:
    """Whether the run's model is a vision transformer."""
    return find_task(config.train.task).items == "images"


def initial_params(config: Config) -> Callable[[jax.Array], Any]:
    """A function from a key to fresh parameters of the config's model, the vocabulary without padding."""
    if of_images(config):
        return make_task(config).initial_params
    return lambda key: split_model(config.model, key)[1]


def fitted(
    base: TransformerConfig,
    params: Any,
    config: TransformerConfig,
    key: jax.Array,
    field: str,
    added: list[str],
    initial: Callable[[jax.Array], Any] | None = None,
) -> Any:
    """Parameters of `base` as those of `config`'s model.

    Args:
        base: the model that they are of.
        params: nested dicts of float32 arrays.
        config: the model that starts.
        key: a typed PRNG key, for parameters that a depth mechanism adds.
        field: begins the messages.
        added: the names of those are appended.
        initial: fresh parameters of the model that starts, from a key; None: a `Transformer`'s.

    Raises:
        ValueError: the models differ in more than what depth adds.
    """
    for name in _SAME:
        ours, theirs = getattr(config, name), getattr(base, name)
        if ours != theirs:
            raise ValueError(f"model.{name}={ours!r}: {field} has {theirs!r}")
    if base.depth not in ("none", config.depth):
        raise ValueError(
            f"model.depth={config.depth!r}: {field} has {base.depth!r}; depth can be kept, or added to a model without"
        )
    initial = initial or (lambda key: split_model(config, key)[1])
    expected, found = _shapes(jax.eval_shape(initial, key)), _shapes(params)
    missing = [name for name in expected if name not in found]
    added += [name for name in missing if ".depth." in name]
    wrong = [f"{name}: not there, {list(expected[name])} here" for name in missing if name not in added]
    wrong += [f"{name}: {list(found[name])} there, not here" for name in found if name not in expected]
    wrong += [
        f"{name}: {list(found[name])} there, {list(shape)} here"
        for name, shape in expected.items() if name in found and found[name] != shape
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"{field}: its parameters are not those of this config's model:\n  " + "\n  ".join(wrong))
    for item in dataclasses.fields(config):
        ours, theirs = getattr(config, item.name), getattr(base, item.name)
        if ours != theirs and item.name not in (*_FREE, "depth"):
            _logger.warning("model.%s: %r in %s, %r now", item.name, theirs, field, ours)
    if not added:
        return params
    fresh = jax.jit(initial)(key)  # not one operation at a time
    return with_added(fresh, params, find_mechanism(config.depth))


def _with_fresh_head(
    base: TransformerConfig, params: Any, config: Config, key: jax.Array, initial: Callable[[jax.Array], Any]
) -> tuple[TransformerConfig, Any]:
    """Model and parameters with a head as a fresh model of `config` has it."""
    image = dataclasses.replace(base.image, num_classes=config.model.image.num_classes)
    head = jax.jit(lambda key: initial(key)["head"])(key)
    return dataclasses.replace(base, image=image), {**params, "head": head}


def _of_run(place: Path, config: Config, field: str) -> tuple[TransformerConfig, Any, str]:
    """Model, parameters, and the step in words, of a run's newest good checkpoint."""
    theirs = read_config(place)
    if theirs is None:
        raise ValueError(f"{field}: holds no {CONFIG_FILE}, so it is no run's directory")
    if of_images(theirs) != of_images(config):
        raise ValueError(f"train.task={config.train.task!r}: {field} is a run of {theirs.train.task!r}")
    _check_task(theirs, field)
    step, skipped = find_good_step(place / CHECKPOINT_DIRECTORY)
    if step is None:
        reasons = "".join(f"\n  step {number}: {reason}" for number, reason in skipped)
        raise ValueError(f"{field}: holds no good checkpoint{reasons and ':' + reasons}")
    warn_of_skipped(skipped)
    directory = place / CHECKPOINT_DIRECTORY / str(step)
    what = f"step {step} of {theirs.train.num_steps}"
    if of_images(theirs):
        expected = jax.eval_shape(initial_params(theirs), jax.random.key(0))
        return theirs.model, restore_shapes(directory, expected), what
    trained = json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8")).get("tokenizer_fingerprint")
    own = load_tokenizer(config.data).fingerprint
    if trained != own:
        _logger.warning(
            "data.tokenizer=%r: is not the tokenizer that %s was trained with (%s, this one is %s): the rows of its "
            "embedding are other tokens'", config.data.tokenizer, field, trained, own,
        )  # fmt: skip
    return theirs.model, restore_params(directory, theirs), what


def _of_export(place: Path, field: str) -> tuple[TransformerConfig, Any]:
    """Model and parameters of an export, ours or transformers'."""
    try:
        base, model = load_model(place)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{field}: {error}") from error
    return base, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _of_deit(place: Path, config: Config, field: str) -> tuple[TransformerConfig, Any]:
    """Model and parameters of a checkpoint in timm's layout, which does not say how many heads there are."""
    if not is_deit(place):
        raise ValueError(
            f"{field}: holds no {CHECKPOINT_DIRECTORY}/ and no {SINGLE_FILE} of a vision transformer in timm's layout"
        )
    try:
        base, model = load_deit(place, num_heads=config.model.num_heads)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return base, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _check_task(config: Config, field: str) -> None:
    if not (of_images(config) or issubclass(find_task(config.train.task), LanguageModelling)):
        raise NotImplementedError(
            f"{field}: starts models of language and images only; train.task is {config.train.task!r}"
        )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {".".join(key.key for key in path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(params)}
