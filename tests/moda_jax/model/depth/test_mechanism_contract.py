"""What every depth mechanism must hold: full for MoDA, block Attention Residuals and mHC, in part for the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from support import plain_depth
from support.mechanisms import CASES, FAMILY, FULL, OTHERS, assert_close, case_config, case_params, packed
from support.quick_compile import QUICK

from moda_jax import param_count
from moda_jax.inference import decode
from moda_jax.interop.exchange import export_model, is_olmo2, load_model
from moda_jax.model.attention import default_positions
from moda_jax.model.function import model_function, split_model
from moda_jax.model.stack import Step


def objective(logits):
    """A scalar of the logits that weighs every one of them differently."""
    weights = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
    return jnp.sum(weights * jax.nn.log_softmax(logits))


def value_and_gradient(function, params, compiled=True):
    def scalar(params):
        logits = function(params, *packed())
        return objective(logits), logits

    both = jax.value_and_grad(scalar, has_aux=True)
    (_, logits), gradient = (jax.jit(both, compiler_options=QUICK) if compiled else both)(params)
    return logits, gradient


@functools.cache
def expected(name):
    """Logits and gradients of the independent model, one operation at a time: its unrolled layers compile long."""
    config = case_config(name)
    return value_and_gradient(
        lambda params, *arrays: plain_depth.logits(params, config, *arrays), case_params(name), compiled=False
    )


# By default MoDA in one way; all ways and the other cases are slow.
QUICK_FORMS = {("moda", ("scan", "attention"))}
FAMILY_FORMS = [("scan", "attention"), ("unroll", "none")]
FORMS = [(loop, remat) for loop in ("scan", "unroll") for remat in ("full", "attention", "ffn", "none")]


# Cases that differ from another one in sizes, norms or constants alone: they see the same tokens and slots, in the same
# kind of loop. That their logits and gradients, of packed documents too, are right says the first test, in one form.
ALIKE = {
    "moda, projected", "attnres_block of 1, post-norm", "attnres_block of 2", "attnres_block of 4",
    "value_mixing of all", "attnres_delta, no null source", "hc of 4", "depth_attention, post-norm", "mudd, post-norm",
    "none, norm of the sum", "moda, norm of the sum", "value_mixing, norm of the sum",
    "value_residual, norm of the sum", "moda, window alone", "moda, stride, biases", "moda, reader's norm",
    "moda, writer's norm", "none, per-head norm", "moda, per-head norm", "moda, per-head norm of the writer",
    "moda, per-head norm of the reader", "value_residual, fixed",
}  # fmt: skip


def slow(value, quick, *more):
    """A case, marked slow, and with more marks, unless it is among the quick ones."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=() if value in quick else (pytest.mark.slow, *more))


def near(value, quick):
    """A case of gradients in float32, some of which nearly cancel: `precise` where it is slow. A mechanism's cases
    share what the independent model gives, and so a process."""
    return slow(value, quick, pytest.mark.precise, pytest.mark.xdist_group(value[0]))


every_case = pytest.mark.parametrize("name", [slow(name, {"moda", "attnres_block"}) for name in CASES])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(near((name, form), QUICK_FORMS) for name in FULL for form in FORMS),
        *(near((name, FORMS[(0, 7)[i % 2]]), ()) for i, name in enumerate(OTHERS)),
        *(near((name, form), QUICK_FORMS) for name in FAMILY for form in FAMILY_FORMS[: 1 if name in ALIKE else 2]),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_the_independent_model(name, form):
    loop, remat = form
    model = model_function(case_config(name, layer_loop=loop, remat=remat))
    assert_close(value_and_gradient(model, case_params(name)), expected(name), 2e-5)


@every_case
def test_prefill_and_decoding_are_the_forward_pass(name):
    config, params = case_config(name), case_params(name)
    model = model_function(config)
    tokens = packed(1)[0]
    logits = jax.jit(model, compiler_options=QUICK)(params, tokens)
    start = np.zeros(len(tokens), np.int32)
    step_logits, cache = decode.prefill(model, params, tokens[:, :8], start, capacity=12, padded=False)
    assert cache.key.shape == (config.num_layers, 2, config.num_kv_heads, 12, config.head_dim)
    seen = [step_logits]
    for i in range(8, 11):
        step_logits, cache = decode.step(model, params, cache, jnp.asarray(tokens[:, i]))
        seen.append(step_logits)
    assert_close(jnp.stack(seen, axis=1), logits[:, 7:], 1e-5)


