"""Times the op against cuDNN and against the memory that depth KV must move.

    python -m benchmarks.attention [--grid=paper|heads|model|vision|ablation|smoke] [--implementation=NAME]
                                   [--output=DIRECTORY]

Columns: our op forward, and forward + backward with all five gradients; cuDNN's flash attention on the sequence part
alone (what plain attention costs); `goal`, that plus the time in which the depth bytes can move at the bandwidth of a
measured copy. Forward reads depth K and V once; backward reads them again and writes two gradients of their size.

Grids: `paper` is Table 2 (B=1, K=8, H=64, causal); `heads` has what it lacks: KV of its own for every head (G=1, as
models of 16 heads have it, T=2048) and heads of 128; `model` the 700M model's own layer (B=8, T=4096, N=16, K=8,
H=64) at several fillings of its 70 slots, also as packed rows are masked; `vision` the layers of DeiT-Ti (3 heads) and
DeiT-S (6), not causal, over the 197 tokens of an image, with none and all of their 22 slots; `ablation` is what our
kernels can show of Table 7: the dense op, the blockwise one in XLA (each token's slots contiguous, only its own
visited), and the kernels (the heads of a group share what they read); `smoke` is tiny, for a CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from pallas_kernels import moda_attention

RESULTS = Path(__file__).parent / "results"
CAPABILITY = "MODA_TRITON_CAPABILITY"  # see pallas_kernels/triton/call.py, which needs Triton to be imported


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: T tokens, G query heads per KV head, S slots of which `length` are filled."""

    tokens: int
    group: int
    slots: int
    length: int | None = None  # None: all
    batch: int = 1
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    document: int | None = None  # tokens of a document in a packed row; None: no segment ids
    implementation: str | None = None  # None: the command's

    @property
    def filled(self) -> int:
        """Slots that are read."""
        return self.slots if self.length is None else self.length

    @property
    def depth_bytes(self) -> tuple[int, int]:
        """Bytes of depth KV that must move: (forward, forward + backward), 2 bytes an element."""
        one = 2 * self.batch * self.tokens * self.filled * self.kv_heads * self.head_dim * 2  # K and V
        return one, 3 * one

    def __str__(self) -> str:
        text = f"B{self.batch} T{self.tokens} G{self.group} S{self.filled}/{self.slots}"
        text += f" H{self.head_dim}" if self.head_dim == 128 else ""
        text += "" if self.causal else f" K{self.kv_heads} not causal"
        text += f" documents of {self.document}" if self.document else ""
        return text + (f" {self.implementation}" if self.implementation else "")


GRIDS = {
    "paper": (
        *(Case(tokens, 8, 64) for tokens in (1024, 4096, 8192, 16384, 32768, 65536)),
        *(Case(16384, group, 64) for group in (2, 4, 16, 32)),
        *(Case(16384, 8, slots) for slots in (128, 256)),
        *(Case(tokens, group, 0) for tokens, group in ((4096, 8), (16384, 2), (16384, 8), (65536, 8))),
    ),
    "heads": (
        *(Case(2048, 1, slots, batch=batch, kv_heads=16) for batch in (1, 4) for slots in (46, 0)),
        *(Case(16384, group, slots, head_dim=128) for group in (8, 2) for slots in (64, 0)),
    ),
    "model": (
        *(Case(4096, 2, 70, length, batch=8) for length in (0, 1, 18, 35, 70)),
        *(Case(4096, 2, 0, batch=8, document=tokens) for tokens in (4096, 1000)),
    ),
    "vision": tuple(
        Case(197, 1, slots, batch=batch, kv_heads=heads, causal=False)
        for heads in (3, 6)
        for batch in (128, 256, 512)
        for slots in (0, 22)
    ),
    "ablation": tuple(Case(1024, 8, 64, implementation=name) for name in ("reference", "xla", "mosaic_gpu")),
    "smoke": (
        Case(64, 2, 3, kv_heads=2, head_dim=32),
        Case(64, 2, 0, kv_heads=2, head_dim=32),
        Case(61, 1, 2, batch=2, kv_heads=2, head_dim=32, causal=False),
    ),
}


