"""The sequence kernels under the CPU interpreter (values and races), and their lowering for CUDA without a GPU."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from support.selection import quick_of

from pallas_kernels.block_masks import MaskRows, MaskSpec
from pallas_kernels.mosaic_gpu.sequence.backward import sequence_backward
from pallas_kernels.mosaic_gpu.sequence.forward import sequence_forward
from pallas_kernels.mosaic_gpu.sequence.tiles import (
    BackwardTiles,
    ForwardTiles,
    SequenceShape,
    backward_tiles,
    choose_tiles,
)
from pallas_kernels.operands import Call, Mask, Upstream
from pallas_kernels.parts import Part

# The interpreter takes at most three threads (two consumers and the producer) on a two-core machine.
FORWARD, DQ, DKV = ForwardTiles(2, 64, 2), BackwardTiles(2, 64, 2), BackwardTiles(2, 64, 2)
BF16 = 8e-3  # relative L2 error of one rounding of P and of the result to bfloat16, with room


def visible_pairs(batch, query_tokens, key_tokens, causal, rows):
    """bool [B, T, U], by the contract's words."""
    visible = np.ones((batch, query_tokens, key_tokens), bool)
    query_positions = rows.get("query_positions", np.arange(query_tokens)[None])
    key_positions = rows.get("key_positions", np.arange(key_tokens)[None])
    if causal:
        visible &= key_positions[:, None, :] <= query_positions[:, :, None]
    if "query_segment_ids" in rows:
        visible &= rows["key_segment_ids"][:, None, :] == rows["query_segment_ids"][:, :, None]
    if "key_length" in rows:
        visible &= (np.arange(key_tokens)[None] < rows["key_length"][:, None])[:, None]
    return visible


def oracle(query, key, value, dout, other_out, other_lse, visible, scale):
    """float64 (out, lse, delta, dquery, dkey, dvalue) of the block `key`, merged with `other`, one head at a time."""
    query, key, value, dout = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key, value, dout))
    out, dquery = np.zeros_like(query), np.zeros_like(query)
    dkey, dvalue = np.zeros_like(key), np.zeros_like(value)
    lse = np.full(query.shape[:3], -np.inf)
    delta = np.zeros(query.shape[:3])
    group = query.shape[2] // key.shape[2]
    for b, n in itertools.product(range(query.shape[0]), range(query.shape[2])):
        q, k, v, do = query[b, :, n], key[b, :, n // group], value[b, :, n // group], dout[b, :, n]
        s = np.where(visible[b], scale * q @ k.T, -np.inf)
        rest = np.full(len(q), -np.inf) if other_lse is None else np.asarray(other_lse[b, :, n], np.float64)
        top = np.maximum(np.max(s, axis=1), rest)
        top = np.where(np.isneginf(top), 0.0, top)
        weights, rest_weight = np.exp(s - top[:, None]), np.exp(rest - top)
        total = weights.sum(1) + rest_weight
        with np.errstate(divide="ignore"):
            lse[b, :, n] = top + np.log(total)
        total = np.where(total > 0, total, 1.0)
        p = weights / total[:, None]
        out[b, :, n] = p @ v
        if other_out is not None:
            out[b, :, n] += (rest_weight / total)[:, None] * np.asarray(other_out[b, :, n].astype(jnp.float32))
        delta[b, :, n] = (do * out[b, :, n]).sum(1)
        ds = p * (do @ v.T - delta[b, :, n][:, None])
        dquery[b, :, n] = scale * ds @ k
        dkey[b, :, n // group] += scale * ds.T @ q
        dvalue[b, :, n // group] += p.T @ do
    return out, lse, delta, dquery, dkey, dvalue


def assert_close(name, got, expected, tolerance):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected), err_msg=f"{name}: where it is finite")
    got, expected = np.where(np.isfinite(got), got, 0.0), np.where(np.isfinite(expected), expected, 0.0)
    # The floor: a gradient that is exactly zero (one visible key) comes out as the rounding of float32 inputs.
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-4)
    worst = np.unravel_index(np.argmax(np.abs(got - expected)), got.shape)
    assert error < tolerance, (
        f"{name}: relative L2 error {error:.2e}, worst at {worst}: {got[worst]}, {expected[worst]}"
    )


def assert_no_races():
    races = gpu_callbacks.get_races()
    assert races is not None
    assert not races.races_found


