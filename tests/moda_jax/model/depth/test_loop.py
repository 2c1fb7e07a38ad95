"""The layer loop: gradients equal plain autodiff's; memory is linear in depth, compile time does not follow it."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from support import plain_model
from support.quick_compile import QUICK

from moda_jax import DepthStream, PartedBlock, Transformer, TransformerConfig, depth_scan
from pallas_kernels import moda_attention

B, T, D, K, H, L = 2, 7, 8, 2, 4, 3
N = 4


def layer_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D)}
    return {
        name: jax.random.normal(key, (L, *shape)) * 0.4 for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def before(p, x, scale, segment_ids):
    x = x * scale
    return tuple(jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")


def after(p, x, key, value, attended, scale, segment_ids):
    x = x + jnp.tanh(jnp.einsum("btnh,nhd->btd", attended, p["o"]))
    second = jnp.einsum("btd,dnh->btnh", x, p["k"])
    return x, ((key, value), (second, second + value))


def whole(p, x, stream, scale, segment_ids):
    query, key, value = before(p, x, scale, segment_ids)
    attended = moda_attention(
        query, key, value, stream.key, stream.value, depth_length=stream.length, segment_ids=segment_ids,
        implementation="xla",
    )  # fmt: skip
    x, entries = after(p, x, key, value, attended, scale, segment_ids)
    for entry in entries:
        stream = stream.append(*entry)
    return x, stream


PARTED = PartedBlock(
    before,
    after,
    entries_per_layer=2,
    writes_own_key_value=True,
    segment_ids=lambda scale, ids: ids,
    implementation="xla",
)
SEGMENTS = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]] * B, jnp.int32)


def start(slots=2 * L + 1, filled=1, dtype=jnp.float32):
    """A stream whose first slots were filled by somebody else; the rest holds NaN."""
    keys = jax.random.split(jax.random.key(9), 2)
    key, value = (jax.random.normal(k, (B, T, slots, K, H)).at[:, :, filled:].set(jnp.nan).astype(dtype) for k in keys)
    return DepthStream(key, value, np.int32(filled))


def run(loop, params, x, stream, scale):
    """A scalar of everything that comes out, so that every cotangent is exercised."""
    x, stream = loop(params, x, stream, scale)
    slot = jnp.arange(stream.slots)[:, None, None]
    filled = jnp.where(slot < stream.length, stream.key * jnp.cos(slot) + stream.value * jnp.sin(slot + 1.0), 0)
    return jnp.sum(jnp.sin(x)) + jnp.sum(filled)


def plain_loop(params, x, stream, scale):
    for i in range(L):
        x, stream = whole(jax.tree.map(lambda leaf, i=i: leaf[i], params), x, stream, scale, SEGMENTS)
    return x, stream


def arguments():
    return layer_params(), jax.random.normal(jax.random.key(3), (B, T, D)), start(), jnp.float32(0.9)


def gradients(loop, traced_length=False):
    def value(params, x, key, val, scale, length):
        return run(loop, params, x, DepthStream(key, val, length), scale)

    params, x, stream, scale = arguments()
    differentiate = jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4))
    if traced_length:
        return jax.jit(differentiate, compiler_options=QUICK)(params, x, stream.key, stream.value, scale, stream.length)
    return jax.jit(lambda *a: differentiate(*a, stream.length), compiler_options=QUICK)(
        params, x, stream.key, stream.value, scale
    )


CASES = {
    "any block": (whole, {}),
    "any block, unrolled": (whole, {"unroll": True}),
    "parted": (PARTED, {}),
    "parted, full remat": (PARTED, {"remat": "full"}),
    "parted, no remat": (PARTED, {"remat": "none"}),
    "parted, no remat, unrolled": (PARTED, {"remat": "none", "unroll": True}),
    "parted, float32 gradient": (PARTED, {"gradient_dtype": "float32"}),
    "parted, in groups": (PARTED, {"gradient_group": 2}),
    "parted, in groups, unrolled": (PARTED, {"gradient_group": 2, "unroll": True, "remat": "full"}),
    "parted, one group": (PARTED, {"gradient_group": 8, "remat": "none", "gradient_dtype": "float32"}),
    "parted, kv stored": (dataclasses.replace(PARTED, writes_own_key_value=False), {"remat": "none"}),
}

QUICK_CASES = (
    "any block", "parted, full remat", "parted, no remat", "parted, no remat, unrolled", "parted, kv stored",
    "parted, in groups",
)  # fmt: skip


@functools.cache
def expected_gradients():
    return gradients(plain_loop)


@pytest.mark.parametrize(
    ("case", "traced_length"),
    [
        *((case, False) for case in QUICK_CASES),
        *(pytest.param(case, False, marks=pytest.mark.slow) for case in CASES if case not in QUICK_CASES),
        pytest.param("any block", True, marks=pytest.mark.slow),
        ("parted", True),
        ("parted, in groups, unrolled", True),
        pytest.param("parted, no remat", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_plain_autodiff(case, traced_length):
    block, options = CASES[case]

    def loop(params, x, stream, scale):
        return depth_scan(block, params, x, stream, scale, SEGMENTS, **options)

    got = gradients(loop, traced_length)
    expected = expected_gradients()
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("layers", "group", "unroll", "filled"),
    [
        (5, 2, False, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(4, 4, True, 0), (4, 2, False, 1), (6, 4, True, 0), (7, 3, False, 2)]
        ),
    ],
)
def test_layers_in_groups_give_the_gradients_of_layers_alone(layers, group, unroll, filled):
    """Left-over layers or none, from an empty stream or not; every slot's gradient has to come in time."""
    keys = jax.random.split(jax.random.key(1), 2)
    params = jax.tree.map(lambda x: jnp.concatenate([x, x + 0.1, x - 0.1])[:layers], layer_params())
    x, stream = jax.random.normal(keys[0], (B, T, D)), start(2 * layers + filled, filled)

    def gradients(group):
        def value(params, x, key, val):
            loop = functools.partial(depth_scan, PARTED, gradient_group=group, unroll=unroll)
            found = DepthStream(key, val, stream.length)
            return run(lambda p, x, s, scale: loop(p, x, s, scale, SEGMENTS), params, x, found, jnp.float32(0.9))

        return jax.jit(jax.grad(value, (0, 1, 2, 3)), compiler_options=QUICK)(params, x, stream.key, stream.value)

    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients(group)), jax.tree.leaves(gradients(1)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("options", "traced", "reads", "looks"),
    [
        ({"unroll": True, "remat": "none"}, False, 6, 0),
        ({"unroll": True, "remat": "ffn"}, False, 6 + 2, 0),  # the own key and value again
        ({"remat": "none"}, False, 6 + 2, 0),
        ({"unroll": True, "remat": "none"}, True, 4 + 4, 4),
    ],
)
def test_a_slot_is_read_only_where_it_has_to_be(options, traced, reads, looks):
    """In a layer the gradients of two entries, and once more those of its own key and value for where they are used.
    What an entry overwrites is looked at only where nobody knows whether its slot is there."""
    params, x, stream, scale = arguments()

    def value(params, x, key, val, length):
        found = DepthStream(key, val, length if traced else stream.length)
        return run(lambda p, *a: depth_scan(PARTED, p, *a, SEGMENTS, **options), params, x, found, scale)

    jaxpr = jax.make_jaxpr(jax.grad(value))(params, x, stream.key, stream.value, stream.length)
    of_slots = [e.primitive.name for e in equations(jaxpr.jaxpr) if e.outvars[0].aval.shape == (B, T, 1, K, H)]
    assert of_slots.count("dynamic_slice") == reads
    assert of_slots.count("select_n") == looks


