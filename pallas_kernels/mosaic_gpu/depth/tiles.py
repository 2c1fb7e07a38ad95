"""Tile choices of the depth kernels, their geometry and their scratch: the one place where shapes become blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.warpgroup import shared_bytes

WARPS = 4  # of a warpgroup; each owns one tile of a group
THREADS = 128
MAX_SHARED_BYTES = 227 * 1024  # of one multiprocessor, for all its blocks
BLOCK_OVERHEAD_BYTES = 2048  # reserved by CUDA, barriers, alignment
MAX_TILE_HEADS = 16  # query heads of a tile: two n = 8 blocks of an mma
WIDE_HEAD_DIM = 128  # beyond it a tile has one such block: two would not leave room for a chunk's gradients
COLUMNS = 64  # columns of a swizzled shared-memory row: 128 bytes
SWIZZLE = plgpu.SwizzleTransform(128)
NARROW_SWIZZLE = plgpu.SwizzleTransform(64)  # of rows of 64 entries of 8 bits
FRESH, SMALL_BUFFERS, FLOAT_BUFFERS = "fresh", "16-bit buffers", "float32 buffers"  # how gradients come


@dataclasses.dataclass(frozen=True)
class DepthTiles:
    """How a depth kernel cuts its work.

    Attributes:
        rows: slots of a chunk, a multiple of 16 and at most 256.
        stages: chunks of a block that are in flight at once.
        blocks: thread blocks of a multiprocessor, all resident (the grid is persistent).
    """

    rows: int
    stages: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class DepthShape:
    """The geometry of one call, from static shapes alone. Rows of q are (token, query head) pairs in memory order."""

    tokens: int  # B * T
    slots: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tile_heads: int  # query heads of a tile
    narrow: bool = False  # entries of K and V have 8 bits

    @property
    def tiles_per_kv_head(self) -> int:
        """Tiles that read the same K and V."""
        return self.num_heads // self.num_kv_heads // self.tile_heads

    @property
    def tiles(self) -> int:
        """Tiles of the call."""
        return self.tokens * self.num_kv_heads * self.tiles_per_kv_head

    @property
    def groups(self) -> int:
        """Four tiles, one for each warp of a warpgroup."""
        return -(-self.tiles // WARPS)

    @property
    def head_blocks(self) -> int:
        """Blocks of 8 heads of a tile."""
        return -(-self.tile_heads // 8)

    @property
    def column_blocks(self) -> int:
        """Swizzled blocks of 64 columns."""
        return -(-self.head_dim // COLUMNS)

    @property
    def steps(self) -> int:
        """16-column steps of a head."""
        return -(-self.head_dim // 16)

    @property
    def query_rows(self) -> int:
        """Rows of q in shared memory: what the last warp's 8-row blocks reach, in whole swizzle periods."""
        reach = (WARPS - 1) * self.tile_heads + 8 * self.head_blocks
        return -(-reach // 8) * 8

    @property
    def statistics(self) -> int:
        """float32 of lse, and of delta, that a group loads: whole 128 bytes that reach the last warp's head blocks."""
        return 4 * 8 * self.head_blocks

    def kernel_name(self, name: str, tiles: DepthTiles) -> str:
        """The name with shapes (T is B * T) and tiles: it is what errors and profiles of a GPU show."""
        numbers = "x".join(str(x) for x in dataclasses.astuple(tiles))
        heads = f"N{self.num_heads}_K{self.num_kv_heads}_H{self.head_dim}" + ("_float8" if self.narrow else "")
        return f"{name}_T{self.tokens}_S{self.slots}_{heads}_tiles_{numbers}"

    def ring_shape(self, tiles: DepthTiles, parts: int) -> tuple[int, ...]:
        """Shared memory of the ring: [stages, operands, tiles of a group, column blocks, rows, 64]."""
        return (tiles.stages, parts, WARPS, self.column_blocks, tiles.rows, COLUMNS)


def most_heads(head_dim: int) -> int:
    """Query heads that a tile may have."""
    return MAX_TILE_HEADS if head_dim <= WIDE_HEAD_DIM else MAX_TILE_HEADS // 2


def tile_heads(group_size: int, most: int = MAX_TILE_HEADS) -> int:
    """Query heads of a tile: the largest divisor of G that one warp's fragments hold."""
    return max(d for d in range(1, min(group_size, most) + 1) if group_size % d == 0)


def padded_group(group_size: int, most: int = MAX_TILE_HEADS) -> int:
    """G with as many heads added as make it divide into tiles of 8 to `most` heads; G itself up to `most`."""
    if group_size <= most or tile_heads(group_size, most) >= 8:
        return group_size
    return -(-group_size // most) * most


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in rows of 128 bytes, swizzled as TMA and the matrix loads have it."""
    return plgpu.SMEM(shape, dtype, transforms=(SWIZZLE,))


def ring_swizzle(shape: DepthShape) -> Any:
    """Of the ring: a row of 64 entries is one period."""
    return NARROW_SWIZZLE if shape.narrow else SWIZZLE


def _ring(shape: DepthShape, tiles: DepthTiles, parts: int, dtype: Any) -> Any:
    """Shared memory of the ring, whose entries are of 8 bits or of the queries' dtype."""
    dtype = jnp.float8_e4m3fn if shape.narrow else dtype
    return plgpu.SMEM(shape.ring_shape(tiles, parts), dtype, transforms=(ring_swizzle(shape),))


def forward_scratch(shape: DepthShape, tiles: DepthTiles, dtype: Any) -> dict[str, Any]:
    """Scratch types of one block of the forward kernel. Rows of entries of 8 bits are no place to stage `out` in."""
    columns = shape.column_blocks
    return {
        "ring": _ring(shape, tiles, 2, dtype),
        "queries": swizzled((tiles.stages, columns, shape.query_rows, COLUMNS), dtype),
        **({"staging": swizzled((WARPS, columns, 8 * shape.head_blocks, COLUMNS), dtype)} if shape.narrow else {}),
        "loaded": plgpu.Barrier(num_arrivals=(1 + 2 * WARPS) * columns, num_barriers=tiles.stages),
    }


def backward_scratch(
    shape: DepthShape, tiles: DepthTiles, dtype: Any, gradients: str, deferred: bool = False
) -> dict[str, Any]:
    """Scratch types of one block of the backward kernel; `gradients`: FRESH, SMALL_BUFFERS or FLOAT_BUFFERS."""
    columns, parts = shape.column_blocks, ring_parts(gradients, deferred)
    by_threads = deferred or gradients == FLOAT_BUFFERS
    copies = 2 + (2 + parts * WARPS) * columns
    scratch = {
        "ring": _ring(shape, tiles, 2 if shape.narrow else parts, dtype),
        **({"gradients": swizzled(_gradient_rows(shape, tiles, by_threads), dtype)} if shape.narrow else {}),
        "queries": swizzled((tiles.stages, 2, columns, shape.query_rows, COLUMNS), dtype),
        "statistics": plgpu.SMEM((tiles.stages, 2, shape.statistics), jnp.float32),
        **({} if deferred else {"staging": swizzled((WARPS, columns, 8 * shape.head_blocks, COLUMNS), dtype)}),
        "loaded": plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
    }
    if gradients == FRESH:
        scratch["blank"] = swizzled((tiles.rows, COLUMNS), dtype)
    return scratch


def _gradient_rows(shape: DepthShape, tiles: DepthTiles, by_threads: bool) -> tuple[int, ...]:
    """Where the gradients of entries of 8 bits are made: a ring beside the entries', into which old ones are loaded; or
    16 rows of each warp, from where threads add them."""
    return (1, 2, WARPS, shape.column_blocks, 16, COLUMNS) if by_threads else shape.ring_shape(tiles, 2)


def ring_parts(gradients: str, deferred: bool = False) -> int:
    """Operands of a chunk in the backward's ring: K and V, and old gradients that are loaded beside them; not where
    most slots' are `deferred`."""
    return 4 if gradients == SMALL_BUFFERS and not deferred else 2


def gradient_kind(buffer_dtype: Any | None) -> str:
    """How gradients come, by the dtype of the buffers that they are added to; None: there are none."""
    if buffer_dtype is None:
        return FRESH
    return FLOAT_BUFFERS if jnp.dtype(buffer_dtype) == jnp.float32 else SMALL_BUFFERS


def check_shared_memory(name: str, shape: DepthShape, tiles: DepthTiles, scratch: dict[str, Any]) -> None:
    """Raises ValueError, with shape and tiles, if one block of a kernel does not fit into shared memory."""
    needed = _block_bytes(scratch)
    if needed > MAX_SHARED_BYTES:
        raise ValueError(f"{name}: {tiles} for {shape} needs {needed} bytes of shared memory: {MAX_SHARED_BYTES=}")


def forward_tiles(shape: DepthShape, windowed: bool = False) -> DepthTiles:
    """Tiles of the forward: enough bytes in flight (about 40 KB a multiprocessor) with as many warps as fit.

    A window that has a start is mostly a short one, and wants more blocks with less each. H200, T = 32768, G = 2,
    K = 8, H = 64, ms of a window of 8 slots, of all 36, of all 70: (16, 2, 4) 0.26 0.63 1.13, (32, 2, 3) 0.31 0.62
    1.14, (16, 2, 6) 0.34 0.77 1.34.
    """
    choices = ((32, 3, 4), (32, 3, 3), (32, 3, 2), (32, 2, 2), (32, 1, 3), (32, 1, 2), (16, 1, 2))
    for rows, blocks, stages in ((16, 4, 2), *choices) if windowed else choices:
        tiles = DepthTiles(16 if shape.slots <= 16 else rows, stages, blocks)
        if _fits(tiles, forward_scratch(shape, tiles, jnp.bfloat16)):
            return tiles
    raise NotImplementedError(f"no tiles of the depth forward fit into shared memory for {shape}")


def backward_tiles(shape: DepthShape, gradients: str, deferred: bool = False) -> DepthTiles:
    """Tiles of the backward: a stage is loaded, overwritten by its gradients and stored, beside others that are loaded.

    Measured on an H200. Fresh (T = 16384, K = 8, H = 64, S = 64): 1.23 ms with (32, 2, 2), 1.21 to 1.44 with others.
    Accumulating in bfloat16, ms summed over 15 numbers of seen slots from 2 to 70 (T = 32768, G = 2, K = 8): H = 64:
    (16, 2, 2) 30.9, (16, 1, 4) 31.2, (32, 1, 2) 33.3, (32, 3, 1) 39.3; at G = 8 up to 64 slots 17.0, 17.8, -, 18.0;
    H = 128 (T = 16384): (16, 1, 4) 32.5, of whose blocks two fit at once (what is taken, (16, 1, 2), was not timed),
    (16, 2, 2) 37.8, (32, 1, 4) 46.6. What counts are the blocks: eight warps of a multiprocessor wait less than four.
    Two neighbouring KV heads in one TMA box (`box_heads`, since deleted) gained nothing over one: 31.1 after 32.0 (with
    one outlier of 1.2) at (16, 2, 4), 30.9 after 31.2 at (16, 1, 4).
    Deferred, it mostly reads, as the forward does, and has its three blocks: (32, 2, 3) 17.0, (32, 2, 6) 17.5,
    (16, 3, 6) 17.8, (16, 2, 4) 21.6.
    """
    choices = ((32, 2, 2), (32, 3, 1), (16, 3, 2), (32, 2, 1), (16, 3, 1), (16, 2, 1), (16, 1, 1))
    if deferred:
        choices = ((32, 2, 3), *choices)
    elif gradients == SMALL_BUFFERS:
        choices = ((16, 2, 2), (16, 1, 2), *choices)
    for rows, stages, blocks in choices:
        tiles = DepthTiles(16 if shape.slots <= 16 else rows, stages, blocks)
        if _fits(tiles, backward_scratch(shape, tiles, jnp.bfloat16, gradients, deferred)):
            return tiles
    raise NotImplementedError(f"no tiles of the depth backward fit into shared memory for {shape}")


def _fits(tiles: DepthTiles, scratch: dict[str, Any]) -> bool:
    return tiles.blocks * _block_bytes(scratch) <= MAX_SHARED_BYTES


def _block_bytes(scratch: dict[str, Any]) -> int:
    """Shared memory of one block."""
    return shared_bytes(scratch) + BLOCK_OVERHEAD_BYTES