def mask_rows(rng, names, batch, query_tokens, key_tokens):
    rows = {}
    if "segments" in names:
        rows["query_segment_ids"] = np.sort(rng.integers(0, 3, (batch, query_tokens))).astype(np.int32)
        rows["key_segment_ids"] = np.sort(rng.integers(0, 3, (batch, key_tokens))).astype(np.int32)
    if "documents" in names:  # long enough for blocks that need no mask, before and behind a border inside a block
        rows["query_segment_ids"] = (
            np.repeat(np.arange(query_tokens) >= 130, batch).reshape(-1, batch).T.astype(np.int32)
        )
        rows["key_segment_ids"] = np.repeat(np.arange(key_tokens) >= 130, batch).reshape(-1, batch).T.astype(np.int32)
    if "positions" in names:
        rows["query_positions"] = np.stack([rng.permutation(query_tokens) for _ in range(batch)]).astype(np.int32)
        rows["key_positions"] = np.stack([rng.permutation(key_tokens) for _ in range(batch)]).astype(np.int32)
    if "key_length" in names:
        rows["key_length"] = np.array([0, key_tokens // 2 + 3][:batch], np.int32)
    return rows


CASES = {
    # name: batch, T, U, N, K, H, causal, masks, merged with another block, dtype
    "causal_ragged_gqa": (1, 131, 131, 3, 1, 64, True, (), True, jnp.bfloat16),
    "full_more_keys": (1, 70, 137, 2, 2, 64, False, (), False, jnp.float16),
    "key_length": (2, 65, 130, 1, 1, 64, False, ("key_length",), False, jnp.bfloat16),
    "segments_and_positions": (1, 130, 72, 2, 1, 64, True, ("segments", "positions"), False, jnp.bfloat16),
    # Whole blocks and no diagonal: nothing but the rows says that a block has to be masked.
    "segments_one_block": (1, 64, 64, 1, 1, 64, False, ("segments",), False, jnp.float16),
    "segments_whole_blocks": (1, 128, 128, 1, 1, 64, False, ("segments",), False, jnp.bfloat16),
    "positions_whole_blocks": (1, 128, 128, 1, 1, 64, True, ("positions",), False, jnp.float16),
    "key_length_whole_blocks": (2, 64, 128, 1, 1, 64, False, ("key_length",), False, jnp.float16),
    "full_whole_blocks": (1, 64, 128, 1, 1, 64, False, (), False, jnp.bfloat16),
    "causal_segments_and_key_length": (2, 64, 128, 1, 1, 64, True, ("segments", "key_length"), False, jnp.bfloat16),
    "causal_documents": (1, 320, 320, 1, 1, 64, True, ("documents",), False, jnp.bfloat16),
    "full_documents_and_key_length": (2, 192, 300, 1, 1, 64, False, ("documents", "key_length"), False, jnp.bfloat16),
    "head_dim_128": (1, 72, 72, 1, 1, 128, True, ("segments",), True, jnp.bfloat16),
    "head_dim_256": (1, 66, 70, 1, 1, 256, False, (), True, jnp.bfloat16),
    "one_token": (1, 1, 1, 2, 1, 64, True, (), False, jnp.bfloat16),
}
QUICK_CASES = ("causal_ragged_gqa", "segments_one_block")


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """A failed kernel leaves state behind that would fail the next one."""
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


IMAGES = {  # as CASES; the rows of the batch that a CTA takes
    "all_but_one_of_a_cta": ((5, 70, 70, 1, 1, 64, False, (), False, jnp.bfloat16), 3),
    "causal_gqa": ((4, 66, 66, 2, 1, 64, True, (), False, jnp.float16), 4),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", quick_of(IMAGES, ("all_but_one_of_a_cta",)))
def test_a_cta_takes_several_rows_of_the_batch(name):
    case, images = IMAGES[name]
    check_interpreted(case, len(name), FORWARD, *(dataclasses.replace(tiles, images=images) for tiles in (DQ, DKV)))


@pytest.mark.parametrize("images", [2])
def test_several_rows_of_the_batch_have_no_documents(images):
    query = jnp.zeros((2, 8, 1, 64), jnp.bfloat16)
    call = Call(query, query, query, Mask(key_length=jnp.ones(2, jnp.int32)))
    upstream = Upstream(query, jnp.zeros((2, 8, 1)), jnp.zeros((2, 8, 1)))
    for name in ("dq", "dkv"):
        with pytest.raises(ValueError, match=f"{name}: images=2: expected 1 with segments, positions or key lengths"):
            sequence_backward(call, upstream, **{f"{name}_tiles": BackwardTiles(2, 64, 2, images=images)})


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", quick_of(CASES, QUICK_CASES))
def test_interpreted_kernels_match_the_oracle_without_races(name):
    # At H=256 two consumers do not fit into shared memory: the kernel's own choice.
    tiles = (None,) * 3 if CASES[name][5] == 256 else (FORWARD, DQ, DKV)
    check_interpreted(CASES[name], len(name), *tiles)


def check_interpreted(case, seed, forward, dq, dkv):
    batch, query_tokens, key_tokens, heads, kv_heads, head_dim, causal, masks, merged, dtype = case
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    query, dout = draw(batch, query_tokens, heads, head_dim), draw(batch, query_tokens, heads, head_dim)
    key, value = draw(batch, key_tokens, kv_heads, head_dim), draw(batch, key_tokens, kv_heads, head_dim)
    rows = mask_rows(rng, masks, batch, query_tokens, key_tokens)
    other_out = other_lse = None
    if merged:
        other_out = draw(*query.shape)
        other_lse = jnp.asarray(rng.normal(size=query.shape[:3]), jnp.float32).at[:, ::5].set(-jnp.inf)
    scale = 0.11
    call = Call(query, key, value, Mask(causal, **rows), scale=scale)
    other = Part(other_out, other_lse) if merged else None
    out, lse, _ = sequence_forward(call, other, tiles=forward, interpret=True)
    assert_no_races()
    visible = visible_pairs(batch, query_tokens, key_tokens, causal, rows)
    expected = oracle(query, key, value, dout, other_out, other_lse, visible, scale)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert_close("out", out, expected[0], BF16)
    assert_close("lse", lse, expected[1], 1e-5)
    upstream = Upstream(dout, lse, jnp.asarray(expected[2], jnp.float32))
    gradients = sequence_backward(call, upstream, dq_tiles=dq, dkv_tiles=dkv, interpret=True)
    assert_no_races()
    for label, got, wanted in zip(("dquery", "dkey", "dvalue"), gradients, expected[3:], strict=True):
        assert got.dtype == dtype
        assert_close(label, got, wanted, BF16)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scale_may_be_negative_or_zero(scale):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 40, 1, 64)), jnp.bfloat16) for _ in range(3))
    out, lse, _ = sequence_forward(Call(query, key, value, Mask(True), scale=scale), tiles=FORWARD, interpret=True)
    visible = visible_pairs(1, 40, 40, True, {})
    expected = oracle(query, key, value, query, None, None, visible, scale)
    assert_close("out", out, expected[0], BF16)
    assert_close("lse", lse, expected[1], 1e-5)


