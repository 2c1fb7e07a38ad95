"""MoDA's entries in 8 bits, `model.moda.entry_dtype`.

The mechanism contract (`test_mechanism_contract`) has the gradients straight through, decoding and export.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mechanisms import assert_close, case_config, packed, perturbed
from support.quick_compile import QUICK

from moda_jax import PartedBlock, depth_scan
from moda_jax.depth_config import MoDASection
from moda_jax.inference import attention_maps, decode
from moda_jax.inference import packed as packed_decoding
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.rounded_stream import RoundedDepthStream
from moda_jax.model.depth.stream import DepthStream
from moda_jax.model.depth_probe import SlotChoice, filled_slots, probed_hidden
from moda_jax.model.function import model_function, split_model
from pallas_kernels import dispatch, moda_attention
from pallas_kernels.operands import Call, DepthKV

NAME = "moda, float8"
B, T, S, N, K, H = 2, 3, 3, 4, 2, 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def written(stream, entries):
    return functools.reduce(lambda stream, entry: stream.append(*entry), entries, stream)


def test_an_entry_is_rounded_and_what_is_too_large_becomes_the_largest_number():
    key = jnp.array([0.0, 1.06, -1.0 / 512, 447.0, 465.0, -1e30, jnp.inf, jnp.nan]).reshape(1, 1, 1, 8)
    stream = RoundedDepthStream.empty(1, 1, 2, 1, 8, jnp.bfloat16).append(key, -key)
    assert stream.key.dtype == jnp.float8_e4m3fn
    assert stream.entry_dtypes == (jnp.bfloat16, jnp.bfloat16)
    kept = [0.0, 1.0, -1.0 / 512, 448.0, 448.0, -448.0, 448.0, np.nan]
    np.testing.assert_array_equal(stream.key[0, 0, 0, 0].astype(jnp.float32), kept)
    np.testing.assert_array_equal(stream.value[0, 0, 0, 0].astype(jnp.float32), np.negative(kept))


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_reads_and_gradients_are_those_of_the_rounded_entries(dtype):
    """Against the op on the entries as they are kept: their gradients, of any size, are the unrounded ones'."""
    entries = [tuple(normal(10 * i + j, B, T, K, H).astype(dtype) for j in range(2)) for i in range(S)]
    query, key, value, dout = (normal(50 + i, B, T, heads, H).astype(dtype) for i, heads in enumerate((N, K, K, N)))
    dout = dout * 2.0**-20  # in 8 bits all of it were 0
    operation = SoftmaxAttention(True, implementation="xla")

    def ours(request, entries):
        stream = written(RoundedDepthStream.like(query, S, K, H), entries)
        return operation(request, stream, ())

    def expected(request, entries):
        stream = written(RoundedDepthStream.like(query, S, K, H), entries)
        kept = jax.lax.stop_gradient(stream.entries)
        plain = written(DepthStream.like(query, S, K, H), entries).buffers
        straight = [array + jax.lax.stop_gradient(rounded - array) for array, rounded in zip(plain, kept, strict=True)]
        return moda_attention(*request, *straight, implementation="reference")

    def gradients(f):
        out, pullback = jax.vjp(f, (query, key, value), entries)
        return out, pullback(dout.astype(dtype))

    got, wanted = (jax.jit(functools.partial(gradients, f), compiler_options=QUICK)() for f in (ours, expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    got, wanted = (jax.tree.map(lambda x: 2.0**20 * x.astype(jnp.float32), (x[0] / 2**20, x[1])) for x in (got, wanted))
    assert_close(got, wanted, 1e-5 if dtype == jnp.float32 else 2e-2)


def gradients(**fields):
    """A compiled function of the parameters and of a factor of the loss."""
    model, arrays = model_function(case_config(NAME, **fields)), packed()

    def loss(params, factor):
        return factor * jnp.mean(jnp.sin(model(params, *arrays)))

    return jax.jit(jax.grad(loss), compiler_options=QUICK)


def test_no_gradient_of_the_loop_passes_through_8_bits():
    """Neither inside of it, nor what comes from a read behind it: those of plain autodiff, though they are small."""
    operation = SoftmaxAttention(True, implementation="xla")

    def before(params, x):
        return params[0] * x, params[1] * x[:, :, :K], params[2] * x[:, :, K:]

    def after(params, x, key, value, attended):
        return x + attended, ((params[3] * key, value),)

    block = PartedBlock(before, after, entries_per_layer=1, implementation="xla")

    def looped(params, x, stream):
        return depth_scan(block, params, x, stream)

    def unrolled(params, x, stream):
        for layer in range(len(params)):
            request = before(params[layer], x)
            x, (entry,) = after(params[layer], x, *request[1:], operation(request, stream, ()))
            stream = stream.append(*entry)
        return x, stream

    def gradients(run, params, x):
        def loss(params, x):
            y, stream = run(params, x, RoundedDepthStream.like(x, 2, K, H))
            read = operation((y, y[:, :, :K], y[:, :, K:]), stream, ())
            return 2.0**-30 * jnp.sum(jnp.sin(y) + jnp.cos(read))

        found = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)(params, x)
        return jax.tree.map(lambda gradient: 2.0**30 * gradient, found)

    params, x = 1 + 0.1 * normal(0, 2, 4, 1, 1), normal(1, B, T, N, H)
    assert_close(gradients(looped, params, x), gradients(unrolled, params, x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"layer_loop": "unroll"}, {"remat": "full"}, {"remat": "none", "layer_loop": "unroll"},
        {"depth_gradient_group": 2}, {"depth_gradient_dtype": "float32"},
    ],
    ids=str,
)  # fmt: skip
def test_however_the_loop_runs_gradients_are_the_same(fields):
    params = perturbed(case_config(NAME))
    assert_close(gradients(**fields)(params, 1.0), gradients()(params, 1.0), 2e-5)


