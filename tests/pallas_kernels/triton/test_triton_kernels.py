"""The kernels' arithmetic: on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1, a step of .ci/run).

Everything is compared with the reference in float32 on the same narrow inputs. A program of a kernel takes the
interpreter about 20 ms, hence few tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerances import relative_error

from pallas_kernels import block, moda_attention
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.parts import Part, delta
from pallas_kernels.triton import call as calls

pytestmark = [
    pytest.mark.skipif(not calls.can_run(), reason="needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment"),
    *([pytest.mark.gpu] if jax.default_backend() == "gpu" else []),
]
# Of bfloat16's rounding: out and lse's error, and a gradient's, relative L2. Measured: up to 1.6e-3 and 3.5e-3.
LIMITS = {"bfloat16": (4e-3, 8e-3), "float16": (5e-4, 1e-3)}
NAMES = ("out", "lse", "query", "key", "value", "depth_key", "depth_value")


def _draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(jnp.dtype(dtype))


def _call(
    batch=1, tokens=5, keys=None, kv_heads=2, group=2, head_dim=16, slots=0, window=None, mask=None, scale=0.3,
    dtype="bfloat16",
) -> Call:  # fmt: skip
    """A call; slots outside of the window hold NaN. `keys=0`: no sequence part."""
    keys = tokens if keys is None else keys
    key = value = depth = None
    if keys:
        key, value = (_draw(batch, keys, kv_heads, head_dim, seed=i, dtype=dtype) for i in (1, 2))
    if slots:
        depth = [_draw(batch, tokens, slots, kv_heads, head_dim, seed=i, dtype=dtype) for i in (3, 4)]
        start, length = (0, slots) if window is None else window
        for array in depth:
            array[:, :, :start] = array[:, :, length:] = np.nan
        depth = DepthKV(*depth, *(() if window is None else map(jnp.int32, window)))
    query = _draw(batch, tokens, kv_heads * group, head_dim, dtype=dtype)
    return Call(query, key, value, Mask(True) if mask is None else mask, depth, scale)


def _upstream(call: Call, part: Part) -> Upstream:
    """Random gradients of out and lse, as the whole softmax's."""
    dout = _draw(*call.query.shape, seed=5, dtype=call.query.dtype.name)
    return Upstream(dout, part.lse, delta(dout, part, _draw(*part.lse.shape, seed=6, dtype="float32")))


@functools.partial(jax.jit, static_argnames="implementation")
def _both(call: Call, upstream: Upstream, buffers: tuple | None, implementation: str) -> dict[str, jax.Array]:
    """out, lse, rest and the gradients."""
    part = block.forward(call, with_rest=True, implementation=implementation)
    gradients = block.backward(call, upstream, buffers=buffers, implementation=implementation)
    return part._asdict() | gradients._asdict()


def _compare(call: Call, buffers: tuple | None = None) -> dict[str, np.ndarray]:
    """Asserts that "triton" is as near to the reference as its dtype allows; returns what it gave."""
    wide = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == call.query.dtype else x, call)
    upstream = _upstream(call, block.forward(wide, implementation="reference"))
    expected = _both(wide, Upstream(upstream.dout.astype(np.float32), *upstream[1:]), buffers, "reference")
    actual = {name: x for name, x in _both(call, upstream, buffers, "triton").items() if x is not None}
    output_limit, gradient_limit = LIMITS[call.query.dtype.name]
    for name in NAMES:
        if expected[name] is None:
            assert name not in actual
            continue
        came, wanted = np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64)
        if buffers is not None and name.startswith("depth"):
            before = np.asarray(buffers[name == "depth_value"], np.float64)
            assert actual[name].dtype == buffers[0].dtype
            came, wanted = (np.nan_to_num(x - before) for x in (came, wanted))
        error = relative_error(came, wanted)
        assert error < (output_limit if name in ("out", "lse") else gradient_limit), (name, error)
    wide_out = np.asarray(actual["out"], np.float64) + np.asarray(actual["rest"], np.float64)
    assert relative_error(wide_out, expected["out"]) < output_limit
    return {name: np.asarray(x) for name, x in actual.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [16, 18, 80, 256])
def test_every_head_dim(head_dim, dtype):
    _compare(_call(head_dim=head_dim, slots=3, dtype=dtype))


