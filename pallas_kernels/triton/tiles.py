"""Tile choice of all Triton kernels, in one place: shape and compute capability in, block sizes, warps and stages out.

What fits is decided by two numbers of a compute capability: the shared memory that one thread block may have, and that
a thread has at most 255 registers. Every choice in the tables is compiled for the capabilities of `SHARED_BYTES` in the
tests, which bound its shared memory and its spills; `python -m benchmarks.autotune_triton` times the alternatives on
the card at hand.
"""

from __future__ import annotations

import dataclasses

KIB = 1024
# What one thread block may have, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_BYTES = {
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (12, 0): 99 * KIB,
    (12, 1): 99 * KIB,
}
FEW_TOKENS = 64  # below, a tile's rows are the query heads of a KV head, too


@dataclasses.dataclass(frozen=True)
class SequenceTiles:
    """Blocks of a sequence kernel.

    Attributes:
        rows: rows of a tile of queries, (token, query head) pairs; a power of two, at least 16.
        heads: query heads of a token in a tile; a tile has rows // heads tokens.
        keys: keys of a block; a power of two, at least 16.
        warps, stages: of a program, and of its software pipeline.
    """

    rows: int
    heads: int
    keys: int
    warps: int
    stages: int

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.rows // self.heads


@dataclasses.dataclass(frozen=True)
class DepthTiles:
    """Blocks of a depth kernel.

    Attributes:
        rows: query heads of a tile, padded; a power of two, at least 16.
        slots: slots of a chunk; a power of two, at least 16.
        warps, stages: of a program, and of its software pipeline.
    """

    rows: int
    slots: int
    warps: int
    stages: int


# kernel -> columns (head_dim, padded to a power of two) -> (rows, keys, warps, stages), for thread blocks of at least
# 160 KiB and for smaller ones.
_SEQUENCE = {
    "forward": {
        64: ((128, 64, 4, 3), (128, 64, 4, 2)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 1)),
    },
    "dq": {
        64: ((128, 64, 8, 3), (64, 64, 4, 2)),
        128: ((128, 32, 8, 2), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (32, 16, 4, 1)),
    },
    "dkv": {
        64: ((64, 64, 4, 3), (32, 64, 4, 2)),
        128: ((64, 128, 8, 2), (32, 64, 8, 2)),
        256: ((32, 32, 8, 2), (16, 32, 4, 1)),
    },
}
# kernel -> columns -> (slots, warps for 16 rows, stages)
_DEPTH = {
    "forward": {64: (64, 1, 2), 128: (32, 1, 2), 256: (32, 2, 2)},
    "backward": {64: (32, 1, 2), 128: (16, 1, 2), 256: (16, 2, 1)},
}
_LARGEST_DEPTH_ROWS = {"forward": 64, "backward": 32}


def columns(head_dim: int) -> int:
    """head_dim, padded: the columns of a tile."""
    return max(16, _power_of_two(head_dim))


def shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory of a thread block; of a capability that is not in the table, the smallest of its generation."""
    if capability in SHARED_BYTES:
        return SHARED_BYTES[capability]
    return min((size for known, size in SHARED_BYTES.items() if known[0] == capability[0]), default=99 * KIB)


def sequence_tiles(
    kernel: str, head_dim: int, query_tokens: int, group: int, capability: tuple[int, int]
) -> SequenceTiles:
    """Tiles of a sequence kernel.

    Args:
        kernel: "forward", "dq" or "dkv".
        head_dim, query_tokens: H and T of the call.
        group: G, query heads of a KV head.
        capability: compute capability, (major, minor).
    """
    large, small = _SEQUENCE[kernel][max(64, columns(head_dim))]
    rows, keys, warps, stages = large if shared_bytes(capability) >= 160 * KIB else small
    if kernel == "forward" and capability[0] == 10:
        warps = 8  # its accumulators pass from tensor memory through registers: with 4 warps they spill
    if query_tokens >= FEW_TOKENS:
        return SequenceTiles(rows, 1, keys, warps, stages)
    rows = min(rows, 64, max(16, _power_of_two(query_tokens * group)))
    if kernel == "forward" and columns(head_dim) <= 128:
        warps = min(warps, 4)
    return SequenceTiles(rows, min(group, rows), keys, warps, stages)


def depth_tiles(kernel: str, head_dim: int, slots: int, group: int) -> DepthTiles:
    """Tiles of a depth kernel: "forward" or "backward". They fit into the shared memory of every capability."""
    chunk, warps, stages = _DEPTH[kernel][max(64, columns(head_dim))]
    rows = min(_LARGEST_DEPTH_ROWS[kernel], max(16, _power_of_two(group)))
    return DepthTiles(rows, min(chunk, max(16, _power_of_two(slots))), warps * rows // 16, stages)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()
