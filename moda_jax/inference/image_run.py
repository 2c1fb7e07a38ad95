"""A trained run of the vision task, ready for use, and what evaluate.py does with it."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moda_jax.config import Config
from moda_jax.data.image_pipeline import fit_image, image_validation_batches
from moda_jax.data.images import open_images
from moda_jax.inference.image_maps import draw_image_maps, image_maps, save_image_masses
from moda_jax.inference.load import chosen_step, require_average, restore_shapes
from moda_jax.model.function import ModelFunction
from moda_jax.tasks.registry import find_task
from moda_jax.tasks.vision import Vision, normalised
from moda_jax.training.train_step import make_eval_step
from moda_jax.training.workdir import CHECKPOINT_DIRECTORY, read_run_config

MAPS_FILE = "attention_maps.png"
VALIDATION_FILE = "validation.json"


@dataclasses.dataclass(frozen=True)
class ImageRun:
    """What `load_image_run` returns.

    Attributes:
        workdir: the run's directory.
        config: the run's, with the attention implementation that is best on this device.
        model: the model as a function of `params`.
        params: nested dicts of float32 arrays.
        step: of the checkpoint.
        ema: whether `params` are averaged.
    """

    workdir: Path
    config: Config
    model: ModelFunction
    params: Any
    step: int
    ema: bool = False

    @property
    def name(self) -> str:
        """Directory, step and which weights, in words."""
        return f"{self.workdir.name}, step {self.step}" + (", averaged weights" if self.ema else "")


def load_image_run(workdir: str | Path, *, step: int | None = None, ema: bool = False) -> ImageRun:
    """Loads a run's parameters, and nothing else of its training. Writes nothing: the run may still be training.

    Args:
        workdir: the run's directory.
        step: of the checkpoint; None: the newest good one.
        ema: the averaged weights (`optimizer.ema_decay`) instead.

    Raises:
        ValueError: no run of the vision task or no checkpoint there, no averaged weights in it, or a damaged one.
    """
    config = read_run_config(workdir)
    if not issubclass(find_task(config.train.task), Vision):
        raise ValueError(f"--workdir={workdir}: its train.task is {config.train.task!r}, expected 'vision'")
    if ema:
        require_average(workdir, config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_implementation=None))
    workdir = Path(workdir)
    directory = workdir / CHECKPOINT_DIRECTORY
    step = chosen_step(workdir, directory, step)
    task = find_task(config.train.task)(config)
    expected = jax.eval_shape(task.initial_params, jax.random.key(0))
    params = restore_shapes(directory / str(step), expected, ema=ema)
    return ImageRun(workdir, config, task.model, params, step, ema)


def run_validation(run: ImageRun, output: Path) -> str:
    """The task's metrics over the whole validation split, which are also written to validation.json; returns them in
    words.

    Args:
        run: the model.
        output: directory.

    Raises:
        ValueError: the split cannot be read.
    """
    config = run.config
    task = find_task(config.train.task)(config)
    data = open_images(config.data, "validation", config.model.image.channels)
    evaluate = jax.jit(make_eval_step(task.objective, config.train))
    batches = image_validation_batches(data, config.data, config.model.image, batch_size=config.train.batch_size)
    totals = collections.Counter()
    for batch in batches:
        totals.update({name: float(value) for name, value in evaluate(run.params, batch)._asdict().items()})
    values = task.values({name: total / totals["num_targets"] for name, total in totals.items()})
    output.mkdir(parents=True, exist_ok=True)
    facts = {"workdir": str(run.workdir), "step": run.step, "ema": run.ema, "images": len(data)}
    (output / VALIDATION_FILE).write_text(json.dumps(facts | values, indent=1) + "\n", encoding="utf-8")
    return f"{run.name}: {task.describe(values)}, over {len(data)} images of {data.name}"


def run_image_maps(run: ImageRun, output: Path, *, number: int = 0) -> str:
    """Draws attention_maps.png of one image of the validation split and writes its numbers beside it; returns what was
    drawn.

    Args:
        run: the model.
        output: directory.
        number: of the image.

    Raises:
        ValueError: the split has no image of that number.
    """
    config, image = run.config, run.config.model.image
    data = open_images(config.data, "validation", image.channels)
    if not 0 <= number < len(data):
        raise ValueError(f"--image={number}: expected 0..{len(data) - 1}, an image of {data.name}")
    picture = fit_image(data.read(number), image.size, config.data.images.crop_fraction)
    given = normalised(picture[None], config)
    maps = image_maps(run.model, run.params, np.asarray(given[0]))
    logits = np.asarray(run.model.module(run.params)(given)[0])
    label, found = (data.classes[i] for i in (int(data.labels[number]), int(logits[: len(data.classes)].argmax())))
    title = f"{run.name}: image {number} of {data.name}, a {label}, taken for a {found}"
    output.mkdir(parents=True, exist_ok=True)
    draw_image_maps(maps, picture, output / MAPS_FILE, title=title)
    save_image_masses(maps, (output / MAPS_FILE).with_suffix(".json"))
    lines = [f"{'layer':>5} {'depth slots':>12} {'class token':>12}   (mean mass over the heads)"]
    lines += [
        f"{layer:>5} {depth:>12.4f} {first:>12.4f}"
        for layer, (depth, first) in enumerate(zip(maps.depth_mass, maps.class_token.mean(axis=-1), strict=True))
    ]
    return "\n".join([title, *lines, f"drawn: {output / MAPS_FILE}"])
