"""MoDA where a token reads the slots of the earlier tokens of its chunk, `model.moda.chunk`.

The mechanism contract (`test_mechanism_contract`) has its gradients, decoding, causality and export.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import plain_depth
from support.mechanisms import TINY, assert_close, case_config, case_params, packed
from support.quick_compile import QUICK

from moda_jax import DepthStream, MoDAAttention, forward_flops
from moda_jax.config import Config, TransformerConfig
from moda_jax.inference import decode
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.depth_probe import SlotChoice, filled_slots, probed_hidden
from moda_jax.model.function import model_function, split_model
from moda_jax.parallel import attention as parallel_attention
from pallas_kernels.operands import Call, DepthKV, Mask

CHUNK = 3  # of the case
NAME = "moda, chunk"
SIZES = {"width": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "implementation": "xla", "dtype": "float32"}


@functools.cache
def compiled():
    """The case's model, its parameters and the compiled forward pass."""
    config = case_config(NAME, num_layers=3)
    model = model_function(config)
    params = case_params(NAME)
    params = params | {"layers": jax.tree.map(lambda leaf: leaf[:2], params["layers"])}
    return config, model, params, jax.jit(model, compiler_options=QUICK)


@pytest.mark.slow
def test_the_forward_pass_is_that_of_the_independent_model():
    config, _, params, forward = compiled()
    assert_close(forward(params, *packed()), plain_depth.logits(params, config, *packed()), 2e-5)


@pytest.mark.slow
def test_a_document_comes_to_the_same_wherever_it_stands():
    """Chunks are counted from its own first token, not from the row's."""
    _, _, params, forward = compiled()
    tokens, segment_ids, positions = packed(batch=1)
    row = forward(params, tokens, segment_ids, positions)
    for begin, end in ((3, 8), (8, 11)):
        alone = forward(params, tokens[:, begin:end])
        np.testing.assert_allclose(row[:, begin:end], alone, atol=1e-5)


def test_a_padded_prompt_decodes_as_it_does_alone():
    """In one batch rows stand at different places of their chunks; the slots of tokens before a prompt are not seen."""
    _, model, params, forward = compiled()
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, TINY.vocab_size, length).astype(np.int32) for length in (12, 9, 5, 8)]
    steps = 4
    prompts = [text[:-steps] for text in texts]  # 8, 5, 1 and 4 tokens
    T = max(map(len, prompts))
    start = np.array([T - len(prompt) for prompt in prompts], np.int32)
    tokens = np.stack([np.pad(prompt, (T - len(prompt), 0)) for prompt in prompts])
    logits, cache = decode.prefill(model, params, tokens, start, capacity=16, padded=True)
    seen = [logits]
    for i in range(steps):
        logits, cache = decode.step(model, params, cache, jnp.array([text[i - steps] for text in texts]))
        seen.append(logits)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        whole = forward(params, np.pad(text, (0, 12 - len(text)))[None])[0, len(prompt) - 1 : len(text)]
        np.testing.assert_allclose(jnp.stack([step[row] for step in seen]), whole, atol=1e-5, err_msg=f"row {row}")


@pytest.mark.slow
def test_unrolled_layers_decode_the_same():
    _, model, params, _ = compiled()
    tokens, start = packed(1)[0], np.zeros(2, np.int32)
    results = []
    for unroll in (False, True):
        cast = decode.decode_params(params, unroll=unroll)
        logits, cache = decode.prefill(model, cast, tokens[:, :7], start, capacity=12, padded=False)
        for i in range(7, 11):
            logits, cache = decode.step(model, cast, cache, jnp.asarray(tokens[:, i]))
        results.append(logits)
    np.testing.assert_allclose(*results, atol=1e-5)


def test_the_cache_has_the_slots_of_the_other_tokens_of_a_chunk():
    shape = 2, 32, None  # rows, places
    own, chunk = (decode.KVCache.empty(case_config("moda", moda={"chunk": size}), *shape) for size in (1, 5))
    slots = 6 * TINY.num_kv_heads * TINY.head_dim  # of three layers that write
    assert own.slots is None
    assert chunk.nbytes - own.nbytes == 2 * 2 * 4 * slots * 4  # key and value, rows, four tokens, float32
    one_layer = case_config("moda", moda={"chunk": 5}, num_layers=1)
    assert decode.KVCache.empty(one_layer, *shape).slots is None


def test_the_reads_flops_are_of_half_a_chunk_and_half_a_token():
    mechanism = find_mechanism("moda")
    own, chunk = (case_config("moda", moda={"chunk": size}) for size in (1, 8))
    assert mechanism.read_flops(own) == 4 * 16 * (2 + 4 + 6)  # N H = 16
    # Of the tokens of a chunk the first sees one token's slots, the last eight tokens'.
    assert mechanism.read_flops(chunk) * 8 == mechanism.read_flops(own) * sum(range(1, 9))
    assert forward_flops(chunk, 32) - forward_flops(own, 32) == 32 * (mechanism.read_flops(own) * 7 / 2)
    assert mechanism.slots_read(chunk) == mechanism.slots_read(own)


