"""The warp-level arithmetic of the depth kernels as it runs on the chip, in the emulator of `support.warp_emulator`."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from support.warp_emulator import Emulator, Memory

from pallas_kernels.mosaic_gpu.depth import warp_mma
from pallas_kernels.mosaic_gpu.depth.tiles import COLUMNS, MAX_SHARED_BYTES, WARPS, DepthShape, DepthTiles

forward = importlib.import_module("pallas_kernels.mosaic_gpu.depth.forward")
chunk_module = importlib.import_module("pallas_kernels.mosaic_gpu.depth.chunk")
tile_module = importlib.import_module("pallas_kernels.mosaic_gpu.depth.backward_tile")

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOLERANCE = {"bfloat16": 1.2e-2, "float16": 2e-3}  # relative L2 error against float64 on the rounded inputs
SCALE = 0.3


class Chip:
    """One group's shared memory, filled as TMA fills it."""

    def __init__(self, monkeypatch, shape, tiles, parts):
        self.shape, self.tiles, self.memory = shape, tiles, Memory(MAX_SHARED_BYTES)
        Emulator(self.memory).install(monkeypatch, warp_mma, [forward, tile_module, chunk_module])
        self.dims = shape.ring_shape(tiles, parts)
        self.ring = self.memory.share((1 if shape.narrow else 2) * int(np.prod(self.dims)))

    def swizzled(self, ref, start, rows):
        """Indices into shared memory, as 16-bit numbers, of [rows, 64] from byte `start` of a reference."""
        line = np.arange(rows)[:, None] + (ref.address + start) // 128
        chunk = (np.arange(COLUMNS) // 8) ^ (line % 8)
        return line * COLUMNS + chunk * 8 + np.arange(COLUMNS) % 8

    def cells(self, stage, part, warp):
        """Indices of a tile, [rows, columns], as numbers of the entries' size."""
        blocks = []
        for c in range(self.shape.column_blocks):
            start = int(np.ravel_multi_index((stage, part, warp, c, 0, 0), self.dims))
            if self.shape.narrow:
                blocks.append(self.narrowly_swizzled(start, self.tiles.rows))
            else:
                blocks.append(self.swizzled(self.ring, 2 * start, self.tiles.rows))
        return np.concatenate(blocks, axis=1)

    def narrowly_swizzled(self, start, rows):
        """Indices of bytes, of rows of 64 of them: the 16-byte chunk's number changes with every second row."""
        row = np.arange(rows)[:, None] + (self.ring.address + start) // 64
        chunk = (np.arange(COLUMNS) // 16) ^ (row // 2 % 4)
        return row * COLUMNS + chunk * 16 + np.arange(COLUMNS) % 16

    def put(self, cells, values):
        padded = np.zeros(cells.shape, values.dtype)
        padded[:, : values.shape[1]] = values
        unsigned = np.uint8 if values.dtype.itemsize == 1 else np.uint16
        self.memory.shared.view(unsigned)[cells] = padded.view(unsigned)

    def get(self, cells, dtype):
        return self.memory.shared.view(np.uint16)[cells].view(dtype)[:, : self.shape.head_dim]

    def put_heads(self, ref, index, rows):
        """q or dout rows of a group as [column_blocks, query_rows, 64]."""
        size = self.shape.query_rows * 128
        for c in range(self.shape.column_blocks):
            cells = self.swizzled(ref, (index * self.shape.column_blocks + c) * size, self.shape.query_rows)
            self.put(cells[: len(rows)], rows[:, c * COLUMNS : (c + 1) * COLUMNS])


def make(dtype, shape, seed):
    rng = np.random.default_rng(seed)
    real = lambda *dims: rng.standard_normal(dims).astype(np.float32)  # noqa: E731
    tiles, g, h, s = WARPS, shape.tile_heads, shape.head_dim, shape.slots
    low = lambda x: x.astype(DTYPES[dtype])  # noqa: E731
    heads = [low(real(tiles, g, h)) for _ in range(2)]
    depth = [low(real(tiles, s, h)) for _ in range(2)]
    if shape.narrow:  # a column of small numbers, which are subnormal in 8 bits
        depth = [(x * np.where(np.arange(h) % 16 == 5, 2.0**-7, 1)).astype(ml_dtypes.float8_e4m3fn) for x in depth]
    logits = np.einsum("wgh,wsh->wgs", heads[0].astype(np.float64), depth[0].astype(np.float64)) * SCALE
    # As after a merge with other keys: no P is above 1. A random lse would let P and dS overflow float16.
    lse = np.logaddexp(real(tiles, g) + 3, np.logaddexp.reduce(logits, axis=-1)).astype(np.float32)
    return heads, depth, lse, real(tiles, g)


def check(name, got, want, tolerance):
    error = np.linalg.norm(got.astype(np.float64) - want) / max(np.linalg.norm(want), 1e-30)
    assert error < tolerance, f"{name}: relative error {error:.2e}, worst at {np.abs(got - want).argmax()}"


def chunks_of(start, length, rows):
    """(chunk, slot of row 0, first row that is a seen slot)."""
    count = -(-(length - start) // rows)
    return [(c, length - (count - c) * rows, max((count - c) * rows - length + start, 0)) for c in range(count)]


def hidden(start, *arrays):
    """Tiles [4, S, H] with NaN in the slots before `start`."""
    return [np.where(np.arange(x.shape[1])[:, None] < start, np.asarray(np.nan, x.dtype), x) for x in arrays]


CASES = [
    # dtype, G of a tile, H, filled slots (or start and length of the window), rows, gradients
    ("bfloat16", 1, 64, 16, 16, "fresh"),
    ("bfloat16", 8, 64, 37, 32, "fresh"),
    ("float16", 2, 128, 50, 32, "16-bit buffers"),
    ("float16", 16, 64, 33, 32, "16-bit buffers"),
    ("bfloat16", 3, 80, 20, 32, "float32 buffers"),
    ("float16", 12, 32, 7, 16, "float32 buffers"),
    ("bfloat16", 8, 128, 48, 32, "float32 buffers"),
    ("bfloat16", 8, 256, 20, 16, "16-bit buffers"),
    ("float16", 2, 136, 37, 16, "fresh"),
    # The first chunk has one row that is a slot (half a box), or all but one.
    ("float16", 16, 80, 39, 32, "fresh"),
    ("float16", 2, 128, 129, 32, "16-bit buffers"),
    ("float16", 8, 128, 63, 32, "fresh"),
    # A window that does not begin at slot 0: what was loaded of the slots before it is NaN.
    ("bfloat16", 3, 64, (3, 37), 32, "fresh"),
    ("float16", 8, 128, (20, 50), 32, "16-bit buffers"),
    ("bfloat16", 2, 80, (9, 20), 16, "float32 buffers"),
]
# Entries of 8 bits.
NARROW = [
    ("bfloat16", 2, 64, 37, 32, "16-bit buffers"),
    ("float16", 16, 64, (3, 37), 32, "16-bit buffers"),
    ("bfloat16", 12, 128, 50, 32, "float32 buffers"),
    ("bfloat16", 8, 64, 7, 16, "fresh"),
]
DEFERRED = [
    # ..., the first slot that gets a gradient
    ("bfloat16", 2, 64, 37, 32, "16-bit buffers", 31),
    ("float16", 8, 80, 50, 32, "16-bit buffers", 21),
    ("bfloat16", 8, 128, (3, 20), 16, "16-bit buffers", 0),
    ("bfloat16", 3, 80, (2, 37), 32, "float32 buffers", 30),
    ("float16", 2, 64, 33, 32, "float32 buffers", 33),
]
NARROW_DEFERRED = [
    ("bfloat16", 2, 64, 37, 32, "16-bit buffers", 31),
    ("float16", 8, 128, (3, 50), 32, "16-bit buffers", 21),
    ("bfloat16", 3, 64, 37, 32, "float32 buffers", 30),
]


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "length", "rows", "narrow"),
    [*((*case[:5], False) for case in CASES), *((*case[:5], True) for case in NARROW)],
)
def test_forward(monkeypatch, dtype, heads, head_dim, length, rows, narrow):
    begin, length = length if isinstance(length, tuple) else (0, length)
    shape = DepthShape(1, length, WARPS * heads, WARPS, head_dim, heads, narrow)
    tiles = DepthTiles(rows, 2, 1)
    chip = Chip(monkeypatch, shape, tiles, 2)
    (query, _), (key, value), _, _ = make(dtype, shape, 0)
    loaded = hidden(begin, key, value)
    key, value = key[:, begin:], value[:, begin:]
    queries = chip.memory.share(2 * 2 * shape.column_blocks * shape.query_rows * COLUMNS)
    staging = chip.memory.share(WARPS * shape.column_blocks * 8 * shape.head_blocks * 128) if narrow else chip.ring
    out = np.full((WARPS * heads, head_dim), np.nan, DTYPES[dtype])
    lse = np.full(WARPS * heads, np.nan, np.float32)
    compute = forward.ForwardWarpTile(shape, tiles, SCALE, dtype, windowed=begin > 0)
    state = compute.start()
    for chunk, slot, first in chunks_of(begin, length, rows):
        stage = chunk % 2
        chip.put_heads(queries, stage, query.reshape(-1, head_dim))
        start = rows // 2 if first >= rows // 2 and rows == 32 else 0  # `load_chunk` leaves the first half alone
        for part, x in enumerate(loaded):
            for w in range(WARPS):
                padded = np.concatenate([np.zeros((rows, head_dim), x.dtype), x[w]])
                chip.put(chip.cells(stage, part, w)[start:], padded[slot + rows + start : slot + 2 * rows])
        state = compute.step(chip.ring, queries, stage, first, state)
    rest = np.full_like(out, np.nan)
    compute.finish(state, staging, stage, 0, *(chip.memory.place(x) for x in (out, lse, rest)))
    logits = np.einsum("wgh,wsh->wgs", query.astype(np.float64), key.astype(np.float64)) * SCALE
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("wgs,wsh->wgh", p / p.sum(-1, keepdims=True), value.astype(np.float64))
    check("out", out, want.reshape(out.shape), TOLERANCE[dtype])
    whole = out.astype(np.float32) + rest.astype(np.float32)
    np.testing.assert_allclose(whole, out.astype(np.float32), rtol=0.51 * float(ml_dtypes.finfo(out.dtype).eps))
    assert rest.any()
    check("lse", lse, (np.log(p.sum(-1)) + logits.max(-1)).reshape(-1), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "length", "rows", "gradients", "deferred", "queries", "narrow"),
    [
        *((*case, None, True, False) for case in CASES), *((*case, True, False) for case in DEFERRED),
        (*CASES[3], None, False, False), *((*case, None, True, True) for case in NARROW),
        *((*case, True, True) for case in NARROW_DEFERRED), (*NARROW[0], None, False, True),
    ],
)  # fmt: skip
def test_backward(monkeypatch, dtype, heads, head_dim, length, rows, gradients, deferred, queries, narrow):
    begin, length = length if isinstance(length, tuple) else (0, length)
    shape = DepthShape(1, length, WARPS * heads, WARPS, head_dim, heads, narrow)
    tiles = DepthTiles(rows, 1, 1)
    by_threads = gradients == "float32 buffers" or deferred is not None
    loads_old = gradients == "16-bit buffers" and deferred is None
    parts = 4 if loads_old and not narrow else 2  # of the ring
    given = begin if deferred is None else max(begin, deferred)  # the first slot that gets a gradient
    chip = Chip(monkeypatch, shape, tiles, parts)
    (query, dout), (key, value), lse, delta = make(dtype, shape, 1)
    operands = hidden(begin, key, value)
    key, value = key[:, begin:], value[:, begin:]
    rows_of_heads = chip.memory.share(2 * 2 * shape.column_blocks * shape.query_rows * COLUMNS)
    statistics = chip.memory.share(2 * shape.statistics * 4)
    made = chip.ring  # where gradients are made
    if narrow:
        made = chip.memory.share(2 * 2 * WARPS * shape.column_blocks * (16 if by_threads else rows) * COLUMNS)

    def made_cells(operand, warp):
        if not narrow:
            return chip.cells(0, operand + parts - 2, warp)
        blocks = range(shape.column_blocks)
        starts = [128 * rows * ((operand * WARPS + warp) * shape.column_blocks + c) for c in blocks]
        return np.concatenate([chip.swizzled(made, start, rows) for start in starts], axis=1)

    staging = chip.memory.share(WARPS * shape.column_blocks * 8 * shape.head_blocks * 128)
    for i, x in enumerate((lse, delta)):
        start = (statistics.address + 4 * i * shape.statistics) // 4
        chip.memory.shared.view(np.float32)[start : start + x.size] = x.reshape(-1)
    for i, x in enumerate((query, dout)):
        chip.put_heads(rows_of_heads, i, x.reshape(-1, head_dim))
    rng = np.random.default_rng(2)
    buffer_dtype = np.float32 if gradients == "float32 buffers" else DTYPES[dtype]
    old = [rng.standard_normal((1, length, WARPS, head_dim)).astype(buffer_dtype) for _ in range(2)]
    new = [x.copy() if gradients != "fresh" else np.full_like(x, np.nan) for x in old]
    targets = tuple(chip.memory.place(x) for x in new)
    compute = tile_module.BackwardWarpTile(
        tile_module.DepthVariant(
            shape, tiles, SCALE, dtype, gradients, begin > 0, adds=True, deferred=deferred is not None, queries=queries
        )
    )
    added = rng.standard_normal((WARPS * heads, head_dim)).astype(DTYPES[dtype])
    dq = np.full(added.shape, np.nan, DTYPES[dtype])
    state = compute.start()
    for _, slot, first in chunks_of(begin, length, rows):
        start = rows // 2 if first >= rows // 2 and rows == 32 else 0
        loaded = operands + ([x[0].swapaxes(0, 1) for x in old] if loads_old else [])
        for part, x in enumerate(loaded):
            for w in range(WARPS):
                cells = chip.cells(0, part, w) if part < 2 else made_cells(part - 2, w)
                padded = np.concatenate([np.zeros((rows, head_dim), x.dtype), x[w]])
                chip.put(cells[start:], padded[slot + rows + start : slot + 2 * rows])
        place = (0, first, slot, 0, min(max(given - slot, first), rows))
        state = compute.step(chip.ring, made, rows_of_heads, statistics, place, targets if by_threads else (), state)
        if not by_threads and first > 0:
            compute.store(made, place, targets)
        elif not by_threads:  # by TMA
            for i in range(2):
                for w in range(WARPS):
                    new[i][0, slot : slot + rows, w] = chip.get(made_cells(i, w), DTYPES[dtype])
    ring_or_staging = staging if deferred is None else made
    compute.finish(state, ring_or_staging, 0, 0, chip.memory.place(dq), chip.memory.place(added))

    q, do, k, v = (x.astype(np.float64) for x in (query, dout, key, value))
    p = np.exp(np.einsum("wgh,wsh->wsg", q, k) * SCALE - lse[:, None])
    ds = p * (np.einsum("wgh,wsh->wsg", do, v) - delta[:, None])
    want_dq = np.einsum("wsg,wsh->wgh", ds, k).reshape(dq.shape) * SCALE * queries + added.astype(np.float64)
    want = [np.einsum("wsg,wgh->swh", ds, q)[None] * SCALE, np.einsum("wsg,wgh->swh", p, do)[None]]
    check("dquery", dq, want_dq, TOLERANCE[dtype])
    for name, got, expected, before in zip(("ddepth_key", "ddepth_value"), new, want, old, strict=True):
        total = expected if gradients == "fresh" else expected + before[:, begin:].astype(np.float64)
        check(name, got[:, given:], total[:, given - begin :], TOLERANCE[dtype])
        untouched = np.full_like(before, np.nan) if gradients == "fresh" else before
        np.testing.assert_array_equal(*(x[:, :given].astype(np.float32) for x in (got, untouched)))
