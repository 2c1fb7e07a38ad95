"""Times whole train steps of the paper's 700M models (Table 3) on one GPU, and says where the time goes.

    python -m benchmarks.training [--cases=ROW:BATCH:REMAT,...] [--steps=5] [--output=DIRECTORY]
    python -m benchmarks.training --data=DIRECTORY --tokenizer=tokenizer.json [--cases=...]   rows of a real corpus
    python -m benchmarks.training --peer[=PYTHON] [--cases=...]    beside OLMo 2 in PyTorch, in the same call

A case is a row of Table 3 (row1: OLMo 2; row3: MoDA; row4: + FFN KV), sequences of 4096 tokens per step, and the layer
loop's `remat`. Each runs in a process of its own: a peak of memory belongs to one case, and one that does not fit ends
nothing but itself. Synthetic rows are random tokens of one document, the most that attention can be asked to do.

MFU counts 6 N + 6 L D T FLOPs a token (N parameters, causal attention once; for MoDA also its depth part:
`moda_jax.model.accounting.train_flops_per_token`) against the GPU's dense bf16 peak. "extra" is the peak memory above
row1's of the same batch and remat, less what the additional parameters take (parameter, gradient and two moments,
float32); "depth" beside it is what the depth stream and its gradient take by themselves.

With `--peer` row1 also runs in PyTorch, as transformers has it, under torch.compile (`benchmarks.peer`), once for every
batch size of the cases and on the same kind of rows; "/ peer" is tokens/s over its. PYTHON is an interpreter with
torch and transformers, by default this one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import processes

if TYPE_CHECKING:
    from moda_jax.config import Config

RESULTS = Path(__file__).parent / "results"
CASES = (
    "row1:8:none", "row1:8:ffn", "row1:8:attention", "row3:8:none", "row3:8:ffn", "row4:8:none", "row4:8:ffn",
    "row4:8:attention", "row1:16:ffn", "row4:16:attention",
)  # fmt: skip
SEQUENCE_LENGTH = 4096
SYNTHETIC_SEED = 0
PEER = processes.Peer("benchmarks.peer", "torch and transformers")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a row of Table 3, sequences per step, what the layer loop stores."""

    row: str
    batch_size: int
    remat: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """From ROW:BATCH:REMAT."""
        row, batch_size, remat = text.split(":")
        return cls(row, int(batch_size), remat)

    def __str__(self) -> str:
        return f"{self.row}:{self.batch_size}:{self.remat}"


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one case in this process."""
    import jax

    from benchmarks import profile, timing
    from configs.moda_700m import get_config
    from moda_jax.config import Config
    from moda_jax.model.accounting import param_count, train_flops_per_token
    from moda_jax.training.peak_flops import peak_flops
    from moda_jax.training.program import Program

    values = get_config(case.row).to_dict()
    values["model"] |= {"remat": case.remat, "dtype": "bfloat16"} | json.loads(arguments.model)
    values["train"] |= {"batch_size": case.batch_size, "accumulation_steps": 1, "num_steps": 10000}
    values["data"] |= {"sequence_length": arguments.sequence_length}
    if arguments.data:
        values["data"] |= {"source": arguments.data, "tokenizer": arguments.tokenizer}
    config = Config.from_dict(values)
    program = Program(config, devices=jax.devices()[:1])
    state = program.initialize()
    batches = _batches(config, bool(arguments.data))
    batch = next(batches)
    began = time.perf_counter()
    compiled = program.train_step.lower(state, batch, program.plan).compile()
    compile_seconds = time.perf_counter() - began
    for _ in range(3):
        state, metrics = compiled(state, next(batches), program.plan)
    jax.block_until_ready(state)
    times = []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        for _ in range(arguments.steps):
            state, metrics = compiled(state, next(batches), program.plan)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / arguments.steps)
    tokens = case.batch_size * config.data.sequence_length
    seconds = statistics.median(times)
    device = jax.devices()[0]
    flops, peak = (
        train_flops_per_token(config.model, config.data.sequence_length),
        peak_flops(device.device_kind, "bfloat16"),
    )
    memory = device.memory_stats() or {}
    result = {
        "case": str(case),
        "tokens_per_second": tokens / seconds,
        "seconds_per_step": times,
        "mfu": tokens / seconds * flops / peak if peak else None,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "parameters": param_count(config.model),
        "depth_bytes": _depth_bytes(config),
        "compile_seconds": compile_seconds,
        "loss": float(metrics.loss),
        "environment": timing.environment(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if device.platform == "gpu" and arguments.profile:
        holder = [state]

        def one_step() -> Any:
            holder[0], metrics = compiled(holder[0], batch, program.plan)
            return metrics

        traced = profile.launches(one_step)
        kernels = profile.kernel_seconds(traced)
        text = compiled.as_text()
        result["seconds_by_category"] = profile.seconds_by_category(kernels, text)
        if arguments.kernels:
            Path(arguments.kernels).write_text(profile.kernel_table(kernels, text) + profile.idle_table(traced))
            Path(arguments.kernels).with_suffix(".hlo").write_text(text)
    return result


def peer_request(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks.peer` is asked for: row1's model, and as many tokens and steps as the case has."""
    from configs.moda_700m import get_config
    from moda_jax.config import Config

    values = get_config("row1").to_dict()
    values["model"] |= json.loads(arguments.model)
    model = Config.from_dict(values).model
    return {
        "model": {
            "vocab_size": model.vocab_size, "hidden_size": model.width, "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
            "max_position_embeddings": arguments.sequence_length, "rms_norm_eps": model.norm_epsilon,
            "rope_theta": model.rope_theta, "tie_word_embeddings": model.tie_embeddings,
        },
        "batch_size": case.batch_size, "sequence_length": arguments.sequence_length, "steps": arguments.steps,
        "rounds": arguments.rounds, "seed": SYNTHETIC_SEED,
    }  # fmt: skip


