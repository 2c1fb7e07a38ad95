"""What the public op promises beyond one call's numbers: equal bits, gradients under transforms, its corner cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention_oracle
from support.quick_compile import APART
from support.tolerances import assert_close

from pallas_kernels import depth_attention, moda_attention

pytestmark = pytest.mark.usefixtures("small_blocks")
IMPLEMENTATIONS = ("reference", "xla")
NAMES = (*attention_oracle.OUTPUTS, *attention_oracle.GRADIENTS)
B, T, S, K, G, H = 2, 37, 9, 2, 2, 16


@functools.cache
def _arrays(dtype: str = "float32", batch: int = B) -> tuple[np.ndarray, ...]:
    """query, key, value, depth_key, depth_value."""
    draw = np.random.default_rng(0)
    shapes = [(batch, T, K * G, H), *2 * [(batch, T, K, H)], *2 * [(batch, T, S, K, H)]]
    return tuple(draw.standard_normal(shape).astype(dtype) for shape in shapes)


def _all(length, *arrays, **options) -> dict[str, jax.Array]:
    """out, lse and the gradients of a fixed function of both."""

    def op(*arrays):
        return moda_attention(*arrays, depth_length=length, return_lse=True, **options)

    (out, lse), pullback = jax.vjp(op, *arrays)
    gradients = pullback((jnp.cos(out.astype(jnp.float32)).astype(out.dtype), jnp.sin(lse)))
    return dict(zip(NAMES, (out, lse, *gradients), strict=False))


def _assert_equal_bits(actual: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    for name, array in expected.items():
        assert np.asarray(actual[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("reference", "float32"), pytest.param("xla", "float32", marks=pytest.mark.slow), ("xla", "bfloat16")],
)
def test_without_a_filled_slot_it_is_plain_attention_bit_for_bit(implementation, dtype):
    arrays = _arrays(dtype)
    run = functools.partial(_all, implementation=implementation)
    jit = functools.partial(jax.jit, compiler_options=APART)
    plain = jit(functools.partial(run, None))(*arrays[:3])
    unfilled = [np.full_like(array, np.nan) for array in arrays[3:]]
    traced = jit(run)(jnp.int32(0), *arrays[:3], *unfilled)
    below = jit(run)(jnp.int32(-3), *arrays[:3], *unfilled)
    static = jit(functools.partial(run, 0))(*arrays[:3], *unfilled)
    no_slots = jit(functools.partial(run, None))(*arrays[:3], *(array[:, :, :0] for array in arrays[3:]))
    for result in (traced, below, static, no_slots):
        _assert_equal_bits(result, plain)
        assert not np.any(np.asarray(result["ddepth_key"])) and not np.any(np.asarray(result["ddepth_value"]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_scan_and_under_vmap_of_checkpoint(implementation):
    """Both go over an extra batch axis of the arrays and of depth_length, beyond S and 0 included."""
    lengths = np.array([0, 5, 9, 12], np.int32)
    stacked = tuple(array.reshape(4, 1, *array.shape[1:]) for array in _arrays(batch=4))
    run = functools.partial(_all, implementation=implementation)

    @jax.jit
    def scanned(lengths, *stacked):
        return jax.lax.scan(lambda _, x: (None, run(*x)), None, (lengths, *stacked))[1]

    @jax.jit
    @jax.vmap
    def checkpointed(length, *arrays):
        @jax.checkpoint
        def objective(*arrays):
            out, lse = moda_attention(*arrays, depth_length=length, implementation=implementation, return_lse=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(-jnp.cos(lse)), (out, lse)

        gradients, outputs = jax.grad(objective, argnums=range(5), has_aux=True)(*arrays)
        return dict(zip(NAMES, (*outputs, *gradients), strict=True))

    results = []
    for length, *arrays in zip(lengths, *stacked, strict=True):
        options = {"depth_length": min(length, S), "scale": H**-0.5, "causal": True}
        forward = attention_oracle.attention(*arrays, **options)
        output_gradients = {"dout": np.cos(forward["out"]), "dlse": np.sin(forward["lse"])}
        results.append(attention_oracle.attention(*arrays, **options, **output_gradients))
    expected = {name: np.stack([result[name] for result in results]) for name in NAMES}
    assert_close(scanned(lengths, *stacked), expected, jnp.float32)
    assert_close(checkpointed(lengths, *stacked), expected, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unused_outputs_and_inputs_without_gradient(implementation):
    """out alone, lse alone, both; and a gradient of two arguments is the same as among all five."""
    arrays = _arrays()
    op = functools.partial(moda_attention, depth_length=6, implementation=implementation, return_lse=True)
    objectives = {
        "out": lambda *a: jnp.sum(jnp.sin(op(*a)[0])),
        "lse": lambda *a: jnp.sum(jnp.cos(op(*a)[1])),
        "both": lambda *a: jnp.sum(jnp.sin(op(*a)[0])) + jnp.sum(jnp.cos(op(*a)[1])),
    }

    @jax.jit
    def run(*arrays):
        every = {name: jax.grad(objective, argnums=range(5))(*arrays) for name, objective in objectives.items()}
        return every, jax.grad(objectives["both"], argnums=(0, 4))(*arrays)

    every, some = run(*arrays)
    names = attention_oracle.GRADIENTS
    total = {
        name: np.asarray(out, np.float64) + np.asarray(lse, np.float64)
        for name, out, lse in zip(names, every["out"], every["lse"], strict=True)
    }
    assert_close(dict(zip(names, every["both"], strict=True)), total, jnp.float32)
    assert_close({"dquery": some[0], "ddepth_value": some[1]}, total, jnp.float32)


def test_under_shard_map_with_checks():
    """The loops' carries vary over the mesh as their results do."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    run = functools.partial(_all, implementation="xla")
    in_specs = (jax.sharding.PartitionSpec(), *5 * [rows])
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=rows))
    expected = {name: np.asarray(x, np.float64) for name, x in jax.jit(run)(jnp.int32(4), *_arrays()).items()}
    assert_close(sharded(jnp.int32(4), *_arrays()), expected, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_depth_attention_matches_the_oracle(implementation):
    query, key, value, depth_key, depth_value = _arrays()
    dout, dlse = np.cos(query), np.sin(query[..., 0])
    expected = attention_oracle.attention(
        query, key[:, :0], value[:, :0], depth_key, depth_value, 5, scale=0.4, causal=False, dout=dout, dlse=dlse
    )

    @jax.jit
    def run(length, *arrays):
        results, pullback = jax.vjp(
            lambda *a: depth_attention(
                *a, depth_length=length, scale=0.4, implementation=implementation, return_lse=True
            ),
            *arrays,
        )
        return *results, *pullback((dout, dlse))

    names = ("out", "lse", "dquery", "ddepth_key", "ddepth_value")
    unfilled = [
        np.where(np.arange(S)[:, None, None] < 5, array, np.float32(np.nan)) for array in (depth_key, depth_value)
    ]
    actual = dict(zip(names, run(jnp.int32(5), query, *unfilled), strict=True))
    assert_close(actual, expected, jnp.float32)
    assert not np.any(np.asarray(actual["ddepth_key"])[:, :, 5:])

    for length, arrays in ((0, (query, *unfilled)), (None, (query, depth_key[:, :, :0], depth_value[:, :, :0]))):
        length = None if length is None else jnp.int32(length)
        out, lse, *gradients = run(length, *arrays)
        assert not np.any(np.asarray(out)) and np.all(np.isneginf(np.asarray(lse)))
        assert all(not np.any(np.asarray(gradient)) for gradient in gradients)


def test_segments_compare_for_equality_only_and_do_not_touch_the_depth_part():
    arrays, ids = _arrays(), jnp.asarray(np.repeat([[5, 0, 5], [-1, -2, -1]], [10, 10, 17], axis=1), jnp.int32)
    expected = attention_oracle.attention(
        *arrays, scale=H**-0.5, causal=False, query_segment_ids=ids, key_segment_ids=ids
    )
    for implementation in IMPLEMENTATIONS:
        out, lse = moda_attention(
            *arrays, causal=False, segment_ids=ids, implementation=implementation, return_lse=True
        )
        assert_close({"out": out, "lse": lse}, expected, jnp.float32)


def test_eager_calls_compile_once(caplog):
    """Also for another depth_length: it is traced even when it is an int."""
    query, key, value, depth_key, depth_value = _arrays()

    def call(length):
        def objective(*arrays):
            return moda_attention(*arrays, key, value, depth_key, depth_value, depth_length=length).sum()

        return moda_attention(query, key, value, depth_key, depth_value, depth_length=length), jax.grad(objective)(
            query
        )

    call(3)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        call(4)
        assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
        call(None)
        assert [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_reference_can_be_differentiated_twice():
    arrays = [array[:1, :3] for array in _arrays()]
    hessian = jax.jit(jax.hessian(lambda q: jnp.sum(moda_attention(q, *arrays[1:], implementation="reference") ** 2)))
    assert np.all(np.isfinite(np.asarray(hessian(arrays[0]))))