def equations(jaxpr):
    """Of a jaxpr and of all inside."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_the_returned_stream_holds_every_entry_and_counts_them():
    params, x, stream, scale = arguments()
    expected_x, expected = plain_loop(params, x, stream, scale)
    got_x, got = depth_scan(PARTED, params, x, stream, scale, SEGMENTS)
    assert got.length == expected.length == 2 * L + 1
    np.testing.assert_allclose(got_x, expected_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.key, expected.key, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_vmap_remat_and_a_pytree_carry():
    params, x, stream, scale = arguments()

    def block(p, carry, stream, scale):
        x, total = carry
        x, stream = whole(p, x, stream, scale, SEGMENTS)
        return (x, total + jnp.sum(x)), stream

    def value(x):
        (x, total), _ = depth_scan(block, params, (x, jnp.float32(0)), stream, scale)
        return total + jnp.sum(x)

    xs = jnp.stack([x, 2 * x])
    expected = jnp.stack([jax.grad(value)(x) for x in xs])
    np.testing.assert_allclose(jax.vmap(jax.grad(value))(xs), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(value))(x), expected[0], rtol=1e-5, atol=1e-5)


def test_a_block_may_be_a_callable_without_a_hash_and_may_close_over_traced_arrays():
    params, x, stream, scale = arguments()

    @dataclasses.dataclass
    class Block:
        scale: jax.Array

        def __call__(self, p, x, stream):
            return whole(p, x, stream, self.scale, SEGMENTS)

    def value(block, x):
        return jnp.sum(jnp.sin(depth_scan(block, params, x, stream)[0]))

    assert Block.__hash__ is None
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(plain_loop(params, x, stream, scale)[0])))(x)
    unhashable = jax.grad(lambda x: value(Block(scale), x))(x)
    closure = jax.jit(lambda x, s: jax.grad(lambda x: value(lambda p, x, st: whole(p, x, st, s, SEGMENTS), x))(x))
    np.testing.assert_allclose(unhashable, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(closure(x, scale), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("block", [whole, PARTED], ids=["any block", "parted"])
def test_too_few_slots_are_refused(block):
    params, x, _, scale = arguments()
    with pytest.raises(ValueError, match="write 6 entries, but 5 of the stream's 6 slots are free"):
        depth_scan(block, params, x, start(slots=6), scale, SEGMENTS)


@pytest.mark.parametrize("block", [whole, PARTED], ids=["any block", "parted"])
@pytest.mark.parametrize("slots", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_traced_overflow_loses_nothing_and_has_right_gradients(block, slots):
    stream = start(slots=slots, filled=min(slots, 1))

    def value(loop, params, x, length):
        return run(loop, params, x, DepthStream(stream.key, stream.value, length), jnp.float32(0.9))

    def loop(params, x, stream, scale):
        return depth_scan(block, params, x, stream, scale, SEGMENTS)

    params, x, _, _ = arguments()
    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(value, way), argnums=(0, 1)), compiler_options=QUICK)(
            params, x, jnp.int32(stream.length)
        )
        for way in (loop, plain_loop)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


def test_a_traced_overflow_shows_in_the_length_and_under_checkify():
    params, x, stream, scale = arguments()

    def run(key, value, length, check):
        after = depth_scan(PARTED, params, x, DepthStream(key, value, length), scale, SEGMENTS, check=check)[1]
        return after.length

    short = start(slots=5)
    assert jax.jit(run, static_argnums=3)(short.key, short.value, short.length, False) == 2 * L + 1
    checked = checkify.checkify(jax.jit(run, static_argnums=3))
    error, _ = checked(short.key, short.value, short.length, True)
    with pytest.raises(checkify.JaxRuntimeError, match="7 entries, but the stream has 5 slots: some are lost"):
        error.throw()
    error, _ = checked(stream.key, stream.value, stream.length, True)
    error.throw()  # nothing to report


def rewrites_the_first_slot(p, x, stream, scale, segment_ids):
    x, stream = whole(p, x, stream, scale, segment_ids)
    return x, dataclasses.replace(stream, key=stream.key.at[:, :, 0].multiply(1.5))


def test_what_a_block_may_do_with_the_stream_is_checked():
    params, x, stream, scale = arguments()

    def call(block, **options):
        return depth_scan(block, params, x, stream, scale, SEGMENTS, **options)

    def shorter(p, x, stream, scale, segment_ids):
        return x, dataclasses.replace(stream, length=np.int32(0))

    def other_dtype(p, x, stream, scale, segment_ids):
        return x, dataclasses.replace(stream, key=stream.key.astype(jnp.bfloat16))

    with pytest.raises(ValueError, match="returned a stream of length 0, expected at least its input's 1"):
        call(shorter)
    with pytest.raises(ValueError, match=r"the block returned a stream with .* expected its input's"):
        call(other_dtype)
    with pytest.raises(ValueError, match=r"returned a tuple as stream, expected DepthStream"):
        call(lambda p, x, stream, *shared: (x, (stream.key, stream.value)))
    with pytest.raises(
        ValueError, match=r"the block returned ArrayImpl|the block returned .*Tracer, expected \(x, stream\)"
    ):
        call(lambda p, x, stream, *shared: x)
    for block, message in ((rewrites_the_first_slot, "layer 0 changed a slot that was filled before"), (whole, None)):
        error, _ = checkify.checkify(jax.jit(functools.partial(call, block, check=True)))()
        if message is None:
            error.throw()
        else:
            with pytest.raises(checkify.JaxRuntimeError, match=message):
                error.throw()


def test_numbers_may_be_shared_and_what_is_no_array_is_named():
    params, x, stream, _ = arguments()

    def value(loop, x, scale):
        return run(loop, params, x, stream, scale)

    def loop(params, x, stream, scale):
        return depth_scan(PARTED, params, x, stream, scale, SEGMENTS)

    got = jax.grad(functools.partial(value, loop))(x, 0.9)
    np.testing.assert_allclose(got, jax.grad(functools.partial(value, loop))(x, jnp.float32(0.9)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"depth_scan: shared\[0\]='0.9': expected an array or a number"):
        depth_scan(PARTED, params, x, stream, "0.9", SEGMENTS)


@pytest.mark.parametrize("unroll", [False, True])
def test_auxiliary_outputs_are_stacked_over_the_layers(unroll):
    params, x, stream, scale = arguments()

    def block(p, x, stream, scale):
        x, stream = whole(p, x, stream, scale, SEGMENTS)
        return x, stream, {"mean": jnp.mean(x), "last": x[:, -1]}

    def plain(params, x):
        s, found = stream, []
        for i in range(L):
            x, s, aux = block(jax.tree.map(lambda leaf, i=i: leaf[i], params), x, s, scale)
            found.append(aux)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def looped(params, x):
        x, after, aux = depth_scan(block, params, x, stream, scale, unroll=unroll)
        assert after.length == 2 * L + 1
        return x, aux

    def objective(way, params, x):
        x, aux = way(params, x)
        layers = jnp.arange(1.0, L + 1)
        return jnp.sum(jnp.sin(x)) + jnp.sum(layers * aux["mean"]) + jnp.sum(jnp.cos(aux["last"]).T * layers)

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(objective, way), argnums=(0, 1)), compiler_options=QUICK)(
            params, x
        )
        for way in (looped, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


def test_bad_arguments_are_named():
    params, x, stream, scale = arguments()
    with pytest.raises(ValueError, match="remat='some': expected one of"):
        depth_scan(whole, params, x, stream, scale, SEGMENTS, remat="some")
    with pytest.raises(ValueError, match="gradient_group=0: expected None or a number of layers, at least 1"):
        depth_scan(PARTED, params, x, stream, scale, SEGMENTS, gradient_group=0)
    with pytest.raises(ValueError, match="one leading axis of layers"):
        depth_scan(whole, params | {"o": params["o"][:2]}, x, stream, scale, SEGMENTS)
    with pytest.raises(ValueError, match="expected its input's"):
        depth_scan(lambda p, x, s: (x[:, :-1], s), params, x, stream)


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [4, 36])
def test_a_bfloat16_gradient_buffer_adds_little_error(num_layers):
    """36 accumulations in the compute dtype, against the same in float32 and all in float32.

    Measured (CPU, width 128, 70 slots, 36 layers): value projection 7.2 % relative error in bfloat16 compute with a
    bfloat16 buffer, 7.1 % with a float32 one; the buffer's own share is the smaller part.
    """
    config = TransformerConfig(
        vocab_size=64, num_layers=num_layers, width=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=64,
        dtype="float32", attention_implementation="xla", initializer_range=0.05,
    )  # fmt: skip
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, 64)

    def gradient(**fields):
        config_ = dataclasses.replace(config, **fields)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config_, rngs=nnx.Rngs(0))))

        def loss(params):
            logits = nnx.merge(graph, params)(tokens[:, :-1])
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

        return nnx.to_pure_dict(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))["layers"]

    exact = gradient()
    narrow = gradient(dtype="bfloat16")
    wide = gradient(dtype="bfloat16", depth_gradient_dtype="float32")
    grouped = gradient(dtype="bfloat16", depth_gradient_group=4)  # rounded less often
    for path in (("attention", "key"), ("attention", "value"), ("depth", "ffn_kv")):
        e, n, w, g = (tree[path[0]][path[1]]["kernel"] for tree in (exact, narrow, wide, grouped))
        narrow_error, wide_error, grouped_error = (
            float(jnp.linalg.norm(x - e) / jnp.linalg.norm(e)) for x in (n, w, g)
        )
        report = (
            f"{'.'.join(path)}: error {narrow_error:.4f} with a bfloat16 buffer, {grouped_error:.4f} with layers in "
            f"groups of 4, {wide_error:.4f} with a float32 one"
        )
        print(report)
        assert not np.array_equal(n, w), "the buffer's dtype made no difference at all"
        assert max(narrow_error, grouped_error) < 1.1 * wide_error, report


@pytest.mark.gpu
@pytest.mark.parametrize(("layer_loop", "remat"), [("scan", "attention"), ("unroll", "none"), ("unroll", "full")])
def test_groups_of_layers_on_the_chip(layer_loop, remat):
    """Of packed rows, 19 layers and 38 slots: with the kernels, no further from float32 than layers alone are."""
    config = TransformerConfig(
        vocab_size=64, num_layers=20, width=128, num_heads=4, num_kv_heads=2, head_dim=64, ffn_width=128,
        initializer_range=0.05, dtype="bfloat16", layer_loop=layer_loop, remat=remat,
    )  # fmt: skip
    params = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(0), (2, 301), 0, 64)
    segments = jnp.broadcast_to(jnp.arange(300) // 170, (2, 300)).astype(jnp.int32)

    def gradient(**fields):
        config_ = dataclasses.replace(config, **fields)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config_, rngs=nnx.Rngs(0))))

        def loss(params):
            logits = nnx.merge(graph, params)(tokens[:, :-1], segments)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return nnx.to_pure_dict(compiled(params))["layers"], compiled.as_text()

    exact, _ = gradient(dtype="float32", layer_loop="scan")  # what it is compared with compiles in a moment
    alone, text = gradient(depth_gradient_group=1, layer_loop="scan")
    grouped, grouped_text = gradient()
    assert "_deferred_T" not in text and "_deferred_T" in grouped_text and "_slots_T" in grouped_text
    for name in ("query", "key", "value"):
        e, a, g = (tree["attention"][name]["kernel"].astype(jnp.float32) for tree in (exact, alone, grouped))
        alone_error, grouped_error = (float(jnp.linalg.norm(x - e) / jnp.linalg.norm(e)) for x in (a, g))
        assert grouped_error < 1.1 * alone_error, f"{name}: {grouped_error:.4f} in groups, {alone_error:.4f} alone"


# ---- memory and compile time of a whole train step -------------------------------------------------------------------


def model_config(num_layers, **fields):
    return TransformerConfig(
        vocab_size=64, num_layers=num_layers, width=64, num_heads=4, num_kv_heads=2, head_dim=32, ffn_width=64,
        dtype="float32", attention_implementation="xla", **fields,
    )  # fmt: skip


def train_step(config, plain=False):
    """(jitted step, its arguments as shapes): gradient of the mean cross-entropy and a plain descent."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(params, tokens):
        if plain:
            logits = plain_model.logits(params, config, tokens)
        else:
            logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 0])

    def step(params, tokens):
        gradient = jax.grad(loss)(params, tokens)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    return jax.jit(step, donate_argnums=0), (params, tokens)