@pytest.mark.parametrize("group", [1, 3, 17, 40, 70])
def test_every_group_of_query_heads(group):
    """Also more heads than a tile has rows: in the forward (64) and in the backward (32)."""
    _compare(_call(tokens=2, kv_heads=1, group=group, slots=18))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1.7])
def test_every_scale(scale):
    _compare(_call(slots=3, scale=scale))


@pytest.mark.parametrize("tokens", [1, 63, 64, 130, 260])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_blocks_of_the_sequence(tokens, causal):
    """Ragged and whole, with few tokens (all heads of a group in a tile) and with many."""
    _compare(_call(tokens=tokens, kv_heads=1, group=3, mask=Mask(causal)))


def _masks(kind: str, batch: int, tokens: int, keys: int) -> Mask:
    draw = np.random.default_rng(2)
    if kind == "cache":  # filled in part, queries at its end
        length = draw.integers(tokens, keys + 1, batch).astype(np.int32)
        return Mask(True, length[:, None] - tokens + np.arange(tokens, dtype=np.int32), key_length=length)
    if kind == "context":  # this device's queries against another's keys, packed documents
        return Mask(
            True,
            np.stack([draw.permutation(tokens) + keys - tokens for _ in range(batch)]).astype(np.int32),
            np.stack([draw.permutation(keys) for _ in range(batch)]).astype(np.int32),
            np.sort(draw.integers(1, 4, (batch, tokens)), axis=1).astype(np.int32),
            np.sort(draw.integers(0, 3, (batch, keys)), axis=1).astype(np.int32),
        )
    if kind == "documents":
        ids = np.sort(draw.integers(0, 3, (batch, keys)), axis=1).astype(np.int32)
        return Mask(True, None, None, ids[:, :tokens], ids)
    return Mask(False, key_length=np.array([0, keys - 1], np.int32))  # "empty row"


@pytest.mark.parametrize(("tokens", "keys"), [(3, 150), (70, 150), (150, 150)])
@pytest.mark.parametrize("kind", ["cache", "context", "documents", "empty row"])
def test_masks(kind, tokens, keys):
    mask = _masks(kind, 2, tokens, keys)
    call = _call(batch=2, tokens=tokens, keys=keys, kv_heads=1, group=2, mask=mask)
    if mask.key_length is not None:
        beyond = np.arange(keys) >= mask.key_length[:, None]
        call.key[beyond], call.value[beyond] = np.nan, np.nan
    actual = _compare(call)
    unseen = np.isneginf(actual["lse"])
    assert unseen.any() == (kind in ("context", "empty row"))
    assert not actual["out"][unseen].any() and not actual["query"][unseen].any()
    if mask.key_length is not None:
        assert not actual["key"][beyond].any() and not actual["value"][beyond].any()


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "depth_alone"])
@pytest.mark.parametrize("buffer_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("window", [(0, 37), (5, 37), (3, 4), (4, 4), (6, 2)])
def test_windows_of_slots(window, buffer_dtype, sequence):
    """Slots outside: no weight, no gradient, and no bit of their buffers changes. Windows of several chunks."""
    call = _call(tokens=2, slots=40, window=window, keys=None if sequence else 0)
    buffers = None
    outside = [*range(min(window)), *range(window[1], 40)] if window[0] < window[1] else list(range(40))
    if buffer_dtype is not None:
        buffers = tuple(_draw(*call.depth.key.shape, seed=i, dtype=buffer_dtype) for i in (7, 8))
        for array in buffers:
            array[:, :, outside] = np.nan
            array[:, :, outside[0]] = -0.0
    if buffer_dtype == "bfloat16":  # the sum's rounding is not the gradient's error
        call_buffers, buffers = buffers, tuple(x.astype(np.float32) for x in buffers)
        wide, upstream = _compare(call, buffers), _upstream(call, block.forward(call, implementation="triton"))
        actual = _both(call, upstream, call_buffers, "triton")
        for name in ("depth_key", "depth_value"):
            assert actual[name].dtype == jnp.bfloat16
            seen = np.asarray(actual[name], np.float32)[:, :, window[0] : window[1]]
            np.testing.assert_allclose(seen, wide[name][:, :, window[0] : window[1]], rtol=2**-7, atol=2**-5)
        buffers = call_buffers
    else:
        actual = _compare(call, buffers)
    for i, name in enumerate(("depth_key", "depth_value")):
        came = np.asarray(actual[name])[:, :, outside]
        before = np.zeros_like(came) if buffers is None else buffers[i][:, :, outside]
        assert came.tobytes() == before.tobytes()


def test_without_a_slot_seen_it_is_plain_attention_bit_for_bit():
    call = _call(tokens=3, slots=4, window=(2, 2))
    plain = Call(call.query, call.key, call.value, call.mask, None, call.scale)
    upstream = _upstream(plain, block.forward(plain, implementation="triton"))
    expected, actual = (_both(x, upstream, None, "triton") for x in (plain, call))
    for name in ("out", "lse", "rest", "query", "key", "value"):
        assert np.asarray(actual[name]).tobytes() == np.asarray(expected[name]).tobytes(), name


def test_a_query_that_sees_nothing_has_no_gradient_whatever_delta_is():
    call = _call(tokens=2, slots=2, window=(1, 1), keys=0)
    part = block.forward(call, implementation="triton")
    assert np.isneginf(np.asarray(part.lse)).all() and not np.asarray(part.out).any()
    upstream = Upstream(_draw(*call.query.shape), part.lse, np.full(part.lse.shape, np.nan, np.float32))
    gradients = block.backward(call, upstream, implementation="triton")
    assert not any(np.asarray(x).any() for x in gradients if x is not None)


@pytest.mark.parametrize("mapped", ["arrays", "query", "window"])
def test_vmap(mapped):
    """A mapped axis is folded into the batch; with a window of its own for each there is a call for each."""
    like = _call(tokens=2, slots=3, batch=2)

    def run(query, start, length, key):
        one = Call(query, key, key, Mask(True), DepthKV(like.depth.key, like.depth.value, start, length), 0.3)
        part = block.forward(one, with_rest=True, implementation="triton")
        return part, block.backward(one, _upstream(one, part), implementation="triton")

    queries = jnp.stack([_draw(*like.query.shape, seed=i) for i in (0, 9)])
    keys = jnp.stack([_draw(*like.key.shape, seed=i) for i in (1, 9)])
    lengths = jnp.int32([1, 3])
    in_axes = {"arrays": (0, None, None, 0), "query": (0, None, None, None), "window": (None, None, 0, None)}[mapped]
    arguments = [
        x if axis == 0 else x[1] for x, axis in zip((queries, lengths * 0, lengths, keys), in_axes, strict=True)
    ]
    together = jax.jit(jax.vmap(run, in_axes))(*arguments)
    for i in range(2):
        alone = run(*(x[i] if axis == 0 else x for x, axis in zip(arguments, in_axes, strict=True)))
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other[i]).tobytes()


