"""Tile choice of the sequence kernels, in one place: head_dim in, block sizes out.

The numbers are from one day of trials on an H200 (November 2026, JAX 0.11.2, bf16, causal, B=1, K=8);
benchmarks/attention.py times what is chosen here; every kernel takes `tiles=` to override it. What else was tried at
H=64, T=16384, G=8, in ms:
    forward 3x128x4 (warpgroups x block x stages) 4.5 | 2x128x4 5.4 | 3x64x6 5.3 (in turns, as the next ones);
            T=4096, B=8, G=2 0.64 | 0.74 | 0.75;
            T=2048, B=4, G=1 0.105 | 0.109 | 0.107; T=197, B=512, N=3, no mask 0.105 | 0.101 | 0.119
    dq      3x64x4 5.1 | 2x64x5 6.6 | 2x128x3 7.3 | 3x64x3 5.9 | 3x64x6 6.5
    dkv     2x64x4 with K in registers 7.7 | with K and V 8.1 | with neither 8.8 | 3x64x4 (spills) 13.9 | 2x64x3 9.1
dq and dkv of T=197, B=512, N=3: 2x64x4 0.133 (3x64x4 0.155), with 8 images 0.097; 2x64x4k 0.171, with 8 images 0.129.
At H=128, T=4096, B=4, N=16, K=4: forward 2x128x2 0.48 (2x64x3 0.56), dq 2x64x3 0.58 (2x64x2 0.98, 1x64x3 0.88), dkv
2x64x3 1.13 (2x64x2 1.40, 1x64x3 1.75). At H=256 nothing was timed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.block_masks import MaskSpec
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib
from pallas_kernels.operands import Call

HEAD_DIMS = (64, 128, 256)
WIDEST = HEAD_DIMS[-1]
# Columns of dkey and dvalue whose accumulators the registers of a warpgroup hold: wider ones are made in parts.
GRADIENT_COLUMNS = 128
# What one CTA may ask for on sm_90, less barriers, alignment and the reduction scratch.
SHARED_BYTES = 227 * 1024 - 8 * 1024
# What of the L2 (50 to 60 MB) a working set may fill before the dkv grid is walked head by head.
L2_BYTES = 32 * 2**20
# (consumer, producer) registers by number of consumer warpgroups: 384 or 512 threads share 64 Ki registers.
REGISTERS = {1: (240, 40), 2: (240, 24), 3: (160, 32)}


def _check_blocks(name: str, warpgroups: int, block: int, stages: int) -> None:
    if warpgroups not in REGISTERS:
        raise ValueError(f"{name}: warpgroups={warpgroups}: expected one of {tuple(REGISTERS)}")
    if block not in (64, 128, 192, 256):
        raise ValueError(f"{name}: block={block}: expected 64, 128, 192 or 256")
    if stages < 2:
        raise ValueError(f"{name}: stages={stages}: expected at least 2")


@dataclasses.dataclass(frozen=True)
class SequenceShape:
    """The geometry of one call's sequence part, from static shapes alone.

    Attributes:
        batch, query_tokens, key_tokens, num_heads, num_kv_heads, head_dim: B, T, U, N, K, H.
        dtype: of the inputs.
        mask: what of the mask is compiled in.
    """

    batch: int
    query_tokens: int
    key_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    mask: MaskSpec

    @classmethod
    def of(cls, call: Call) -> SequenceShape:
        """Of a call's sequence part."""
        batch, query_tokens, num_heads, head_dim = call.query.shape
        sizes = batch, query_tokens, call.key.shape[1], num_heads, call.key.shape[2], head_dim
        return cls(*sizes, call.query.dtype, MaskSpec.of(call.mask))

    @property
    def takes_boxes(self) -> bool:
        """Whether the kernels copy the arrays as they are, and not rounded up to 8 tokens."""
        return wg_lib.takes_boxes(self.dtype, self.head_dim, self.query_tokens, self.key_tokens)

    @property
    def group(self) -> int:
        """G, query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    def check_images(self, name: str, images: int) -> None:
        """Raises ValueError if a CTA cannot take several rows of the batch of such a call."""
        if images > 1 and (self.mask.explicit or self.mask.limit):
            raise ValueError(f"{name}: images={images}: expected 1 with segments, positions or key lengths")

    def kernel_name(self, name: str, tiles: ForwardTiles | BackwardTiles) -> str:
        """The name with shapes and tiles (warpgroups x block x stages): what errors and profiles of a GPU show."""
        numbers = "x".join(str(int(x)) for x in dataclasses.astuple(tiles))
        heads = f"N{self.num_heads}_K{self.num_kv_heads}_H{self.head_dim}"
        return f"{name}_T{self.query_tokens}_U{self.key_tokens}_{heads}_tiles_{numbers}"


def check_shared(name: str, variant: ForwardVariant | BackwardVariant, scratch: dict[str, Any]) -> None:
    """Raises ValueError if a kernel's scratch does not fit into shared memory."""
    needed = wg_lib.shared_bytes(scratch)
    if needed > SHARED_BYTES:
        raise ValueError(
            f"{name}: {variant.tiles} at head_dim={variant.shape.head_dim} needs {needed} bytes of shared memory: "
            f"{SHARED_BYTES=}"
        )


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Blocks of the sequence forward.

    Attributes:
        warpgroups: consumer warpgroups of a CTA; each owns 64 query rows.
        key_block: keys of a ring stage.
        stages: depth of the K and V rings.
        paired: two CTAs are to share a multiprocessor: registers stay as the compiler took them, at most 128 a thread,
            and are not moved from producer to consumers.
    """

    warpgroups: int
    key_block: int
    stages: int
    paired: bool = False

    def __post_init__(self) -> None:
        _check_blocks("ForwardTiles", self.warpgroups, self.key_block, self.stages)

    @property
    def query_block(self) -> int:
        """Query rows of a CTA."""
        return 64 * self.warpgroups


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Blocks of one of the two sequence backward kernels.

    Attributes:
        warpgroups: consumer warpgroups of a CTA; each owns 64 rows (queries for dq, keys for dk and dv).
        block: rows of the other side per ring stage.
        stages: depth of the ring.
        key_in_registers: dkv only: K is a register operand of `wgmma` (32 registers a thread at H=64).
        images: rows of the batch that a CTA takes one after the other, the next one's loads under way while it computes
            the last one's: for sequences of a few blocks, without segments, positions or key lengths.
    """

    warpgroups: int
    block: int
    stages: int
    key_in_registers: bool = False
    images: int = 1

    def __post_init__(self) -> None:
        _check_blocks("BackwardTiles", self.warpgroups, self.block, self.stages)

    @property
    def owned_block(self) -> int:
        """Rows that a CTA owns."""
        return 64 * self.warpgroups


