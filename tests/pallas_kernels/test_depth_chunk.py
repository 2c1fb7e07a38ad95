"""A query that also sees the slots of the earlier tokens of its chunk: `depth_chunk`."""

import dataclasses
import functools
import logging
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.dense_attention import dense_attention
from support.tolerances import assert_close

from pallas_kernels import block, depth_attention, dispatch, moda_attention
from pallas_kernels.depth_chunks import reach
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.parts import delta
from pallas_kernels.xla import chunk as xla_chunk

pytestmark = pytest.mark.usefixtures("small_blocks")
IMPLEMENTATIONS = ("reference", "xla")
B, T, S, K, G, H = 2, 37, 11, 2, 2, 16
FILLED, SCALE = 9, 0.3
NAMES = (*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS)
CHUNKS = (2, 5, 16, T + 4)  # of the third some are cut by documents; the last is longer than the row
SEGMENTS = np.stack([np.repeat([4, 0, 4, 1], (9, 1, 7, 20)), np.repeat([1, 2], (30, 7))]).astype(np.int32)


@functools.cache
def arrays():
    """query, key, value, depth_key, depth_value; unfilled slots hold NaN."""
    draw = np.random.default_rng(0)
    shapes = (B, T, K * G, H), *2 * [(B, T, K, H)], *2 * [(B, T, S, K, H)]
    names = "query", "key", "value", "depth_key", "depth_value"
    made = dict(zip(names, map(draw.standard_normal, shapes), strict=True))
    for name in ("depth_key", "depth_value"):
        made[name][:, :, FILLED:] = np.nan
    return {name: array.astype(np.float32) for name, array in made.items()}


@functools.cache
def output_gradients():
    draw = np.random.default_rng(1)
    return tuple(draw.standard_normal(shape).astype(np.float32) for shape in ((B, T, K * G, H), (B, T, K * G)))


@functools.cache
def expected(chunk, segments):
    dout, dlse = output_gradients()
    ids = SEGMENTS if segments else None
    return attention_oracle.attention(
        **arrays(), depth_length=FILLED, scale=SCALE, causal=True, query_segment_ids=ids, key_segment_ids=ids,
        depth_chunk=chunk, dout=dout, dlse=dlse,
    )  # fmt: skip