def temporary_bytes(num_layers, plain=False, **fields):
    step, shapes = train_step(model_config(num_layers, **fields), plain)
    return step.lower(*shapes).compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_depth():
    ours = {layers: temporary_bytes(layers) for layers in (16, 32)}
    assert ours[32] <= 2.2 * ours[16], f"temporary bytes: {ours}"


@pytest.mark.slow
def test_memory_grows_linearly_up_to_64_layers_and_plain_autodiffs_does_not():
    ours = {layers: temporary_bytes(layers) for layers in (16, 32, 64)}
    plain = {layers: temporary_bytes(layers, plain=True) for layers in (10, 20)}
    report = f"temporary bytes: ours {ours}, plain list of KV {plain}"
    print(report)
    assert ours[32] <= 2.2 * ours[16], report
    assert ours[64] <= 2.2 * ours[32], report
    assert plain[20] > 2.5 * plain[10], report


@pytest.mark.slow
def test_the_unrolled_loop_keeps_what_the_loop_keeps():
    """Up to what a CPU's scheduler spends to run layers side by side. Were the backward's recomputation shared with the
    forward, it would be three times as much and grow with the layers' whole insides.
    """
    loop, unrolled = (temporary_bytes(8, remat="attention", layer_loop=name) for name in ("scan", "unroll"))
    assert unrolled <= 1.5 * loop, f"temporary bytes: loop {loop}, unrolled {unrolled}"


@pytest.mark.slow
def test_compile_time_does_not_follow_depth(no_shared_programs):
    def seconds(num_layers):
        """Of the processor, whatever else the machine does; a program that was compiled before would take none."""
        step, shapes = train_step(model_config(num_layers))
        times = []
        for _ in range(2):
            jax.clear_caches()
            lowered = step.lower(*shapes)
            begin = time.process_time()
            lowered.compile()
            times.append(time.process_time() - begin)
        return min(times)

    twelve, forty_eight = seconds(12), seconds(48)
    assert twelve > 0.1, f"12 layers compile in {twelve:.3f} s: nothing was compiled"
    assert forty_eight <= 1.5 * twelve, f"12 layers compile in {twelve:.2f} s, 48 in {forty_eight:.2f} s"