def run_peer(python: str, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The peer's result for a case's batch size, in the form of ours, or {"case", "error"}."""
    result = PEER.run(python, f"peer:{case.batch_size}", peer_request(case, arguments))
    if "error" in result:
        return result
    speed = case.batch_size * arguments.sequence_length / statistics.median(result["seconds_per_step"])
    return result | {"tokens_per_second": speed, "mfu": None, "depth_bytes": 0}


def _batches(config: Any, real: bool) -> Any:
    """Endless batches: of the corpus through the training pipeline, or random tokens of one document per row."""
    import jax
    import jax.numpy as jnp

    from moda_jax.data.pipeline import open_dataset, train_batches
    from moda_jax.data.tokenizer import load_tokenizer

    if real:
        dataset = open_dataset(config.data, "train", load_tokenizer(config.data))
        yield from train_batches(
            dataset, config.data, batch_size=config.train.batch_size, seed=0, position=0, process_index=0,
            process_count=1,
        )  # fmt: skip
        return
    batch = jax.tree.map(jnp.asarray, synthetic_batch(config))
    while True:
        yield batch


def synthetic_batch(config: Config) -> Any:
    """Random tokens, one document per row: a `Batch` of NumPy arrays."""
    import numpy as np

    from moda_jax.data.packing import Batch

    shape = config.train.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(SYNTHETIC_SEED).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1))
    tokens = tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros(shape, np.int32), positions, np.ones(shape, np.float32))


def _depth_bytes(config: Config) -> int:
    """Of the depth stream's keys and values, and of their gradient in the 16-bit compute dtype."""
    model = config.model
    entries = config.train.batch_size * config.data.sequence_length * model.depth_slots
    entry_bytes = 2 if model.moda.entry_dtype is None else 1
    return 2 * entries * model.num_kv_heads * model.head_dim * (entry_bytes + 2)


def extra_bytes(result: dict[str, Any], row1: dict[str, Any]) -> int:
    """Peak memory of a case above row1's, without what its additional parameters take: 16 bytes each."""
    return result["peak_bytes"] - row1["peak_bytes"] - 16 * (result["parameters"] - row1["parameters"])


def table(results: list[dict[str, Any]]) -> str:
    """What a person reads."""
    peers = {r["case"].split(":")[1]: r for r in results if r["case"].startswith("peer:")}
    lines = [
        f"{'case':20} {'tokens/s':>9} {'ms/step':>8} {'MFU':>6} {'peak GiB':>9} {'extra':>6} {'depth':>6} "
        f"{'compile s':>9} {'/ row1':>7}" + (f" {'/ peer':>7}" if peers else "")
    ]
    base = {r["case"]: r for r in results if r["case"].startswith("row1") and "error" not in r}
    for r in results:
        if "error" in r:
            lines.append(f"{r['case']:20} {r['error']}")
            continue
        row1 = None if r["case"].startswith("peer:") else base.get("row1:" + r["case"].split(":", 1)[1])
        ratio = f"{r['tokens_per_second'] / row1['tokens_per_second']:.3f}" if row1 else "-"
        mfu = f"{100 * r['mfu']:.1f}%" if r["mfu"] else "-"
        peak = f"{r['peak_bytes'] / 2**30:.1f}" if r["peak_bytes"] else "-"
        extra = f"{extra_bytes(r, row1) / 2**30:.1f}" if row1 and r["peak_bytes"] else "-"
        peer = peers.get(r["case"].split(":")[1], {}).get("tokens_per_second")
        to_peer = f" {r['tokens_per_second'] / peer if peer else float('nan'):7.3f}" if peers else ""
        lines.append(
            f"{r['case']:20} {r['tokens_per_second']:9.0f} {1e3 * statistics.median(r['seconds_per_step']):8.1f} "
            f"{mfu:>6} {peak:>9} {extra:>6} {r['depth_bytes'] / 2**30:6.1f} {r['compile_seconds']:9.1f} {ratio:>7}"
            + to_peer
        )
    profiled = [r for r in results if "seconds_by_category" in r]
    if profiled:
        names = list(dict.fromkeys(name for r in profiled for name in r["seconds_by_category"]))
        lines += ["", f"{'ms of one step':28}" + "".join(f"{r['case']:>18}" for r in profiled)]
        for name in names:
            lines.append(
                f"{name:28}" + "".join(f"{1e3 * r['seconds_by_category'].get(name, 0.0):18.1f}" for r in profiled)
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars of where a step's time goes, tokens/s on top."""
    from moda_jax.pictures import labelled, look, picture

    profiled = [r for r in results if "seconds_by_category" in r]
    names = list(dict.fromkeys(name for r in profiled for name in r["seconds_by_category"]))
    with picture(path, 5 + 1.2 * len(profiled), 5.4) as figure:
        axes = figure.subplots()
        bottoms = [0.0] * len(profiled)
        for number, name in enumerate(names):
            heights = [1e3 * r["seconds_by_category"].get(name, 0.0) for r in profiled]
            axes.bar(range(len(profiled)), heights, bottom=bottoms, label=name, **look(number).bar)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        for i, r in enumerate(profiled):
            speed = f"{r['tokens_per_second'] / 1e3:.1f}k tokens/s\n{100 * r['mfu']:.1f} % MFU"
            axes.text(i, bottoms[i], speed, ha="center", va="bottom")
        axes.set_xticks(range(len(profiled)), [_case_text(r["case"]) for r in profiled])
        axes.grid(axis="x", visible=False)
        environment = profiled[0]["environment"]
        axes.set(
            ylim=(0, 1.15 * max(bottoms)), ylabel="ms of GPU time in one step",
            title=f"Where a train step of the 700M models goes, rows of {SEQUENCE_LENGTH} tokens\n"
            f"{environment['device']}, {environment['date']}",
        )  # fmt: skip
        figure.legend(handles=labelled(axes)[::-1], loc="outside right center")  # in the order of the stacks


def _case_text(case: str) -> str:
    """ "row4:8:none" for people."""
    row, batch, remat = case.split(":")
    return f"{row}\nbatch of {batch}\nremat {remat}"


def main() -> None:
    """Runs the cases; writes training.json, training.txt and training.png."""
    parser = argparse.ArgumentParser(description="Times train steps of the 700M models.")
    parser.add_argument("--cases", default=",".join(CASES), help="ROW:BATCH:REMAT, comma-separated")
    parser.add_argument("--steps", type=int, default=5, help="steps of a timed round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequence-length", type=int, default=SEQUENCE_LENGTH)
    parser.add_argument("--model", default="{}", help="JSON of model fields to change, for trials")
    parser.add_argument("--data", default=None, help="data.source of a real corpus; by default random tokens")
    parser.add_argument("--tokenizer", default="bytes", help="with --data: data.tokenizer")
    parser.add_argument("--deterministic", action="store_true", help="as train.deterministic")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--kernels", default=None, help="write the slowest kernels to this file, the HLO beside it")
    parser.add_argument("--peer", nargs="?", const=sys.executable, metavar="PYTHON",
                        help="also time OLMo 2 in PyTorch, with this interpreter")  # fmt: skip
    parser.add_argument("--name", default="training", help="name of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cases = [Case.parse(text) for text in arguments.cases.split(",")]
    if processes.is_child():
        from moda_jax.config import DataConfig
        from moda_jax.data.cache import cache_directory
        from moda_jax.training import runtime

        if arguments.profile:  # a kernel in a command buffer does not say which instruction launched it
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
        runtime.prepare(cache_directory(DataConfig()), deterministic=arguments.deterministic)
        print(json.dumps(run_case(cases[0], arguments)))
        return
    if arguments.peer:
        try:
            print(f"peer: {PEER.check(arguments.peer)}", flush=True)
        except ValueError as error:
            parser.error(str(error))
    argv = [argument for argument in sys.argv[1:] if not argument.startswith(("--cases", "--peer"))]
    results, batch_sizes = [], set()
    for case in cases:
        if arguments.peer and case.batch_size not in batch_sizes:
            batch_sizes.add(case.batch_size)
            results.append(run_peer(arguments.peer, case, arguments))
            print(table(results[-1:]).splitlines()[1], flush=True)
        results.append(processes.run_case("benchmarks.training", str(case), [*argv, f"--cases={case}"]))
        print(table(results[-1:]).splitlines()[1], flush=True)
    text = table(results)
    environment = next((r["environment"] for r in results if "environment" in r), {})
    print(f"\n{environment}\n{text}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{arguments.name}.json"
    path.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    path.with_suffix(".txt").write_text(f"{environment}\n{text}\n")
    if any("seconds_by_category" in r for r in results):
        plot(results, path.with_suffix(".png"))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