def run(implementation, chunk, segments, dtype="float32"):
    """out, lse and the five gradients of the public op."""

    @jax.jit
    def results(length, primals, cotangents):
        def op(*primals):
            return moda_attention(
                *primals, depth_length=length, depth_chunk=chunk, segment_ids=SEGMENTS if segments else None,
                scale=SCALE, implementation=implementation, return_lse=True,
            )  # fmt: skip

        out, pullback = jax.vjp(op, *primals)
        return *out, *pullback(cotangents)

    dout, dlse = output_gradients()
    primals = [jnp.asarray(array, dtype) for array in arrays().values()]
    return dict(zip(NAMES, results(jnp.int32(FILLED), primals, (jnp.asarray(dout, dtype), dlse)), strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    "chunk", [pytest.param(chunk, marks=() if chunk == 5 else pytest.mark.slow) for chunk in CHUNKS]
)
def test_outputs_and_gradients_match_the_oracle(implementation, segments, chunk, monkeypatch):
    monkeypatch.setattr(xla_chunk, "HEADS", 4)  # two shifts at once, so that there are several steps
    actual = run(implementation, chunk, segments)
    assert_close(actual, expected(chunk, segments), jnp.dtype("float32"))
    for name in ("ddepth_key", "ddepth_value"):
        assert not np.any(np.asarray(actual[name])[:, :, FILLED:]), f"{name} is not 0 in unfilled slots"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_bfloat16_it_is_as_good_as_the_dense_computation(implementation, monkeypatch):
    """Dense: every token's slots gathered beside it, in the narrow dtype."""
    monkeypatch.setattr(xla_chunk, "HEADS", 4)
    chunk, narrow = 5, jnp.bfloat16
    given = {name: np.asarray(jnp.asarray(array, narrow), np.float32) for name, array in arrays().items()}
    dout, dlse = output_gradients()
    dout = np.asarray(jnp.asarray(dout, narrow), np.float32)
    exact = attention_oracle.attention(
        **given, depth_length=FILLED, scale=SCALE, causal=True, depth_chunk=chunk, dout=dout, dlse=dlse
    )
    near = np.arange(T)[:, None] - np.arange(chunk)
    seen = (near >= 0) & (near // chunk == np.arange(T)[:, None] // chunk)  # [T, C]

    def dense(query, key, value, depth_key, depth_value):
        def gathered(x):  # a token's row alone, so that its own slots are those of all that it sees
            x = x[:, np.maximum(near, 0), :FILLED]
            return x.reshape(B * T, 1, chunk * FILLED, K, H)

        filled = np.repeat(seen, FILLED, axis=1)  # [T, C S]
        parts = [
            dense_attention(
                query[:, t : t + 1], key, value, gathered(depth_key)[t::T], gathered(depth_value)[t::T],
                visible=np.broadcast_to(np.arange(T) <= t, (B, 1, T)), filled=filled[t], scale=SCALE,
            )
            for t in range(T)
        ]  # fmt: skip
        return tuple(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))

    primals = [jnp.asarray(array, narrow) for array in arrays().values()]
    (out, lse), pullback = jax.vjp(dense, *primals)
    plain = dict(zip(NAMES, (out, lse, *pullback((jnp.asarray(dout, narrow), jnp.asarray(dlse)))), strict=True))
    assert_close(run(implementation, chunk, False, narrow), exact, jnp.dtype(narrow), plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_chunk_of_one_token_is_the_same_program(implementation):
    def program(**options):
        def op(*primals):
            return moda_attention(*primals, depth_length=FILLED, implementation=implementation, **options)

        primals = arrays().values()
        return str(jax.make_jaxpr(lambda *primals: jax.vjp(op, *primals)[1](primals[0]))(*primals))

    assert program() == program(depth_chunk=1) != program(depth_chunk=2)


def test_the_depth_part_alone():
    names = "query", "depth_key", "depth_value"
    given = [arrays()[name] for name in names]
    found = {
        name: jax.jit(functools.partial(
            depth_attention, depth_length=FILLED, depth_chunk=5, scale=SCALE, implementation=name, return_lse=True
        ))(*given)
        for name in IMPLEMENTATIONS
    }  # fmt: skip
    nothing = {name: np.zeros((B, 0, K, H)) for name in ("key", "value")}
    exact = attention_oracle.attention(
        given[0], **nothing, depth_key=given[1], depth_value=given[2], depth_length=FILLED, scale=SCALE, causal=False,
        depth_chunk=5,
    )  # fmt: skip
    for came in found.values():
        assert_close(dict(zip(("out", "lse"), came, strict=True)), exact, jnp.dtype("float32"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_slot_gives_an_empty_depth_part(implementation):
    def op(query, *depth):
        return depth_attention(
            query, *depth, depth_length=jnp.int32(0), depth_chunk=4, implementation=implementation, return_lse=True
        )

    primals = [arrays()[name] for name in ("query", "depth_key", "depth_value")]
    (out, lse), pullback = jax.vjp(op, *primals)
    assert not np.any(out) and np.all(np.isneginf(lse))
    assert not any(np.any(gradient) for gradient in pullback(output_gradients()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_stays_in_its_chunk(implementation):
    """A NaN in a slot reaches the later tokens of its chunk and of its document, and nobody else."""
    chunk, (row, place) = 5, (0, 11)  # the document [10, 17): a chunk [10, 15)
    given = {name: array.copy() for name, array in arrays().items()}
    given["depth_value"][row, place, 2] = np.nan
    reached = np.zeros((B, T), bool)
    reached[row, 11:15] = True

    @jax.jit
    def results(*primals):
        def op(*primals):
            return moda_attention(
                *primals, depth_length=FILLED, depth_chunk=chunk, segment_ids=SEGMENTS, implementation=implementation
            )

        out, pullback = jax.vjp(op, *primals)
        return out, *pullback(output_gradients()[0])

    out, dquery, _, _, ddepth_key, _ = results(*given.values())
    np.testing.assert_array_equal(np.isnan(out).any(axis=(2, 3)), reached)
    np.testing.assert_array_equal(np.isnan(dquery).any(axis=(2, 3)), reached)
    shown = np.zeros((B, T), bool)
    shown[row, 10:15] = True  # the slots of the tokens that those queries see
    np.testing.assert_array_equal(np.isnan(ddepth_key).any(axis=(2, 3, 4)), shown)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_buffers_are_added_to_where_slots_are_seen_and_not_deferred(implementation, dtype, monkeypatch):
    monkeypatch.setattr(xla_chunk, "HEADS", 4)
    chunk, first, (dout, dlse) = 5, 3, output_gradients()
    query, key, value, *depth = arrays().values()
    buffers = np.random.default_rng(3).standard_normal((2, B, T, S, K, H)).astype(dtype)
    mask = Mask(True, query_segment_ids=SEGMENTS, key_segment_ids=SEGMENTS)

    @jax.jit
    def run(length, first, buffers):
        call = Call(query, key, value, mask, DepthKV(*depth, length=length, chunk=chunk), SCALE)
        part = block.forward(call, implementation=implementation)
        upstream = Upstream(dout, part.lse, delta(dout, part, dlse))
        call = dataclasses.replace(call, depth=dataclasses.replace(call.depth, deferred=first))
        return block.backward(call, upstream, buffers=tuple(buffers), implementation=implementation)

    gradients = run(jnp.int32(FILLED), jnp.int32(first), buffers)
    exact = expected(chunk, True)
    assert_close({"dquery": gradients.query}, exact, jnp.dtype("float32"))
    for name, before in zip(("depth_key", "depth_value"), buffers, strict=True):
        came = np.asarray(getattr(gradients, name))
        assert came.dtype == before.dtype
        untouched = [*range(first), *range(FILLED, S)]
        assert came[:, :, untouched].tobytes() == before[:, :, untouched].tobytes()
        added = came[:, :, first:FILLED].astype(np.float64) - before[:, :, first:FILLED].astype(np.float64)
        wanted = exact[f"d{name}"][:, :, first:FILLED]
        bound = 1e-5 if dtype == "float32" else 2.0**-5
        assert np.abs(added - wanted).max() < bound * np.abs(wanted).max()


def largest_array(jaxpr):
    """Elements of the largest array that a jaxpr computes, loop bodies and called functions included."""
    sizes = [math.prod(getattr(v.aval, "shape", ())) for e in jaxpr.eqns for v in (*e.invars, *e.outvars)]
    inner = [largest_array(i) for e in jaxpr.eqns for i in jax.extend.core.jaxprs_in_params(e.params)]
    return max([0, *sizes, *inner])


def test_memory_does_not_grow_with_the_chunk():
    """No array is larger than the stream, or the queries beside HEADS heads: C times the slots never stand together."""
    tokens, slots, heads, head_dim = 256, 24, 2, 8
    query, key, depth = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, tokens, heads, head_dim), (1, tokens, heads, head_dim), (1, tokens, slots, heads, head_dim))
    )

    def gradients(chunk):
        def op(*primals):
            return moda_attention(*primals, depth_chunk=chunk, implementation="xla")

        return lambda *primals: jax.vjp(op, *primals)[1](primals[0])

    found = [largest_array(jax.make_jaxpr(gradients(c))(query, key, key, depth, depth).jaxpr) for c in (16, 256)]
    assert found[0] == found[1] == tokens * slots * heads * head_dim


def test_reach():
    assert reach(3, 7).tolist() == [[1, 2, 3, 1, 2, 3, 1]]
    ids = jnp.array([[5, 5, 5, 5, 5, 0, 0], [1, 2, 1, 1, 1, 1, 1]], jnp.int32)
    assert reach(3, 7, ids).tolist() == [[1, 2, 3, 1, 2, 1, 2], [1, 1, 1, 2, 3, 1, 2]]
    assert reach(1, 7, ids).tolist() == [[1] * 7] * 2


@pytest.mark.parametrize("chunk", [0, -1, True, 2.0, "4", None, jnp.int32(4)], ids=str)
def test_a_bad_chunk_is_named(chunk):
    query, key, value, *depth = arrays().values()
    with pytest.raises(ValueError, match=r"^depth_chunk=.*: expected an int of at least 1"):
        moda_attention(query, key, value, *depth, depth_chunk=chunk)
    with pytest.raises(ValueError, match=r"^depth_chunk=.*: expected an int of at least 1"):
        depth_attention(query, *depth, depth_chunk=chunk)


def test_with_a_cache_of_keys_it_is_refused():
    query, key, value, *depth = arrays().values()
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    with pytest.raises(ValueError, match=r"^depth_chunk=2: expected 1 with query_positions"):
        moda_attention(query, key, value, *depth, depth_chunk=2, query_positions=positions)
    assert moda_attention(query, key, value, depth_chunk=2, query_positions=positions).shape == query.shape


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_kernels_say_that_they_lack_it(implementation):
    try:
        module = dispatch.load(implementation)
    except NotImplementedError as error:
        pytest.skip(str(error))
    query, key, value, depth_key, depth_value = (jnp.asarray(array, jnp.bfloat16) for array in arrays().values())
    call = Call(query, key, value, Mask(True), DepthKV(depth_key, depth_value, chunk=2))
    with pytest.raises(NotImplementedError, match=f"{implementation}: depth_chunk=2: the kernels read a token's own"):
        module.check_supported(call)


def test_none_is_xla_on_a_gpu_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    dispatch._log_choice.cache_clear()
    query, key, value, *depth = (jnp.asarray(array, jnp.bfloat16) for array in arrays().values())
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert dispatch.resolve(None, Call(query, key, value, Mask(True), DepthKV(*depth, chunk=2))) == "xla"
    assert "xla (mosaic_gpu does not support the call: mosaic_gpu: depth_chunk=2" in caplog.text


def test_tokens_over_explicit_axes_are_refused():
    mesh = jax.make_mesh((1,), ("tokens",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec(None, "tokens")
    with jax.set_mesh(mesh):
        query, slots = (
            jax.device_put(arrays()[name], jax.sharding.NamedSharding(mesh, spec)) for name in ("query", "depth_key")
        )
        with pytest.raises(NotImplementedError, match="depth_chunk=2 with tokens over explicit mesh axes 'tokens'"):
            depth_attention(query, slots, slots, depth_chunk=2, implementation="xla")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_strict_modes_of_jax_it_is_traced_and_stays_float32(implementation):
    def op(*primals):
        return moda_attention(
            *primals, depth_length=FILLED, depth_chunk=30, segment_ids=SEGMENTS, implementation=implementation
        )

    primals = [jnp.asarray(array) for array in arrays().values()]
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients = jax.eval_shape(lambda *primals: jax.vjp(op, *primals)[1](primals[0]), *primals)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype("float32")}
