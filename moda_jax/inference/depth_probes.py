"""What the depth slots are worth to a trained model: the mass on each, and the loss when some are hidden.

A hiding is a rule that takes slots away from every layer that would read them; nothing is trained again. The losses
of one probe are over the same rows, so their differences carry no sampling noise of the text. What a hiding costs is
what the model, as it was trained, loses without those slots; it is no statement about a model that was trained so.

Axes: L layers, S depth slots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moda_jax.config import TransformerConfig
from moda_jax.data.packing import Batch
from moda_jax.data.pipeline import open_dataset, validation_batches
from moda_jax.inference.load import LoadedRun
from moda_jax.model.depth_probe import (
    SlotChoice,
    check_has_depth,
    depth_mass,
    filled_slots,
    probed_hidden,
    slot_writers,
)
from moda_jax.model.function import ModelFunction
from moda_jax.numerics.cross_entropy import ALONE, projected_loss_sums
from moda_jax.pictures import PROBABILITY, UNFILLED, labelled, legend_below, log_probability, look, picture, whole_ticks

Array = jax.Array

PROBES_FILE = "depth_probes.json"
PICTURE_FILE = "depth_probes.png"
KINDS = ("attention", "ffn")
KEPT = (1, 2, 4, 8, 16)  # slots that a window keeps; the steps of a stride
PROBE_TOKENS = 2**18
# What the bars of a picture are grouped by: how the names of the rules begin.
_GROUPS = {
    "all, or one kind": ("all", "kind:"),
    "what one layer wrote": "layer:",
    "all but a few": "only ",
}


def hidings(config: TransformerConfig) -> dict[str, np.ndarray]:
    """The rules by name: bool [L, S] each, the slots that a layer still reads.

    "none"; "all"; "kind:attention", "kind:ffn": entries of that kind are hidden; "layer:N": those that layer N wrote;
    "only last:N", "only first:N": a layer reads the last (first) N of its slots; "only every:N": slots 0, N, 2N, ...;
    "only first:N and last:N": both.

    Args:
        config: of a model with a depth stream.
    """
    check_has_depth(config)
    filled = filled_slots(config)
    writer, entry = slot_writers(config)
    slot, count = np.arange(config.depth_slots), filled.sum(axis=1, keepdims=True)
    rules = {"none": filled, "all": np.zeros_like(filled)}
    if config.depth_entries_per_layer > 1:
        rules |= {f"kind:{kind}": filled & (entry != number) for number, kind in enumerate(KINDS)}
    rules |= {f"layer:{layer}": filled & (writer != layer) for layer in range(config.num_layers - 1)}
    for kept in (number for number in KEPT if number < config.depth_slots):
        last, first = filled & (slot >= count - kept), filled & (slot < kept)
        rules |= {f"only last:{kept}": last, f"only first:{kept}": first}
        rules[f"only first:{kept} and last:{kept}"] = first | last
        if kept > 1:
            rules[f"only every:{kept}"] = filled & (slot % kept == 0)
    return rules


def probe(
    run: LoadedRun,
    batches: Iterable[Batch],
    rules: dict[str, np.ndarray] | None = None,
    progress: Callable[[int], object] = lambda evaluations: None,
) -> dict[str, Any]:
    """The masses, and the loss under each rule, on some batches.

    Args:
        run: a model with a depth stream.
        batches: rows with targets, all of one shape.
        rules: from `hidings`; None: all of them. "none" is always among them.
        progress: told after each evaluation of a batch.

    Returns:
        For JSON: "tokens" (targets that counted), "losses" {rule: nats per target}, "slot_mass" [L, S], "depth_mass",
        "kinds" (of a layer's entries), "entries_per_layer".

    Raises:
        ValueError, NotImplementedError: as `probed_hidden`; or no batch.
    """
    config = run.config.model
    rules = {"none": filled_slots(config)} | (hidings(config) if rules is None else rules)
    batches = list(batches)
    if not batches:
        raise ValueError("probe: got no batch, expected at least one")
    losses, mass, targets = {}, None, 0.0
    for name, visible in rules.items():
        choice, pending = SlotChoice.of(visible), []
        for batch in batches:
            pending.append(_probe(run.model, run.params, batch, choice))
            progress(1)
        sums = [(float(loss), float(count)) for loss, count, _ in pending]
        targets = math.fsum(count for _, count in sums)
        losses[name] = math.fsum(loss for loss, _ in sums) / max(targets, 1.0)
        if name == "none":
            mass = np.mean([np.asarray(masses, np.float64) for _, _, masses in pending], axis=0)
    entries = config.depth_entries_per_layer
    return {
        "tokens": round(targets),
        "losses": {name: round(loss, 6) for name, loss in losses.items()},
        "depth_mass": round(float(depth_mass(mass)), 6),
        "slot_mass": [[round(float(value), 6) for value in row] for row in mass],
        "kinds": list(KINDS[:entries]),
        "entries_per_layer": entries,
    }


def probe_batches(run: LoadedRun, tokens: int = PROBE_TOKENS) -> list[Batch]:
    """Rows spread evenly over the run's validation split: about `tokens` of them in micro-batches of its training."""
    config = run.config
    rows = max(1, config.train.batch_size // config.train.accumulation_steps)
    data = open_dataset(config.data, "validation", run.tokenizer)
    count = max(1, round(tokens / (rows * config.data.sequence_length)))
    return list(validation_batches(data, config.data, batch_size=rows, num_batches=count))


@functools.partial(jax.jit, static_argnames="model")
def _probe(model: ModelFunction, params: Any, batch: Batch, choice: SlotChoice) -> tuple[Array, Array, Array]:
    """(sum of the losses in nats, number of targets, masses [L, S])."""
    module = model.module(params)
    hidden, mass = probed_hidden(module, batch.tokens, batch.segment_ids, batch.positions, choice)
    _, sums = projected_loss_sums(
        0.0, module.config.vocab_size, ALONE, hidden, module.output_table(), batch.targets, batch.target_mask
    )
    return sums.loss, sums.num_targets, mass


def mass_by_kind(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """From `probe`'s values: kind -> [L], the mass of each reading layer on all slots of that kind."""
    mass = np.asarray(values["slot_mass"])
    entries = values["entries_per_layer"]
    return {kind: mass[:, number::entries].sum(axis=1) for number, kind in enumerate(values["kinds"])}


def format_table(values: dict[str, Any]) -> str:
    """The probe for a terminal: a line per rule with the loss and what it is above the model's own, then the masses."""
    own = values["losses"]["none"]
    width = max(map(len, values["losses"]))
    lines = [f"{'hidden':{width}} {'loss':>8} {'cost':>8}   ({values['tokens']} targets)"]
    lines += [f"{name:{width}} {loss:>8.4f} {loss - own:>+8.4f}" for name, loss in values["losses"].items()]
    kinds = mass_by_kind(values)
    lines += ["", f"{'layer':>5} " + " ".join(f"{kind + ' entries':>18}" for kind in kinds) + "   (mean mass)"]
    lines += [
        f"{layer:>5} " + " ".join(f"{masses[layer]:>18.4f}" for masses in kinds.values())
        for layer in range(len(values["slot_mass"]))
    ]
    return "\n".join(lines)


def draw(values: dict[str, Any], path: Path, *, title: str, unit: str = "token") -> None:
    """Draws the mass by reading layer and slot, and the cost of each hiding.

    Args:
        values: from `probe`.
        path: the PNG to write; its directory is made.
        title: of what run and text.
        unit: what a target is: the loss is in nats per token, or byte.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, 11, 9.5) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=(1, 1))
        figure.suptitle(title)
        _draw_mass(figure, top, values)
        names = [name for name in values["losses"] if name != "none"]
        costs = {name: values["losses"][name] - values["losses"]["none"] for name in names}
        for number, (label, starts) in enumerate(_GROUPS.items()):
            places = [place for place, name in enumerate(names) if name.startswith(starts)]
            if places:
                bottom.bar(places, [costs[names[place]] for place in places], label=label, **look(number).bar)
        bottom.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        bottom.grid(axis="x", visible=False)
        bottom.set_yscale("symlog", linthresh=1e-3)
        bottom.set(
            ylabel=f"nats per {unit} above the model's own loss",
            title="What the trained model loses when slots are hidden from every layer",
        )
        legend_below(figure, labelled(bottom), columns=len(_GROUPS))


def _draw_mass(figure: Any, axes: Any, values: dict[str, Any]) -> None:
    """The map of the masses: a row per reading layer, a column per slot."""
    mass = np.asarray(values["slot_mass"])
    filled = mass > 0
    norm = log_probability(max(1e-5, float(mass[filled].min(initial=1.0))), max(2e-5, float(mass.max())))
    axes.set_facecolor(UNFILLED["facecolor"])
    drawn = axes.imshow(
        np.where(filled, mass, np.nan), norm=norm, aspect="auto", interpolation="nearest", cmap=PROBABILITY
    )
    axes.grid(visible=False)
    axes.set(
        xlabel=f"slot (a layer's entries in order: {', '.join(values['kinds'])}); grey: not written before that layer",
        ylabel="reading layer",
        title="Mean attention probability of each depth slot",
    )
    whole_ticks(axes)
    figure.colorbar(drawn, ax=axes, label="mean probability")
