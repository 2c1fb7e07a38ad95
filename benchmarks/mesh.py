"""Times the train step on the GPUs of one machine, for each axis of the mesh, and what `context` exchanges.

    python -m benchmarks.mesh [--config=configs/moda_700m.py:row4] [--sequences-per-device=8] [--output=DIRECTORY]

Step: one device, then every axis over all devices, the same sequences per device; "efficiency" is tokens per second
and device as a share of one device's. Random tokens of one document per row.

Exchange, `context` over all devices, one layer of the config's own heads: `gather` collects the sequence K and V of all
tokens (done in the forward and again in the backward), `scatter` returns their gradients, `attention` is the op's
forward and backward with both in it. A ring would move the same bytes in pieces and could hide them behind attention:
(2 gather + scatter) / attention is the most that it could gain in attention's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import profile, timing
from benchmarks.scaling import load_config
from benchmarks.training import synthetic_batch
from moda_jax.config import Config, MeshConfig
from moda_jax.parallel.attention import (
    attention_backward,
    attention_forward,
    causal_mask,
    gather_tokens,
    scatter_tokens,
)
from moda_jax.parallel.mesh import AXES, make_mesh, named_sharding, on_mesh
from moda_jax.training.program import Program
from pallas_kernels.operands import Call, Upstream
from pallas_kernels.parts import delta

RESULTS = Path(__file__).parent / "results"
EXCHANGES = ((8, 4096), (1, 65536))  # sequences, tokens


def time_step(
    config: Config, devices: list[jax.Device], rounds: int, steps: int, kernels: Path | None = None
) -> dict[str, Any]:
    """Seconds of a step, memory; where the first GPU's time goes, if `kernels` names a file for its slowest kernels.

    Profile with XLA_FLAGS=--xla_gpu_enable_command_buffer= (empty), see `benchmarks.profile`.
    """
    program = Program(config, devices=devices)
    state, step = program.initialize(), program.train_step
    batch = program.distribution.place(synthetic_batch(config))
    began = time.perf_counter()
    compiled = step.lower(state, batch, program.plan).compile()
    compile_seconds = time.perf_counter() - began
    times = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, batch, program.plan)
        jax.block_until_ready(state)
        if number:
            times.append((time.perf_counter() - began) / steps)
    seconds = statistics.median(times)
    tokens = config.train.batch_size * config.data.sequence_length
    memory = devices[0].memory_stats() or {}
    categories = {}
    if kernels is not None:
        traced, text = profile.launches(lambda: compiled(state, batch, program.plan)), compiled.as_text()
        found = profile.kernel_seconds(traced)
        categories = {"seconds_by_category": profile.seconds_by_category(found, text)}
        kernels.write_text(profile.kernel_table(found, text) + profile.idle_table(traced))
    return categories | {
        "devices": len(devices), "batch_size": config.train.batch_size, "seconds_per_step": times,
        "tokens_per_second_and_device": tokens / seconds / len(devices), "compile_seconds": compile_seconds,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes, "loss": float(metrics.loss),
        "peak_bytes_so_far": memory.get("peak_bytes_in_use"),
    }  # fmt: skip


def time_exchange(config: Config, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds of gather, scatter and the whole op, forward and backward, for one layer without depth slots."""
    mesh = make_mesh(MeshConfig(**dict.fromkeys(AXES, 1) | {"context": -1}))
    context = mesh.shape["context"]
    model = config.model
    options = {"implementation": model.attention_implementation}
    dtype = jnp.bfloat16

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        heads = model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads
        keys = jax.random.split(key, len(heads))
        return tuple(
            jax.random.normal(k, (batch, tokens, n, model.head_dim), dtype) for k, n in zip(keys, heads, strict=True)
        )

    sharding = named_sharding(mesh, "batch", "tokens", None, None)
    draw = jax.jit(draw, out_shardings=sharding)

    def on_shards(function: Any) -> Any:
        mapped = jax.shard_map(
            lambda x: function(x, context), mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
        )
        return lambda query, key, value, dout: (mapped(key), mapped(value))

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array) -> Any:
        call = Call(query, key, value, causal_mask(), scale=model.head_dim**-0.5)
        part = attention_forward(call, **options)
        return attention_backward(call, Upstream(dout, part.lse, delta(dout, part)), **options)[:3]

    # Of a gathered array every device returns its own first part, so that nothing else is moved or kept.
    contestants = {
        "gather": on_shards(lambda x, c: gather_tokens(x, c)[:, : x.shape[1]]),
        "scatter": on_shards(lambda x, c: scatter_tokens(jnp.tile(x, (1, c, 1, 1)), c)),
        "tile": on_shards(lambda x, c: jax.lax.optimization_barrier(jnp.tile(x, (1, c, 1, 1)))[:, : x.shape[1]]),
        "attention": on_mesh(mesh, attention),
    }
    # Virtual CPU devices have too few threads for two programs with collectives in flight.
    stretch = 0.02 if jax.default_backend() == "gpu" else 0.0
    times = timing.median_seconds(contestants, timing.input_sets(draw), rounds=rounds, calls_seconds=stretch)
    failed = {name: value for name, value in times.items() if isinstance(value, str)}
    if failed:
        raise RuntimeError(f"exchange at {batch} x {tokens}: {failed}")
    moved = 2 * times["gather"] + times["scatter"] - times["tile"]
    return {"batch": batch, "tokens": tokens, "context": context, **times, "exchange_share": moved / times["attention"]}


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"{'mesh':12} {'devices':>7} {'batch':>5} {'ms/step':>9} {'tokens/s/device':>15} {'efficiency':>10}"]
    for name, row in result["steps"].items():
        base = result["steps"]["one device"]["tokens_per_second_and_device"]
        speed, seconds = row["tokens_per_second_and_device"], statistics.median(row["seconds_per_step"])
        lines.append(
            f"{name:12} {row['devices']:7d} {row['batch_size']:5d} {1e3 * seconds:9.1f} "
            f"{speed:15.0f} {speed / base:10.1%}"
        )
    columns = f"{'batch x tokens':16} {'gather ms':>10} {'scatter ms':>10} {'attention ms':>12} {'exchange share':>14}"
    lines += ["", columns]
    lines += [
        f"{row['batch']:3d} x {row['tokens']:<10d} {1e3 * row['gather']:10.3f} "
        f"{1e3 * (row['scatter'] - row['tile']):10.3f} {1e3 * row['attention']:12.3f} {row['exchange_share']:14.1%}"
        for row in result["exchanges"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Times all axes and writes mesh.json and mesh.txt."""
    parser = argparse.ArgumentParser(description="Times train steps on the GPUs of one machine, by mesh axis.")
    parser.add_argument("--config", default="configs/moda_700m.py:row4")
    parser.add_argument("--sequences-per-device", "--sequences_per_device", type=int, default=8)
    parser.add_argument("--axes", default="data,fsdp,tensor,context", help="whose steps are timed; empty: none")
    parser.add_argument("--model", default="{}", help="JSON of model fields to change, for trials")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kernels", default=None, help="profile each step; its slowest kernels go to KERNELS_MESH.txt")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    devices = jax.devices()
    config = load_config(arguments.config)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **json.loads(arguments.model)), mesh=MeshConfig(data=1)
    )
    axes = [axis for axis in arguments.axes.split(",") if axis]
    meshes = {"one device": {}} | {f"{axis} {len(devices)}": {axis: len(devices)} for axis in axes} if axes else {}
    result: dict[str, Any] = {"environment": timing.environment(), "config": arguments.config, "steps": {}}
    result["model"] = json.loads(arguments.model)
    result["exchanges"] = [time_exchange(config, *shape, rounds=9) for shape in EXCHANGES]
    _write(result, arguments.output)
    for name, sizes in meshes.items():
        used = devices if sizes else devices[:1]
        one = dataclasses.replace(
            config, mesh=MeshConfig(**dict.fromkeys(AXES, 1) | sizes),
            train=dataclasses.replace(
                config.train, batch_size=arguments.sequences_per_device * len(used), accumulation_steps=1
            ),
        )  # fmt: skip
        kernels = arguments.kernels and Path(f"{arguments.kernels}_{name.replace(' ', '')}.txt")
        result["steps"][name] = time_step(one, used, arguments.rounds, arguments.steps, kernels)
        print(table(result).splitlines()[len(result["steps"])], flush=True)
        _write(result, arguments.output)
    print("\n" + _text(result))


def _text(result: dict[str, Any]) -> str:
    return f"{result['environment']}\n{result['config']} {json.dumps(result['model'])}\n\n{table(result)}"


def _write(result: dict[str, Any], directory: Path) -> None:
    """What there is so far: a mesh that does not fit into memory then costs its own row alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "mesh.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "mesh.txt").write_text(_text(result) + "\n")


if __name__ == "__main__":
    main()
