"""What a mesh costs, from the compiled program: memory of a device, bytes between devices, and a predicted step time.

    python -m benchmarks.scaling [--config=configs/moda_700m.py:row4] [--mesh=data=8,fsdp=8 ...] [--output=DIRECTORY]

Nothing is run and no GPU is needed: the real train step is compiled for as many virtual CPU devices as the mesh has, up
to 1,024, and its collectives are read from the optimised HLO. The batch grows with the devices
(`--sequences-per-device`). What is from the program: memory, kinds, axes, bytes, how often. What is a model: seconds.

    compute       6 P + attention FLOPs per token (as MFU counts them), over the GPU's peak times `--utilisation`
    links         `benchmarks/links.py`, with the bandwidths and latencies given here
    step (sum)    nothing overlaps
    step (best)   all of data's and fsdp's traffic hides behind the compute if it is shorter; tensor's and context's
                  never does, since the next operation waits for it

16-bit arrays stand as float16 here: the CPU compiler widens bfloat16, which would double their bytes. Temporaries are
those of the XLA implementation of attention, compiled for a CPU; a GPU with the kernels needs somewhat different ones.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
DEFAULT_MESHES = (
    "fsdp=8", "data=8", "fsdp=4,tensor=2", "fsdp=2,context=4",
    "data=4,fsdp=8", "data=4,fsdp=4,tensor=2", "data=4,fsdp=2,context=4",
    "data=16,fsdp=8", "data=16,fsdp=4,tensor=2", "data=16,fsdp=2,context=4",
    "data=128,fsdp=8", "data=128,fsdp=4,tensor=2", "data=128,fsdp=2,context=4", "data=16,fsdp=8,tensor=4,context=2",
)  # fmt: skip


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=8,fsdp=8" to sizes of all four axes; those not named are 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: expected AXIS=SIZE,... of {', '.join(sizes)}")
        sizes[axis] = int(size)
    return sizes


def load_config(text: str) -> Any:
    """The Config of "configs/NAME.py:ARGUMENT"."""
    from moda_jax.config import Config

    path, _, argument = text.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Config.from_dict(module.get_config(*([argument] if argument else [])).to_dict())


def compile_step(config: Any, devices: list) -> tuple[Any, float]:
    """The compiled train step on these devices, and the seconds that it took."""
    from moda_jax.training.program import Program

    began = time.monotonic()
    traced = Program(config, devices=devices).trace_train_step()
    # The program and its memory do not depend on how well LLVM optimises the loops of a CPU that never runs them.
    options = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "True"}
    return traced.lower().compile(options), time.monotonic() - began


def analyse(config: Any, mesh: dict[str, int], arguments: argparse.Namespace, devices: list) -> dict[str, Any]:
    """One row of the result."""
    from benchmarks.collectives import find_collectives
    from benchmarks.links import Links
    from moda_jax.config import MeshConfig
    from moda_jax.model.accounting import train_flops_per_token

    count = math.prod(mesh.values())
    batch = arguments.sequences_per_device * count
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, dtype="float16", attention_implementation="xla", remat=arguments.remat, layer_loop="scan"
        ),
        train=dataclasses.replace(config.train, batch_size=batch, accumulation_steps=1),
        mesh=MeshConfig(**mesh),
    )
    compiled, seconds = compile_step(config, devices[:count])
    memory = compiled.memory_analysis()
    links = Links(
        arguments.nvlink, arguments.infiniband, arguments.nvlink_latency, arguments.infiniband_latency,
        arguments.devices_per_machine,
    )  # fmt: skip
    traffic: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"bytes": 0.0, "times": 0, "seconds": 0.0})
    exposed = hidden = 0.0
    for collective in find_collectives(compiled.as_text(), mesh):
        kind = "reduce-scatter" if collective.sliced else collective.kind
        entry = traffic[f"{kind} over {'+'.join(collective.axes)}"]
        duration = collective.times * links.seconds(collective, mesh)
        entry["bytes"] += collective.times * collective.link_bytes
        entry["times"] += collective.times
        entry["seconds"] += duration
        waits = {"tensor", "context"} & set(collective.axes) and not {"data", "fsdp"} & set(collective.axes)
        exposed, hidden = exposed + duration * bool(waits), hidden + duration * (not waits)
    tokens = batch * config.data.sequence_length
    flops = tokens * train_flops_per_token(config.model, config.data.sequence_length) / count
    compute = flops / (arguments.peak_flops * arguments.utilisation)
    best, total = max(compute, hidden) + exposed, compute + hidden + exposed
    return {
        "mesh": mesh,
        "devices": count,
        "tokens_per_step": tokens,
        "state_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "sent_gib": sum(entry["bytes"] for entry in traffic.values()) / GIB,
        "collectives": dict(sorted(traffic.items())),
        "compute_seconds": compute,
        "step_seconds": {"best": best, "sum": total},
        "efficiency": {"best": compute / best, "sum": compute / total},
        "compile_seconds": round(seconds, 1),
    }


def name_of(mesh: dict[str, int]) -> str:
    """Its axes above 1."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bytes by axis, memory, and the predicted step time, a bar per mesh."""
    from moda_jax.pictures import picture

    with picture(path, 14, 2.6 + 0.4 * len(rows)) as figure:
        sent, memory, step = figure.subplots(1, 3, sharey=True)
        names = [f"{name_of(row['mesh'])}  ({row['devices']} devices)" for row in rows]
        stacked(sent, names, [traffic_by_axis(row) for row in rows])
        sent.set(xlabel="GiB", title="What a device sends per step, over")
        parts = [{"state": row["state_gib"], "temporaries": row["temporaries_gib"]} for row in rows]
        stacked(memory, names, parts)
        memory.set(xlabel="GiB", title="What a device holds")
        times = [
            {
                "compute": row["compute_seconds"],
                "links that nothing hides": row["step_seconds"]["best"] - row["compute_seconds"],
                "links that compute may hide": row["step_seconds"]["sum"] - row["step_seconds"]["best"],
            }
            for row in rows
        ]
        stacked(step, names, times)
        step.set(xlabel="seconds", title="Predicted time of a step")
        sent.invert_yaxis()
        figure.suptitle(title)