def test_under_x64_and_strict_promotion():
    call = _call(tokens=2, slots=3, window=(1, 2), mask=_masks("documents", 1, 2, 2))

    def run(*arrays):
        return moda_attention(*arrays, segment_ids=call.mask.key_segment_ids, implementation="triton")

    arrays = call.query, call.key, call.value
    expected = run(*arrays)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        out, pullback = jax.vjp(run, *arrays)
        gradients = pullback(out)
    assert np.asarray(out).tobytes() == np.asarray(expected).tobytes()
    assert {x.dtype for x in gradients} == {jnp.dtype("bfloat16")}


def _deferring(call: Call) -> Call:
    return dataclasses.replace(call, depth=dataclasses.replace(call.depth, deferred=2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_call(dtype="float32"), "triton: dtype=float32: the tensor cores' kernels take bfloat16 or float16"),
        (_call(head_dim=17), "triton: head_dim=17: expected an even number from 16 to 256"),
        (_call(head_dim=258), "triton: head_dim=258: expected an even number from 16 to 256"),
        (_call(tokens=1, slots=513), "triton: 513 depth slots: expected at most 512"),
        (_deferring(_call(slots=3)), "triton: depth.deferred: the kernels add the gradients of all seen slots"),
    ],
    ids=["dtype", "odd", "wide", "slots", "deferred"],
)
def test_what_it_does_not_take_is_refused_before_anything_is_compiled(call, message):
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        jax.eval_shape(functools.partial(block.forward, implementation="triton"), call)


def test_an_older_card_is_refused(monkeypatch):
    monkeypatch.setattr(calls, "capability", lambda: (7, 5))
    with pytest.raises(NotImplementedError, match=r"^triton: compute capability 7.5: expected at least 8.0 \(Ampere\)"):
        block.forward(_call(), implementation="triton")