def assert_lowers_for_cuda(function, *specs):
    lowered = jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text(), "no kernel in the lowered program"


QUICK_LOWERINGS = [(128, ("segments", "positions"))]
FORWARD_TILES = [ForwardTiles(2, 128, 4), ForwardTiles(1, 64, 2)]
BACKWARD_TILES = [
    (BackwardTiles(2, 128, 3), BackwardTiles(2, 64, 4)),
    (BackwardTiles(1, 64, 2), BackwardTiles(3, 64, 4)),
]


@pytest.mark.parametrize(
    ("head_dim", "masks"),
    [
        pytest.param(head_dim, masks, marks=() if (head_dim, masks) in QUICK_LOWERINGS else pytest.mark.slow)
        for head_dim in (64, 128, 256)
        for masks in ((), ("key_length",), ("segments",), ("segments", "positions"))
    ],
)
def test_every_tile_choice_lowers_for_cuda(head_dim, masks):
    batch, tokens, heads, kv_heads = 2, 200, 4, 2
    chosen = choose_tiles(head_dim)
    rows = mask_rows(np.random.default_rng(0), masks, batch, tokens, tokens)
    mask = Mask(True, **rows)
    explicit = MaskSpec.of(mask).explicit
    query = jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((batch, tokens, kv_heads, head_dim), jnp.bfloat16)
    rowsum = jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32)
    decoding = choose_tiles(head_dim, cache_only=True, explicit_masks=explicit)
    assert decoding.forward.paired == (head_dim == 64 and not explicit)
    for tiles in [chosen.forward, decoding.forward, *(FORWARD_TILES if head_dim == 64 else [])]:
        assert_lowers_for_cuda(
            lambda q, k, v, o, s, tiles=tiles: sequence_forward(
                Call(q, k, v, mask, scale=0.125), Part(o, s), tiles=tiles, interpret=False
            ),
            query, key, key, query, rowsum,
        )  # fmt: skip
    assert_lowers_for_cuda(
        lambda q, k, v, o, s, r: sequence_forward(
            Call(q, k, v, mask, scale=0.125), Part(o, s, r), with_rest=True, interpret=False
        ),
        query, key, key, query, rowsum, query,
    )  # fmt: skip
    for dq_tiles, dkv_tiles in [(chosen.dq, chosen.dkv), *(BACKWARD_TILES if head_dim == 64 else [])]:
        assert_lowers_for_cuda(
            lambda q, k, v, *upstream, dq_tiles=dq_tiles, dkv_tiles=dkv_tiles: sequence_backward(
                Call(q, k, v, mask, scale=0.125), Upstream(*upstream),
                dq_tiles=dq_tiles, dkv_tiles=dkv_tiles, interpret=False,
            ),
            query, key, key, query, rowsum, rowsum,
        )  # fmt: skip


