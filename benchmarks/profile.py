"""Where a compiled program's time goes on a GPU: kernel times of a profiler trace, summed by what they compute.

A kernel's category comes from the HLO instruction that launched it: the trace names the instruction, the compiled
program's text says from which `jax.named_scope` it comes. Command buffers (CUDA graphs) hide that name: profile with
`--xla_gpu_enable_command_buffer=` (empty) in XLA_FLAGS.
"""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
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


def kernel_seconds(run: Callable[[], Any]) -> dict[tuple[str, str], tuple[float, int]]:
    """(kernel name, HLO instruction) -> (seconds, launches) on the first GPU during `run`, which is waited for.

    Raises:
        RuntimeError: the trace holds no GPU kernels.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
    totals: dict[tuple[str, str], tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                key = event.name, str(dict(event.stats).get("hlo_op", ""))
                seconds, count = totals[key]
                totals[key] = seconds + event.duration_ns * 1e-9, count + 1
    if not totals:
        raise RuntimeError("the profile holds no GPU kernels")
    return dict(totals)


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