@pytest.mark.parametrize("name", [slow(name, {"moda"}) for name in CASES if name not in ALIKE])
def test_no_token_depends_on_a_later_one_or_on_another_document(name):
    config, params = case_config(name), case_params(name)
    module = model_function(config).module(params)
    tokens, segment_ids, positions = packed(2, batch=1)
    x = module.embedding(jnp.asarray(tokens))

    def outputs(x):
        return module.walk(x, positions, segment_ids)[0][0].sum(axis=-1)  # [T]

    gradient = jax.jit(jax.jacrev(outputs), compiler_options=QUICK)(x)[:, 0]  # [T out, T in, D]
    same = segment_ids[0][:, None] == segment_ids[0][None, :]
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=-1), jnp.tril(same))


@pytest.mark.parametrize("name", [slow(name, {*FULL, "denseformer"}) for name in CASES])
def test_the_parameters_are_those_that_accounting_counts(name, tmp_path):
    """Counted in the exported file, which has no padding; and what is read back is what was written."""
    config, params = case_config(name), case_params(name)
    directory = export_model(config, params, tmp_path / "model")
    loaded_config, module = load_model(directory, dtype="float32", attention_implementation="xla")
    if not is_olmo2(config):  # OLMo 2's file has no place for fields that its weights do not depend on
        assert loaded_config == config
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    assert param_count(config) == sum(tensor.size for tensor in tensors.values())
    export_model(config, nnx.to_pure_dict(nnx.state(module, nnx.Param)), tmp_path / "again")
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, tensors)


def test_mechanisms_share_the_initial_values_of_what_they_share():
    def flat(name):
        _, params = split_model(case_config(name, norm="pre"), jax.random.key(3))
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

    first = flat("none")
    for name in FULL:
        others = flat(name)
        assert first.keys() <= others.keys()
        for path, leaf in first.items():
            np.testing.assert_array_equal(others[path], leaf, err_msg=f"{name}: {path}")


def temporary_bytes(name, layers, **fields):
    """Of the gradient of a model with small sub-layers and many tokens."""
    config = case_config(name, num_layers=layers, max_sequence_length=256, **fields)
    model = model_function(config)
    params = jax.eval_shape(lambda: split_model(config, jax.random.key(0))[1])

    def loss(params, tokens):
        return jnp.sum(jax.nn.logsumexp(model(params, tokens), axis=-1))

    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile(compiler_options=QUICK)
    return compiled.memory_analysis().temp_size_in_bytes


# XLA drops the barriers that order an unrolled reverse loop before it schedules for a CPU: the reads' temporaries of
# all layers then stand in memory together, and where every sub-layer has a slot these are the larger part. For a GPU it
# keeps them: compiled for an H100 the case below takes 7.0, 10.0 and 16.2 MiB.
ORDERED_BY_BARRIERS = pytest.param("attnres_block of 1, post-norm", "unroll", marks=pytest.mark.gpu)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loop"),
    [
        *((name, loop) for name in FULL for loop in ("scan", "unroll")),
        ("attnres_block of 1, post-norm", "scan"),
        ORDERED_BY_BARRIERS,
    ],
)
def test_memory_is_linear_in_depth(name, loop):
    sizes = (8, 16, 32) if loop == "scan" else (4, 8, 16)
    found = {layers: temporary_bytes(name, layers, remat="attention", layer_loop=loop) for layers in sizes}
    print(f"{name}, {loop}: temporary bytes {found}")
    small, middle, large = found.values()
    assert large <= 2.2 * middle and middle <= 2.2 * small, found


@pytest.mark.parametrize("name", FULL)
def test_a_walk_with_a_step_is_the_model(name):
    """What prefill, decoding, maps and diagnosis walk is what trains."""
    config, params = case_config(name), case_params(name)
    module = model_function(config).module(params)
    tokens = jnp.asarray(packed()[0])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(x):
        positions = default_positions(x)
        hidden = module.walk(x, positions, None)[0]
        return hidden, module.walk(x, positions, None, Step())[0]

    looped, stepped = both(module.embedding(tokens))
    assert_close(stepped, looped, 1e-6)