def stacked(axes: Any, names: list[str], parts: list[dict[str, float]]) -> None:
    """A horizontal bar per name, of its parts; what they are stands below."""
    from moda_jax.pictures import look

    left = [0.0] * len(names)
    for number, part in enumerate(dict.fromkeys(key for of_row in parts for key in of_row)):
        widths = [of_row.get(part, 0.0) for of_row in parts]
        axes.barh(names, widths, left=left, label=part, **look(number).bar)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.grid(axis="y", visible=False)
    columns = 1 if any(len(part) > 15 for of_row in parts for part in of_row) else 2
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.09), ncols=columns)


def title_of(config: str) -> str:
    """Of the picture."""
    return f"{config}: memory and collectives of the compiled step; seconds from a model of the links"


def traffic_by_axis(row: dict[str, Any]) -> dict[str, float]:
    """GiB by the axes that they cross."""
    found: dict[str, float] = {}
    for name, entry in row["collectives"].items():
        axes = name.split(" over ")[1]
        label = axes if axes in ("data", "fsdp", "tensor", "context") else "several axes"
        found[label] = found.get(label, 0.0) + entry["bytes"] / GIB
    return dict(sorted(found.items()))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/moda_700m.py:row4")
    parser.add_argument("--mesh", type=parse_mesh, action="append", help="AXIS=SIZE,...; may be repeated")
    parser.add_argument("--sequences-per-device", "--sequences_per_device", type=int, default=4)
    parser.add_argument(
        "--remat", default="attention", help="model.remat; the layers stay one loop, to compile quickly"
    )
    parser.add_argument("--nvlink", type=float, default=450e9, help="bytes/s of a GPU, one way (H100: 450e9)")
    parser.add_argument("--infiniband", type=float, default=50e9, help="bytes/s of a GPU's adapter (400 Gbit/s: 50e9)")
    parser.add_argument("--nvlink-latency", "--nvlink_latency", type=float, default=3e-6, help="seconds per stage")
    parser.add_argument(
        "--infiniband-latency", "--infiniband_latency", type=float, default=1e-5, help="seconds per stage"
    )
    parser.add_argument("--devices-per-machine", "--devices_per_machine", type=int, default=8)
    parser.add_argument(
        "--peak-flops", "--peak_flops", type=float, default=989e12, help="of a GPU in bfloat16 (H100: 989e12)"
    )
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that one GPU reaches")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Compiles every mesh, writes JSON and plot, prints a table."""
    arguments = parse_arguments()
    meshes = arguments.mesh or [parse_mesh(text) for text in DEFAULT_MESHES]
    largest = max(math.prod(mesh.values()) for mesh in meshes)
    # Read by JAX when it starts, which the imports above have not made it do.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={largest}"
    import jax

    config = load_config(arguments.config)
    print(f"{'mesh':42} {'state':>7} {'temps':>7} {'sent':>7}   GiB     {'step, best to sum':>20}   efficiency")
    rows = []
    for mesh in meshes:
        row = analyse(config, mesh, arguments, jax.devices())
        rows.append(row)
        best, total = row["step_seconds"]["best"], row["step_seconds"]["sum"]
        low, high = row["efficiency"]["sum"], row["efficiency"]["best"]
        print(
            f"{name_of(mesh):42} {row['state_gib']:7.2f} {row['temporaries_gib']:7.2f} {row['sent_gib']:7.2f}"
            f"           {best:7.3f} to {total:7.3f} s   {high:.0%} to {low:.0%}",
            flush=True,
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = Path(arguments.config.partition(":")[0]).stem
    given = {key: value for key, value in vars(arguments).items() if key not in ("mesh", "output")}
    record = {
        "arguments": given,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
    }
    path = arguments.output / f"scaling_{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, title_of(arguments.config), path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