@dataclasses.dataclass(frozen=True)
class SequenceTiles:
    """Tiles of the three sequence kernels."""

    forward: ForwardTiles
    dq: BackwardTiles
    dkv: BackwardTiles


@dataclasses.dataclass(frozen=True)
class ForwardVariant:
    """What is compiled into the forward kernel of a call.

    Attributes:
        shape, tiles, scale: geometry, and the factor of the logits, above zero.
        merge: another part of the same softmax is merged in.
        with_rest: what rounding takes from out is kept.
        interpret: the kernel is interpreted.
        programs: CTAs, which take turns at the query blocks.
        query_buffers: 2 if the queries of the next turn are loaded while this one ends.
    """

    shape: SequenceShape
    tiles: ForwardTiles
    scale: float
    merge: bool
    with_rest: bool
    interpret: bool
    programs: int
    query_buffers: int = 2

    @property
    def boxed(self) -> bool:
        """Whether TMA copies boxes of any number of rows; the interpreter knows no two views of one memory."""
        return self.shape.takes_boxes and not self.interpret


@dataclasses.dataclass(frozen=True)
class BackwardVariant:
    """What is compiled into one of the two backward kernels of a call: as in `ForwardVariant`.

    Attributes:
        columns: dkv only: those of dkey and dvalue that it makes; None: all of them.
    """

    shape: SequenceShape
    tiles: BackwardTiles
    scale: float
    interpret: bool
    columns: range | None = None

    @property
    def boxed(self) -> bool:
        """As in `ForwardVariant`."""
        return self.shape.takes_boxes and not self.interpret