def test_gradients_are_not_deferred():
    """Layers in groups add them one by one: a group's sum is over each token's own queries."""
    key, query = jnp.ones((1, 3, 7, 2, 8)), jnp.ones((1, 3, 4, 8))
    stream = DepthStream(key, key, jnp.int32(5))
    request = query, query[:, :, :2], query[:, :, :2]
    operation = SoftmaxAttention(True, implementation="xla", chunk=2)
    assert operation.gradient_group(request, stream, ()) == 1

    def backward():
        result, saved = operation.forward(request, stream, ())
        return operation.backward_deferred(request, result, saved, stream, (), result, stream.buffers, jnp.int32(3))

    *_, waiting = jax.eval_shape(backward)
    assert waiting is None


@functools.cache
def gradient(**fields):
    """Of the case's parameters, with the loop in some form."""
    _, _, params, _ = compiled()
    model = model_function(case_config(NAME, num_layers=3, **fields))

    def loss(params):
        return jnp.sum(jnp.sin(model(params, *packed())))

    return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"remat": "full"}, {"remat": "ffn"}, {"remat": "full", "layer_loop": "unroll"}, {"depth_gradient_group": 2}],
    ids=str,
)
def test_the_loops_forms_give_the_same_gradients(fields):
    """Those that the mechanism contract does not run."""
    assert_close(gradient(**fields), gradient(), 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "model.moda.chunk=0: expected a positive number"),
        ({"chunk": 2.5}, "model.moda.chunk=2.5: expected a value of type int"),
        ({"chunk": True}, "model.moda.chunk=True: expected a value of type int"),
        *(
            ({"chunk": 2} | fields, f"model.moda.chunk=2: expected 1 with model.moda.{name}")
            for fields, name in (
                ({"read": "hybrid"}, "read='hybrid'"),
                ({"read": "top"}, "read='top'"),
                ({"key": "reader_norm"}, "key='reader_norm'"),
                ({"key": "writer_norm", "query_rotated": False}, "query_rotated=False"),
                ({"null_slot": True}, "null_slot=True"),
                ({"entry_bias": True}, "entry_bias=True"),
                ({"softmax": "separate"}, "softmax='separate'"),
            )
        ),
    ],
)
def test_bad_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({"depth": "moda", "moda": fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"causal": False}, "model.moda.chunk=2: expected 1 with model.causal=False"),
        ({"max_sequence_length": 1}, "model.moda.chunk=2: expected at most model.max_sequence_length=1 tokens"),
    ],
)
def test_a_model_that_it_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        split_model(case_config("moda", moda={"chunk": 2}, **fields), jax.random.key(0))


def test_tokens_of_a_chunk_are_not_split_over_devices():
    model, mesh = {"depth": "moda", "moda": {"chunk": 2}}, {"context": 2}
    with pytest.raises(ValueError, match=r"mesh.context=2: expected 1 with model.moda.chunk=2"):
        Config.from_dict({"model": model, "mesh": mesh})
    assert Config.from_dict({"model": model | {"depth": "none"}, "mesh": mesh}).mesh.context == 2
    array = jnp.ones((1, 4, 2, 8))
    call = Call(array, array, array, Mask(True), DepthKV(array[:, :, None], array[:, :, None], chunk=2))
    with pytest.raises(NotImplementedError, match=r"depth_chunk=2 with mesh\.context=2"):
        parallel_attention._gathered(call, 2)


def test_depth_probes_refuse_it():
    config, model, params, _ = compiled()
    assert not config.has_depth_probes
    with pytest.raises(NotImplementedError, match="not all of its token's alone"):
        probed_hidden(model.module(params), packed()[0], None, None, SlotChoice.of(filled_slots(config)))


def inputs():
    """x [1, 7, 8] and a stream with one of three slots filled."""
    draw = np.random.default_rng(0)
    key = jnp.asarray(draw.standard_normal((1, 7, 3, 1, 4)), jnp.float32)
    return jnp.asarray(draw.standard_normal((1, 7, 8)), jnp.float32), DepthStream(key, key, np.int32(1))


def test_a_layer_reads_the_slots_of_a_chunk():
    layer = MoDAAttention(**SIZES, chunk=CHUNK, rngs=nnx.Rngs(0))
    x, stream = inputs()

    def outputs(value):
        filled = DepthStream(stream.key, value, stream.length)
        return layer(x, filled)[0].sum(axis=-1)[0]  # [T]

    gradient = jax.jit(jax.jacrev(outputs))(stream.value)[:, 0]  # [T, T, S, K, H]
    place = np.arange(7)
    near = (place[:, None] // CHUNK == place // CHUNK) & (place <= place[:, None])
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=(3, 4))[..., 0], near)
    assert not jnp.any(gradient[:, :, 1:])  # not filled


def test_what_the_layer_lacks_is_named():
    with pytest.raises(ValueError, match="chunk=0: expected a number of tokens, at least 1"):
        MoDAAttention(**SIZES, chunk=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="chunk=2: expected 1 with causal=False"):
        MoDAAttention(**SIZES, chunk=2, causal=False, rngs=nnx.Rngs(0))
    layer = MoDAAttention(**SIZES, chunk=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="decode: the layer was built with chunk=2, expected chunk=1"):
        layer.decode(*inputs(), None)


def test_decoding_is_traced_in_strict_modes_of_jax():
    config = case_config(NAME, num_layers=3)
    model = model_function(config)
    params = jax.eval_shape(lambda: split_model(config, jax.random.key(0))[1])
    cache = jax.eval_shape(lambda: decode.KVCache.empty(config, 2, 12, jnp.zeros(2, jnp.int32)))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        step = lambda params, *rest: decode._step(decode._module(model, params), params, *rest, None)  # noqa: E731
        logits, after = jax.eval_shape(step, params, cache, tokens)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
