"""JAX's own modes, which a user may have on for his own code: the op, the layer and a training run go through each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny_run import tiny_config, write_corpus

from moda_jax import DepthStream, MoDAAttention, depth_scan
from moda_jax.training.program import Program, resolve
from moda_jax.training.trainer import TrainingRun
from pallas_kernels import depth_attention, moda_attention
from pallas_kernels.mosaic_gpu import warpgroup
from pallas_kernels.norm import rms_norm_backward

MODES = {
    "x64": {"jax_enable_x64": True},
    "rank_promotion": {"jax_numpy_rank_promotion": "raise"},
    "dtype_promotion": {"jax_numpy_dtype_promotion": "strict"},
    "debug_nans": {"jax_debug_nans": True},
    "debug_infs": {"jax_debug_infs": True},
    "tracer_leaks": {"jax_check_tracer_leaks": True},
}
RUNNING = {"jax_enable_x64", "jax_debug_nans", "jax_debug_infs"}  # in the others it is tracing that fails
# What takes long runs in x64, and in all the others at once.
TOGETHER = {
    "x64": MODES["x64"],
    "others": {name: value for mode, flags in MODES.items() if mode != "x64" for name, value in flags.items()},
}
B, T, S, N, K, H, D, L = 2, 9, 3, 4, 2, 8, 16, 2


@pytest.fixture
def mode(request):
    """Switches the flags of a mode on, for all threads, and back. Whether the mode matters beyond tracing."""
    before = {name: getattr(jax.config, name) for name in request.param}
    for name, value in request.param.items():
        jax.config.update(name, value)
    yield not RUNNING.isdisjoint(request.param)
    for name, value in before.items():
        jax.config.update(name, value)


each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES, indirect=True)


def _normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _assert_finite(tree, like):
    """And of the dtypes of `like`; abstract values have nothing but a dtype."""
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert leaf.dtype == other.dtype
        assert isinstance(leaf, jax.ShapeDtypeStruct) or np.isfinite(np.asarray(leaf, np.float64)).all()


@each_mode
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_op(mode, implementation):
    """With every optional argument, in one program."""
    arrays = [_normal(i, B, T, *shape) for i, shape in enumerate([(N, H), (K, H), (K, H), (S, K, H), (S, K, H)])]
    ids, length = jnp.asarray([[1] * 4 + [2] * 5] * B, jnp.int32), jnp.asarray([5, 9], jnp.int32)
    place = jnp.asarray([[3, 4], [0, 8]], jnp.int32)

    @functools.partial(jax.grad, argnums=range(5))
    def gradient(query, key, value, depth_key, depth_value, depth_length):
        options = {"depth_length": depth_length, "implementation": implementation, "return_lse": True}
        depth = depth_key, depth_value
        results = [
            moda_attention(
                query[:, :2], key, value, *(x[:, :2] for x in depth),
                segment_ids=ids, query_positions=place, key_length=length, **options,
            ),
            depth_attention(query, *depth, **options),
        ]  # fmt: skip
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(results))

    run = jax.jit(gradient) if mode else functools.partial(jax.eval_shape, gradient)
    _assert_finite(run(*arrays, jnp.asarray(2, jnp.int32)), arrays)


def _stack():
    """(block of one layer's params, params of L layers, x)."""
    layer = MoDAAttention(D, N, K, H, ffn_kv=True, implementation="xla", dtype="float32", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def block(params, x, stream):
        layer = nnx.merge(graph, params)
        y, stream = layer(x, stream)
        return x + y, layer.write_ffn(x, stream)

    return block, jax.tree.map(lambda leaf: jnp.stack([leaf] * L), params), _normal(0, B, T, D)


def _scanned(block, params, x, stream):
    """A user's own loop."""
    stream = DepthStream(stream.key, stream.value, jnp.asarray(0, jnp.int32))
    step = jax.checkpoint(block)
    return jax.lax.scan(lambda carry, params: (step(params, *carry), None), (x, stream), params)[0]


def _gradient(block, loops):
    def loss(params, x):
        stream = DepthStream.empty(B, T, 2 * L, K, H, "float32")
        return sum(jnp.sum(jnp.square(loop(block, params, x, stream)[0])) for loop in loops)

    return jax.grad(loss, argnums=(0, 1))


@pytest.mark.parametrize(
    "mode",
    [pytest.param(MODES[name], marks=() if name == "x64" else pytest.mark.slow) for name in MODES],
    ids=MODES, indirect=True,
)  # fmt: skip
def test_the_layer_in_a_remat_scan_and_in_our_loop(mode):
    block, *arguments = _stack()
    gradient = _gradient(block, [_scanned, depth_scan])
    run = jax.jit(gradient) if mode else functools.partial(jax.eval_shape, gradient)
    _assert_finite(run(*arguments), arguments)


@pytest.mark.parametrize("mode", [MODES["debug_nans"], MODES["debug_infs"]], ids=["nans", "infs"], indirect=True)
def test_the_layer_in_a_remat_scan_outside_of_jit(mode):
    """What partial evaluation keeps for the backward is then an output, which JAX looks at."""
    block, *arguments = _stack()
    _assert_finite(_gradient(block, [_scanned])(*arguments), arguments)


@pytest.mark.parametrize(
    "mode", [MODES["x64"], MODES["rank_promotion"] | MODES["dtype_promotion"]], ids=["x64", "promotion"], indirect=True
)
def test_a_training_step_is_traced(mode, tmp_path):
    """Which a run does before it begins, with its evaluation's."""
    config = tiny_config(write_corpus(tmp_path / "corpus", files=6), tmp_path / "cache")
    state, metrics = Program(resolve(config)).trace_train_step().out_info
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, metrics.loss))} == {np.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", TOGETHER.values(), ids=TOGETHER, indirect=True)
def test_a_training_run(mode, tmp_path):
    """Two steps, an evaluation, a sample and a checkpoint."""
    config = tiny_config(
        write_corpus(tmp_path / "corpus", files=6), tmp_path / "cache",
        train={"num_steps": 2, "batch_size": 2, "sample_prompt": "def ", "sample_tokens": 2},
        eval={"interval_steps": 2, "num_batches": 1}, checkpoint={"interval_steps": 2}, optimizer={"warmup_steps": 1},
    )  # fmt: skip
    result = TrainingRun(config, tmp_path / "run").train()
    assert result.step == 2 and np.isfinite(result.validation_loss)


@pytest.mark.parametrize(
    "mode",
    [MODES["x64"], MODES["rank_promotion"] | MODES["dtype_promotion"]],
    ids=["x64", "promotion"],  # the check for leaks finds JAX's own: every kernel's jaxpr holds its tracers
    indirect=True,
)
@pytest.mark.parametrize("lower", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["trace", "lower"])
def test_the_gpu_kernels(mode, lower, monkeypatch):
    """Attention with every mask, forward and backward, and the norm's backward: traced, and lowered for CUDA."""
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)

    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = functools.partial(spec, B, 64)
    arrays = tokens(N, 64), tokens(K, 64), tokens(K, 64), tokens(S, K, 64), tokens(S, K, 64)
    integers = [spec(*shape, dtype=jnp.int32) for shape in ((), (B, 64), (B,), (B, 64))]

    @functools.partial(jax.grad, argnums=range(5))
    def attention(*operands):
        names = ("depth_length", "segment_ids", "key_length", "query_positions")
        masks = dict(zip(names, operands[5:], strict=True))
        out, lse = moda_attention(*operands[:5], **masks, implementation="mosaic_gpu", return_lse=True)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    def normed(x, scale, *rotation):
        return rms_norm_backward(x, x, scale, rotation, epsilon=1e-6, implementation="mosaic_gpu")

    for function, operands in (
        (attention, (*arrays, *integers)),
        (normed, (spec(4, 8, 64), spec(8, 64), *2 * [spec(4, 32, dtype=jnp.float32)])),
    ):
        traced = jax.jit(function).trace(*operands)
        assert {leaf.dtype for leaf in jax.tree.leaves(traced.out_info)} == {jnp.dtype("bfloat16")}
        if lower:
            assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
