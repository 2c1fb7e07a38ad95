"""Where a compiled program's time goes on a GPU: kernel times of a profiler trace, summed by what they compute.

A kernel's category comes from the HLO instruction that launched it: the trace names the instruction, the compiled
program's text says from which `jax.named_scope` it comes. Command buffers (CUDA graphs) hide that name: profile with
`--xla_gpu_enable_command_buffer=` (empty) in XLA_FLAGS.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

# First match wins: (category, pattern of the kernel's name, pattern of the instruction's op_name).
CATEGORIES = (
    ("attention forward", r"moda_sequence_forward", None),
    ("attention backward", r"moda_sequence_d", None),
    ("depth forward", r"moda_depth_forward", None),
    ("depth backward", r"moda_depth_backward", None),
    ("optimizer", None, r"(^|/)optimizer(/|$)"),
    ("logits and loss", None, r"(^|[/(])(loss|logits)([/)]|$)"),
    ("matmuls", r"gemm|nvjet|cutlass|xmma|cublas", None),
    ("copies", r"memcpy|memset|^copy|dynamic.update.slice|dynamic_update_slice", None),
)
OTHER = "elementwise, norms, rotary"


def op_names(hlo_text: str) -> dict[str, str]:
    """HLO instruction -> the `op_name` of its metadata, from `compiled.as_text()`."""
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", re.MULTILINE)
    return dict(pattern.findall(hlo_text))


def category(kernel: str, op_name: str) -> str:
    """The category of one kernel."""
    for name, kernel_pattern, scope_pattern in CATEGORIES:
        if kernel_pattern and re.search(kernel_pattern, kernel, re.IGNORECASE):
            return name
        if scope_pattern and re.search(scope_pattern, op_name):
            return name
    return OTHER


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel of a trace: its name, the HLO instruction that launched it, begin and end in nanoseconds."""

    kernel: str
    instruction: str
    begin: float
    end: float


def launches(run: Callable[[], Any]) -> list[Launch]:
    """The kernels of the first GPU during `run`, which is waited for, as they began.

    Raises:
        RuntimeError: the trace holds no GPU kernels.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
    found = [
        Launch(event.name, str(dict(event.stats).get("hlo_op", "")), event.start_ns, event.start_ns + event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU:0")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not found:
        raise RuntimeError("the profile holds no GPU kernels")
    return sorted(found, key=lambda launch: launch.begin)


def kernel_seconds(traced: Iterable[Launch]) -> dict[tuple[str, str], tuple[float, int]]:
    """(kernel name, HLO instruction) -> (seconds, launches)."""
    totals: dict[tuple[str, str], tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for launch in traced:
        seconds, count = totals[launch.kernel, launch.instruction]
        totals[launch.kernel, launch.instruction] = seconds + (launch.end - launch.begin) * 1e-9, count + 1
    return dict(totals)


def idle_table(traced: Iterable[Launch], lines: int = 20) -> str:
    """How long the GPU ran nothing, and before which kernels (without numbers) it did so longest."""
    waits: dict[str, list[float]] = collections.defaultdict(list)
    traced = sorted(traced, key=lambda launch: launch.begin)
    end = traced[0].begin
    for launch in traced:
        waits[re.sub(r"_\d+$", "", launch.kernel)].append(max(launch.begin - end, 0.0) * 1e-9)
        end = max(end, launch.end)
    total = sum(map(sum, waits.values()))
    text = f"{total * 1e3:9.3f} ms of {(end - traced[0].begin) * 1e-6:.3f} without a kernel, {len(traced)} launches\n"
    top = sorted(waits.items(), key=lambda item: -sum(item[1]))[:lines]
    return text + "".join(
        f"{sum(found) * 1e3:9.3f} ms {len(found):5d} x, at most {max(found) * 1e6:7.1f} us, before {kernel[:90]}\n"
        for kernel, found in top
    )


def seconds_by_category(kernels: dict[tuple[str, str], tuple[float, int]], hlo_text: str) -> dict[str, float]:
    """Seconds by category, largest first."""
    names = op_names(hlo_text)
    sums: dict[str, float] = collections.defaultdict(float)
    for (kernel, instruction), (seconds, _) in kernels.items():
        sums[category(kernel, names.get(instruction, ""))] += seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def kernel_table(kernels: dict[tuple[str, str], tuple[float, int]], hlo_text: str, lines: int = 150) -> str:
    """The slowest kernels, launches of one computation (kernel and `op_name`, without numbers) on one line."""
    names = op_names(hlo_text)
    sums: dict[tuple[str, str], list[Any]] = collections.defaultdict(lambda: [0.0, 0, ""])
    for (kernel, instruction), (seconds, launches) in kernels.items():
        computation = re.sub(r"_\d+$", "", kernel), names.get(instruction, "")
        entry = sums[computation]
        sums[computation] = [entry[0] + seconds, entry[1] + launches, instruction]
    top = sorted(sums.items(), key=lambda item: -item[1][0])[:lines]
    return "".join(
        f"{seconds * 1e3:9.3f} ms {launches:5d} x {kernel[:90]} | {instruction} | {name[-150:]}\n"
        for (kernel, name), (seconds, launches, instruction) in top
    )