@pytest.mark.slow
def test_memory_is_linear_in_depth_and_less_than_with_whole_entries():
    def temporary_bytes(layers, entry_dtype):
        config = case_config(
            NAME, num_layers=layers, max_sequence_length=256, remat="attention",
            moda={"entry_dtype": entry_dtype},
        )  # fmt: skip
        model = model_function(config)
        params = jax.eval_shape(lambda: split_model(config, jax.random.key(0))[1])
        run = jax.grad(lambda params, tokens: jnp.sum(jax.nn.logsumexp(model(params, tokens), axis=-1)))
        tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
        return jax.jit(run).lower(params, tokens).compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes

    small, middle, large = (temporary_bytes(layers, "float8_e4m3fn") for layers in (8, 16, 32))
    whole = temporary_bytes(32, None)
    report = f"temporary bytes {small}, {middle}, {large}; with whole entries {whole}"
    print(report)
    assert large <= 2.2 * middle and middle <= 2.2 * small, report
    assert large < whole, report


@pytest.mark.slow
def test_unrolled_layers_decode_as_the_model_runs():
    """Where layers could be packed they are not: a packed step keeps slots as they are."""
    config = case_config(NAME)
    model, params = model_function(config), perturbed(config)
    tokens = packed(1)[0]
    own = decode.decode_params(params, config, unroll=True, packed=False)
    logits, cache = decode.prefill(model, own, tokens[:, :8], np.zeros(2, np.int32), capacity=12, padded=False)
    seen = [logits]
    for i in range(8, 11):
        logits, cache = decode.step(model, own, cache, jnp.asarray(tokens[:, i]))
        seen.append(logits)
    assert_close(jnp.stack(seen, axis=1), jax.jit(model)(params, tokens)[:, 7:], 1e-5)


@pytest.mark.slow
def test_maps_and_probes_are_of_the_rounded_entries():
    config = case_config(NAME)
    model, params = model_function(config), perturbed(config)
    tokens = packed(batch=1)[0]
    filled = filled_slots(config)
    module = model.module(params)
    hidden, masses = probed_hidden(module, tokens, None, None, SlotChoice.of(filled))
    assert_close(hidden, model.hidden(params, tokens), 1e-5)
    maps = attention_maps.attention_maps(model, params, tokens[0])
    np.testing.assert_allclose(maps.slot_mass.mean(axis=1)[:, : masses.shape[1]], masses, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entry_dtype": "float8_e5m2"}, "moda.entry_dtype='float8_e5m2': expected one of (None, 'float8_e4m3fn')"),
        ({"key": "reader_norm"}, "None with moda.key='reader_norm'"),
        ({"read": "top"}, "None with moda.read='top'"),
        ({"null_slot": True}, "None with moda.null_slot=True"),
        ({"softmax": "separate"}, "None with moda.softmax='separate'"),
    ],
)
def test_what_does_not_take_them_is_refused_by_name(fields, message):
    section = MoDASection(**{"entry_dtype": "float8_e4m3fn"} | fields)
    with pytest.raises(ValueError) as error:
        section.check("moda")
    assert message in str(error.value)


def test_packed_decoding_other_kernels_and_the_public_op_refuse_them_by_name():
    config = case_config(NAME)
    with pytest.raises(NotImplementedError, match=r"moda\.entry_dtype='float8_e4m3fn': expected one of"):
        packed_decoding.check_packed(config)
    query = jnp.zeros((1, 2, 2, 64), jnp.bfloat16)
    entries = jnp.zeros((1, 2, 3, 1, 64), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="triton: depth entries in float8_e4m3fn"):
        dispatch.load("triton").check_supported(Call(query, depth=DepthKV(entries, entries)))
    with pytest.raises(ValueError, match="depth_key has dtype float8_e4m3fn: expected the query's bfloat16"):
        moda_attention(query, query[:, :, :1], query[:, :, :1], entries, entries)