def prepare(case: Case, implementation: str | None, dtype: Any) -> tuple[dict[str, Callable], Callable]:
    """(contestants, draw): ours and cuDNN's forward, and forward + backward; `draw(key)` makes a set of inputs."""
    heads, slots = case.kv_heads * case.group, max(case.slots, 1)
    implementation = case.implementation or implementation
    segment_ids = None
    if case.document:  # borders at another place in every row
        places = jnp.arange(case.tokens) + jnp.arange(case.batch)[:, None] * (case.document // (case.batch + 1))
        segment_ids = (places // case.document).astype(jnp.int32) if case.document < case.tokens else 0 * places

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = iter(jax.random.split(key, 6))
        sequence = [(case.batch, case.tokens, n, case.head_dim) for n in (heads, case.kv_heads, case.kv_heads, heads)]
        depth = [(case.batch, case.tokens, slots, case.kv_heads, case.head_dim)] * 2
        return tuple(jax.random.normal(next(keys), shape, dtype) for shape in (*sequence, *depth))

    def ours(query, key, value, dout, depth_key, depth_value):
        depth = (depth_key, depth_value) if case.slots else (None, None)
        # A traced length, as in the model's layer loop: one kernel serves all layers.
        length = jnp.int32(case.filled) if case.slots else None
        return moda_attention(
            query, key, value, *depth, depth_length=length, causal=case.causal, segment_ids=segment_ids,
            implementation=implementation,
        )  # fmt: skip

    def cudnn(query, key, value, dout, depth_key, depth_value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=case.causal, implementation="cudnn")

    def with_backward(forward):
        def run(query, key, value, dout, depth_key, depth_value):
            out, pullback = jax.vjp(lambda *x: forward(*x[:3], dout, *x[3:]), query, key, value, depth_key, depth_value)
            gradients = pullback(dout)
            return out, gradients if forward is ours and case.slots else gradients[:3]

        return run

    contestants = {
        "ours forward": ours,
        "ours forward+backward": with_backward(ours),
        "cudnn forward": cudnn,
        "cudnn forward+backward": with_backward(cudnn),
    }
    return contestants, jax.jit(draw)


def run(grid: str, implementation: str | None, rounds: int) -> dict[str, Any]:
    """All rows of a grid, printed as they come."""
    on_gpu = jax.default_backend() == "gpu"
    bandwidth = timing.copy_bytes_per_second(2**31 if on_gpu else 2**24)
    print(f"{timing.environment()}\ncopy bandwidth {bandwidth / 1e12:.2f} TB/s; times in ms; ratios to cuDNN\n")
    print(f"{'case':36} {'fwd':>9} {'cudnn':>9} {'ratio':>6} {'fwd+bwd':>9} {'cudnn':>9} {'ratio':>6} {'goal':>6}")
    rows = []
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiling = []
        for case in GRIDS[grid]:
            contestants, draw = prepare(case, implementation, dtype)
            shapes = jax.eval_shape(draw, jax.random.key(0))
            compiling.append((case, timing.compile_ahead(contestants, shapes, pool), draw))
    for case, contestants, draw in compiling:
        seconds = timing.median_seconds(contestants, timing.input_sets(draw), rounds=rounds)
        row = dataclasses.asdict(case) | {"seconds": seconds}
        line = f"{case!s:36}"
        for i, part in enumerate(("forward", "forward+backward")):
            mine, theirs = seconds[f"ours {part}"], seconds[f"cudnn {part}"]
            line += "".join(f" {'-' if isinstance(x, str) else f'{x * 1e3:.3f}':>9}" for x in (mine, theirs))
            if isinstance(mine, str) or isinstance(theirs, str):
                line += f" {'-':>6}"
                continue
            row[f"ratio {part}"] = mine / theirs
            row[f"goal {part}"] = 1 + case.depth_bytes[i] / bandwidth / theirs
            line += f" {row[f'ratio {part}']:>6.2f}"
        line += f" {row['goal forward+backward']:>6.2f}" if "goal forward+backward" in row else f" {'-':>6}"
        print(line, flush=True)
        for name, value in seconds.items():
            if isinstance(value, str):
                print(f"    {name}: {value}")
        rows.append(row)
    return {"environment": _environment(), "grid": grid, "copy_bytes_per_second": bandwidth, "rows": rows}


def _environment() -> dict[str, str]:
    """Also for which compute capability the Triton kernels were compiled, if it is not the card's."""
    given = os.environ.get(CAPABILITY)
    return timing.environment() | ({} if given is None else {CAPABILITY: given})


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of forward + backward as a ratio to cuDNN, with the goal as a line over each."""
    from moda_jax.pictures import COLORS, labelled, legend_below, look, picture

    rows = [row for row in result["rows"] if "ratio forward+backward" in row]
    labels = [
        ("" if row.get("causal", True) else f"B={row['batch']}\nK={row['kv_heads']}\n")
        + f"T={row['tokens']}\nG={row['group']}\nS={row['slots'] if row['length'] is None else row['length']}"
        + (f"\n{row['implementation']}" if row["implementation"] else "")
        + (f"\ndocuments\nof {row['document']}" if row["document"] else "")
        for row in rows
    ]
    facts = [result["environment"][key] for key in ("device", "date")]
    if CAPABILITY in result["environment"]:
        facts.append(f"kernels compiled for capability {result['environment'][CAPABILITY]}")
    with picture(path, max(7, 1.5 + 0.75 * len(rows)), 5) as figure:
        axes = figure.subplots()
        ratios = [row["ratio forward+backward"] for row in rows]
        axes.bar(range(len(rows)), ratios, label="this op, sequence and depth", **look(0).bar)
        for i, row in enumerate(rows):
            goal, label = row["goal forward+backward"], "goal: cuDNN's time and that of the depth part's bytes"
            axes.plot([i - 0.42, i + 0.42], [goal] * 2, color=COLORS[1], linewidth=2.5, label=None if i else label)
        axes.axhline(1, color=COLORS[6], linewidth=1, linestyle=":", label="cuDNN, sequence alone")
        axes.set_xticks(range(len(rows)), labels, fontsize=7)
        axes.grid(axis="x", visible=False)
        axes.set(
            ylabel="times cuDNN's time",
            title="Time of forward and backward, against cuDNN's attention over the sequence alone\n"
            + ", ".join(facts),
        )
        legend_below(figure, labelled(axes), columns=3 if len(rows) > 6 else 1)


def main() -> None:
    """Runs one grid and writes attention_GRID[_IMPLEMENTATION][_for_CAPABILITY].json and .png."""
    parser = argparse.ArgumentParser(description="Times the MoDA op against cuDNN on the sequence part alone.")
    parser.add_argument("--grid", choices=GRIDS, default="paper")
    parser.add_argument("--implementation", default=None, help="of the op; by default the best for this device")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = run(arguments.grid, arguments.implementation, arguments.rounds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    given = os.environ.get(CAPABILITY)
    parts = ("attention", arguments.grid, arguments.implementation, given and f"for_{given}")
    path = arguments.output / ("_".join(filter(None, parts)) + ".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    if any("ratio forward+backward" in row for row in result["rows"]):
        plot(result, path.with_suffix(".png"))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
