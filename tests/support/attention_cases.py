"""Cases of the attention contract: a selection in which every two values of two axes meet, and arrays for a case."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """One call of the op. `length` says how `depth_length` is passed, and how many slots are filled."""

    tokens: int
    slots: int
    group: int
    head_dim: int
    causal: bool
    segments: bool
    dtype: str
    scale: float | None
    length: str
    batch: int
    kv_heads: int

    @property
    def filled(self) -> int:
        """Slots that count."""
        part = (self.slots + 1) // 2
        return {"all": self.slots, "int": part, "traced": part, "traced beyond": self.slots}[self.length]

    def __str__(self) -> str:
        """A test id."""
        words = [f"T{self.tokens}", f"S{self.slots}", f"G{self.group}", f"H{self.head_dim}", self.dtype]
        words += ["causal"] * self.causal + ["segments"] * self.segments + [self.length.replace(" ", "_")]
        return "-".join(words)


AXES = Case(
    tokens=(1, 2, 3, 47, 63, 64, 65, 129),
    slots=(0, 1, 5, 16, 72),
    group=(1, 2, 3, 4, 8),
    head_dim=(32, 64, 128),
    causal=(True, False),
    segments=(False, True),
    dtype=("float32", "bfloat16", "float16"),
    scale=(None, 0.037, 0.71),
    length=("all", "int", "traced", "traced beyond"),
    batch=(1, 2),
    kv_heads=(1, 2),
)


# Head_dims that kernels pad, or have other tiles for: with few tokens, since these cases are also interpreted.
HEAD_DIM_CASES = (
    Case(1, 5, 1, 42, True, False, "bfloat16", None, "traced", 1, 2),
    Case(9, 3, 2, 76, True, True, "float16", None, "int", 1, 1),
    Case(66, 17, 1, 160, True, False, "bfloat16", None, "traced", 1, 1),
    Case(7, 20, 12, 256, False, False, "float16", 0.05, "traced beyond", 1, 1),
    Case(3, 0, 2, 250, True, False, "bfloat16", None, "all", 2, 1),
)


@functools.cache
def covering_cases() -> tuple[Case, ...]:
    """Cases in which every pair of values of every two axes occurs: about as many as the two longest axes' product.

    Greedy and deterministic: each new case takes the pairs that are still missing from most of a set of random draws.
    """
    draw = np.random.default_rng(0)
    missing = {(i, j, a, b) for i, j in itertools.combinations(range(len(AXES)), 2) for a in AXES[i] for b in AXES[j]}
    cases = []
    while missing:
        seed = min(missing, key=repr)  # at least this one is covered now
        candidates = []
        for _ in range(200):
            values = [axis[draw.integers(len(axis))] for axis in AXES]
            values[seed[0]], values[seed[1]] = seed[2], seed[3]
            candidates.append(tuple(values))
        covered = [{(i, j, c[i], c[j]) for i, j in itertools.combinations(range(len(c)), 2)} for c in candidates]
        best = max(range(len(candidates)), key=lambda n: len(covered[n] & missing))
        missing -= covered[best]
        cases.append(Case(*candidates[best]))
    return tuple(cases)


def cases_of_every_value(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Few of the cases, in which every value that an axis has in them occurs. Greedy and deterministic."""
    cases = tuple(cases)
    missing = {(axis, value) for case in cases for axis, value in enumerate(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & set(enumerate(case))))
        missing -= set(enumerate(best))
        chosen.append(best)
    return tuple(chosen)


def make_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray | None]:
    """The op's arrays, and dout and dlse. Unfilled slots hold NaN. Segments are runs of ids that are not in order."""
    draw = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    B, T, S, K, H = case.batch, case.tokens, case.slots, case.kv_heads, case.head_dim
    N = K * case.group

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(dtype)

    arrays = {
        "query": normal(B, T, N, H), "key": normal(B, T, K, H), "value": normal(B, T, K, H),
        "depth_key": normal(B, T, S, K, H), "depth_value": normal(B, T, S, K, H),
        "dout": normal(B, T, N, H), "dlse": draw.standard_normal((B, T, N)).astype(np.float32),
    }  # fmt: skip
    arrays["depth_key"][:, :, case.filled :] = np.nan
    arrays["depth_value"][:, :, case.filled :] = np.nan
    ids = draw.integers(-3, 4, (B, 8)).astype(np.int32)
    runs = np.sort(draw.integers(0, 8, (B, T)), axis=1)
    arrays["segment_ids"] = np.take_along_axis(ids, runs, axis=1) if case.segments else None
    return arrays
