"""What evaluate.py does: perplexity, tasks, attention maps, depth probes; to the terminal and into files."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moda_jax.data.mixture import TokenMixture
from moda_jax.data.pipeline import open_dataset
from moda_jax.inference import attention_maps as maps_lib
from moda_jax.inference import depth_probes
from moda_jax.inference import perplexity as perplexity_lib
from moda_jax.inference.load import LoadedRun
from moda_jax.progress import progress_bar

_logger = logging.getLogger(__name__)

PERPLEXITY_FILE = "perplexity.json"
TASKS_FILE = "tasks.json"
MAPS_FILE = "attention_maps.png"


def check_perplexity(arguments: Sequence[str], feature: str = "text") -> list[perplexity_lib.Domain]:
    """Reads all domains before anything is computed.

    Raises:
        ValueError: see `perplexity.read_domain`; or two domains of one name.
    """
    domains = [perplexity_lib.read_domain(argument, feature) for argument in arguments]
    names = [domain.name for domain in domains]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--data={name}=...: given twice; give every domain its own name")
    return domains


def run_perplexity(
    run: LoadedRun,
    domains: Sequence[perplexity_lib.Domain],
    output: Path,
    *,
    context: int | None = None,
    stride: int | None = None,
) -> str:
    """Evaluates, writes perplexity.json, and returns the table. Arguments as in `perplexity.evaluate_domains`."""
    context, stride = perplexity_lib.checked_windows(run, context, stride)
    with progress_bar(desc="Perplexity", unit=" tokens", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        results = perplexity_lib.evaluate_domains(run, domains, context=context, stride=stride, progress=progress)
    values = _header(run) | {
        "context": context,
        "stride": stride,
        "domains": [dataclasses.asdict(result) for result in results],
    }
    _write(output / PERPLEXITY_FILE, values)
    return perplexity_lib.format_table(results)


def run_tasks(
    run: LoadedRun,
    names: Sequence[str],
    output: Path,
    *,
    task_directory: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    context: int | None = None,
) -> str:
    """Evaluates with lm-eval, writes tasks.json, and returns the table.

    Raises:
        NotImplementedError: lm-eval is not installed.
        ValueError: see `harness.find_tasks` and `harness.run_tasks`.
    """
    from moda_jax.inference import harness  # lm-eval is an extra

    context, _ = perplexity_lib.checked_windows(run, context, None)
    tasks, manager = harness.find_tasks(names, task_directory)
    model = harness.HarnessModel(run, context)
    results = harness.run_tasks(model, tasks, manager, num_fewshot=num_fewshot, limit=limit)
    kept = {key: results[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in results}
    _write(
        output / TASKS_FILE,
        _header(run) | {"context": context, "limit": limit, "cuts": dataclasses.asdict(model.cuts)} | kept,
    )
    return harness.format_results(results)


def run_attention_maps(
    run: LoadedRun, domains: Sequence[perplexity_lib.Domain], output: Path, *, context: int | None = None
) -> str:
    """Draws attention_maps.png and writes its numbers beside it; returns what was drawn.

    Args:
        run: the model.
        domains: the text is the first domain's first document that fills the context, or its longest; without a domain
            it comes from the run's own validation split.
        output: directory.
        context: tokens; None: `data.sequence_length`.
    """
    context, _ = perplexity_lib.checked_windows(run, context, None)
    tokens, source = _map_text(run, domains, context)
    maps = maps_lib.attention_maps(run.model, run.params, tokens)
    title = f"{run.workdir.name}, step {run.step}: {len(tokens)} tokens of {source}"
    output.mkdir(parents=True, exist_ok=True)
    maps_lib.draw(maps, output / MAPS_FILE, title=title)
    maps_lib.save_masses(maps, (output / MAPS_FILE).with_suffix(".json"))
    lines = [f"{'layer':>5} {'attention entries':>18} {'FFN entries':>12}   (mean mass on the depth slots)"]
    lines += [
        f"{layer:>5} {attention:>18.4f} {ffn:>12.4f}"
        for layer, (attention, ffn) in enumerate(zip(maps.attention_mass, maps.ffn_mass, strict=True))
    ]
    return "\n".join([*lines, f"drawn: {output / MAPS_FILE}"])


def run_depth_probes(run: LoadedRun, output: Path, *, tokens: int = depth_probes.PROBE_TOKENS) -> str:
    """Probes the depth slots on the run's validation split, writes depth_probes.json and .png, and returns the table.

    Args:
        run: the model.
        output: directory.
        tokens: about so many for each probe.

    Raises:
        ValueError: the model has no depth slot.
        NotImplementedError: its mechanism reads the stream elsewhere than in the attention op.
    """
    rules = depth_probes.hidings(run.config.model)
    batches = depth_probes.probe_batches(run, tokens)
    with progress_bar(desc="Depth probes", total=len(rules) * len(batches)) as bar:
        values = depth_probes.probe(run, batches, rules, progress=bar.update)
    _write(output / depth_probes.PROBES_FILE, _header(run) | values)
    picture = output / depth_probes.PICTURE_FILE
    title = f"{run.workdir.name}, step {run.step}: {values['tokens']} targets of the validation split"
    depth_probes.draw(values, picture, title=title, unit=run.unit)
    return f"{depth_probes.format_table(values)}\ndrawn: {picture}"


def _map_text(run: LoadedRun, domains: Sequence[perplexity_lib.Domain], context: int) -> tuple[np.ndarray, str]:
    """Tokens to draw, and where they are from."""
    longest = np.zeros(0, np.int32)
    if domains:
        for text in domains[0].documents:
            tokens = run.tokenizer.encode(text)[:context]
            longest = tokens if len(tokens) > len(longest) else longest
            if len(longest) == context:
                break
        return longest, domains[0].name
    data = open_dataset(run.config.data, "validation", run.tokenizer)
    data = data.parts[0] if isinstance(data, TokenMixture) else data
    lengths = np.diff(data.offsets)
    document = int(np.argmax(lengths >= context)) if (lengths >= context).any() else int(np.argmax(lengths))
    begin = int(data.offsets[document])
    count = min(context, int(lengths[document]))
    return np.asarray(data.tokens[begin : begin + count], np.int32), data.name


def _header(run: LoadedRun) -> dict[str, Any]:
    return {"workdir": str(run.workdir), "step": run.step}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    _logger.info("written to %s", path)