def _third_is_idle(query_tokens: int) -> bool:
    """Whether blocks of 192 queries have a fifth more rows than blocks of 128: for T = 197 384, not 256."""
    return -(-query_tokens // 192) * 192 > 1.2 * -(-query_tokens // 128) * 128


def _images_of(shape: SequenceShape, query_block: int) -> int:
    """Rows of the batch for a CTA of a backward kernel: several where a row has one or two blocks, as many as leave two
    CTAs for every multiprocessor."""
    if max(shape.query_tokens, shape.key_tokens) > 256 or shape.mask.explicit or shape.mask.limit:
        return 1
    blocks = shape.num_heads * -(-shape.query_tokens // query_block)
    fits = (images for images in (8, 4, 2) if -(-shape.batch // images) * blocks >= 2 * wg_lib.multiprocessors())
    return next(fits, 1)


def backward_tiles(shape: SequenceShape, *, interpret: bool) -> SequenceTiles:
    """`choose_tiles` for a call's backward, with the rows of the batch that a CTA takes."""
    chosen = choose_tiles(shape.head_dim, query_tokens=shape.query_tokens, interpret=interpret)
    dq, dkv = (
        dataclasses.replace(tiles, images=_images_of(shape, 64 * tiles.warpgroups)) for tiles in (chosen.dq, chosen.dkv)
    )
    return dataclasses.replace(chosen, dq=dq, dkv=dkv)


def choose_tiles(
    head_dim: int,
    *,
    query_tokens: int | None = None,
    cache_only: bool = False,
    explicit_masks: bool = False,
    interpret: bool = False,
) -> SequenceTiles:
    """Tiles for a padded head_dim of 64, 128 or 256.

    Args:
        head_dim: of the call.
        query_tokens: of the call; None: many.
        cache_only: of a forward: few queries over a long cache and nothing else, as in decoding. It then waits for
            memory, not for the tensor cores, and has one consumer warpgroup.
        explicit_masks: of a forward: segments or positions. Without them `cache_only` takes 127 registers a thread at
            H=64, so that a second CTA reads while the first begins or ends: 2.75 of 2.95 TB/s on an H100, against 2.5
            with one CTA of 1x128x6. At H=128 this was not timed.
        interpret: for the interpreter, which runs every warp in Python.

    Raises:
        NotImplementedError: another head_dim.
    """
    if interpret and head_dim in HEAD_DIMS:  # three consumers starve each other of two cores until it hangs
        few = head_dim == WIDEST or (query_tokens is not None and query_tokens <= 64)
        forward = ForwardTiles(1 if few else 2, 64, 2)
        backward = BackwardTiles(1 if head_dim == WIDEST else 2, 64, 2)
        return SequenceTiles(forward, backward, backward)
    if head_dim == 64:
        few = ForwardTiles(1, 128, 6) if explicit_masks else ForwardTiles(1, 64, 6, paired=True)
        warpgroups = 2 if query_tokens is not None and _third_is_idle(query_tokens) else 3
        forward = few if cache_only else ForwardTiles(warpgroups, 128, 4)
        return SequenceTiles(forward, BackwardTiles(warpgroups, 64, 4), BackwardTiles(2, 64, 4, True))
    if head_dim == 128:
        forward = ForwardTiles(1, 64, 5) if cache_only else ForwardTiles(2, 128, 2)
        return SequenceTiles(forward, BackwardTiles(2, 64, 3), BackwardTiles(2, 64, 3))
    if head_dim == WIDEST:  # a second consumer warpgroup would not leave room for two stages and the other part
        return SequenceTiles(ForwardTiles(1, 64, 2), BackwardTiles(1, 64, 2), BackwardTiles(1, 64, 2))
    raise NotImplementedError(f"head_dim={head_dim}: the sequence kernels run {HEAD_DIMS} (others are padded to these)")