@pytest.mark.parametrize(("tokens", "head_dim", "pads"), [(197, 64, False), (197, 128, True), (200, 128, False)])
def test_ragged_arrays_are_copied_where_rows_are_of_other_bytes_than_a_box_s(tokens, head_dim, pads):
    """Rows of 128 bytes are not: TMA takes any number of them in one box."""
    array = jax.ShapeDtypeStruct((2, tokens, 2, head_dim), jnp.bfloat16)
    rowsum = jax.ShapeDtypeStruct((2, tokens, 2), jnp.float32)

    def run(q, k, v, o, s):
        out, lse, rest = sequence_forward(Call(q, k, v, scale=0.125), Part(o, s, o), with_rest=True, interpret=False)
        return out, lse, rest, sequence_backward(Call(q, k, v, scale=0.125), Upstream(o, s, s), interpret=False)

    text = jax.jit(run).trace(array, array, array, array, rowsum).lower(lowering_platforms=("cuda",)).as_text()
    padded = [line for line in text.splitlines() if "stablehlo.pad" in line and "bf16" in line]
    assert bool(padded) == pads


@pytest.mark.parametrize(
    ("batch", "tokens", "mask", "images"),
    [
        (512, 197, Mask(causal=False), 8), (128, 197, Mask(causal=False), 2), (64, 197, Mask(causal=False), 1),
        (512, 257, Mask(causal=False), 1), (512, 197, Mask(key_length=jnp.full(512, 190)), 1),
    ],
)  # fmt: skip
def test_a_program_takes_several_short_rows_where_enough_programs_are_left(batch, tokens, mask, images):
    query = jax.ShapeDtypeStruct((batch, tokens, 3, 64), jnp.bfloat16)
    tiles = backward_tiles(SequenceShape.of(Call(query, query, query, mask, scale=1.0)), interpret=False)
    assert (tiles.dq.images, tiles.dkv.images) == (images, images)


def test_tiles_say_what_they_do_not_take():
    with pytest.raises(NotImplementedError, match="head_dim=192"):
        choose_tiles(192)
    with pytest.raises(ValueError, match="warpgroups=4"):
        ForwardTiles(4, 64, 2)
    with pytest.raises(ValueError, match="block=96"):
        BackwardTiles(2, 96, 2)
    with pytest.raises(ValueError, match="stages=1"):
        BackwardTiles(2, 64, 1)
    with pytest.raises(ValueError, match=r"sequence forward: ForwardTiles.* at head_dim=128 needs \d+ bytes"):
        query = jnp.zeros((1, 1, 1, 128), jnp.bfloat16)
        sequence_forward(Call(query, query, query), tiles=ForwardTiles(2, 256, 2))


@pytest.mark.parametrize("masks", [("segments",), ("documents",), ("documents", "key_length"), ("positions",)], ids=str)
def test_block_bounds_cover_what_can_be_visible_and_runs_hold_only_what_is(masks):
    rng = np.random.default_rng(3)
    batch, query_tokens, key_tokens, block = 2, 190, 170, 16
    rows = mask_rows(rng, masks, batch, query_tokens, key_tokens)
    prepared = MaskRows.of(Mask(True, **rows), batch, query_tokens, key_tokens)
    visible = visible_pairs(batch, query_tokens, key_tokens, True, rows)
    # The runs leave the diagonal of default positions to the kernels.
    undiagonal = visible_pairs(batch, query_tokens, key_tokens, "positions" in masks, rows)
    for per in ("query", "key"):
        bounds = np.asarray(prepared.block_bounds(block, block, per))
        pairs, whole = (x if per == "query" else x.swapaxes(1, 2) for x in (visible, undiagonal))
        for b, i in itertools.product(range(batch), range(bounds.shape[1])):
            first, last, full_first, full_last = bounds[b, i]
            assert first <= full_first <= full_last <= last
            own = slice(i * block, (i + 1) * block)
            seen = np.flatnonzero(pairs[b, own].any(0)) // block
            if seen.size:
                assert first <= seen.min()
                assert last > seen.max()
            assert whole[b, own, full_first * block : full_last * block].all()
        if "documents" in masks:
            assert (bounds[:, :, 3] > bounds[:, :, 2] + 2).any(), "there should be long runs here"
