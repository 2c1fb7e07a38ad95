"""A decode step's attention from raw projections on: the kernels, interpreted and on the chip, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import quick_of

from pallas_kernels import dispatch
from pallas_kernels import token_attention as choice
from pallas_kernels.mosaic_gpu import token_attention as kernel
from pallas_kernels.mosaic_gpu import warpgroup

ON_GPU = jax.default_backend() == "gpu"
EPSILON = 1e-6
H = kernel.HEAD_DIM
# N, K, C, slots (0: none), n, filled, whether there is an entry.
SMALL = {
    "slots and an entry": (8, 4, 256, 5, 130, 2, True),
    "first layer": (4, 4, 256, 20, 128, 0, False),
    "plain, an empty cache": (4, 4, 128, 0, 0, 0, False),
}
LARGE = {
    "last layer": (16, 8, 2176, 71, 2100, 69, True),
    "one slot": (16, 8, 2176, 71, 2175, 1, False),
    "plain": (16, 8, 2176, 0, 127, 0, False),
    "many parts": (8, 4, 128 * 40, 33, 128 * 39, 31, True),
}


def operands(N, K, C, slots, n, filled, has_entry, dtype=jnp.bfloat16):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    def scale(heads):
        return jnp.asarray(1 + 0.3 * random.normal(size=heads * H), jnp.float32)

    angle = random.normal(size=H // 2) * 3
    rotation = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    entry = (draw(2 * K * H), scale(K)) if has_entry else (None, None)
    token = kernel.Token(draw((N + 2 * K) * H), scale(N), scale(K), rotation, *entry)
    buffers = (draw(kernel.padded_slots(slots), K, H), draw(kernel.padded_slots(slots), K, H)) if slots else None
    return token, (draw(K, C, H), draw(K, C, H)), buffers, jnp.int32(n), jnp.int32(filled)


def wide(array):
    return np.asarray(array, np.float64)


def exact(token, cache, slots, n, filled):
    """The output in float64 but for keys and queries, which are rounded, and the arrays as they are then."""
    dtype, K = token.raw.dtype, cache[0].shape[0]
    N = token.query_norm.size // H
    cos, sin = (wide(x) for x in token.rotation)

    def placed(raw, scale):
        raw = wide(raw).reshape(-1, H)
        a, b = np.split(wide(scale).reshape(-1, H) * raw / np.sqrt(np.mean(raw * raw) + EPSILON), 2, axis=1)
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
        return wide(jnp.asarray(turned, jnp.float32).astype(dtype))

    query = placed(token.raw[: N * H], token.query_norm)
    own = placed(token.raw[N * H : (N + K) * H], token.key_norm), wide(token.raw[(N + K) * H :]).reshape(K, H)
    cache = [wide(x).copy() for x in cache]
    for array, new in zip(cache, own, strict=True):
        array[:, n] = new
    new = [own]
    if token.entry is not None:
        new.insert(0, (placed(token.entry[: K * H], token.entry_norm), wide(token.entry[K * H :]).reshape(K, H)))
    seen = [[x[:, :n], *(y[i][:, None] for y in new)] for i, x in enumerate(cache)]
    if slots is not None:
        slots = [wide(x).copy() for x in slots]
        for i, array in enumerate(slots):
            seen[i].append(array[:filled].swapaxes(0, 1).copy())
            for j, entry in enumerate(new):
                array[filled + j] = entry[i]
    key, value = (np.repeat(np.concatenate(x, axis=1), N // K, axis=0) for x in seen)
    logits = np.einsum("nh,nuh->nu", query, key) * H**-0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.einsum("nu,nuh->nh", weights / weights.sum(axis=1, keepdims=True), value).reshape(-1), cache, slots


def check(case, dtype=jnp.bfloat16):
    arrays = operands(*case, dtype)
    run = jax.jit(lambda *a: kernel.token_attention(*a, epsilon=EPSILON))
    out, cache, slots = run(*arrays)
    expected, *written = exact(*arrays)
    eps = float(jnp.finfo(dtype).eps)
    error = np.abs(wide(out) - expected)
    # One rounding of the output; a key or query between two numbers may have been rounded the other way.
    bound = eps * (np.abs(expected) + 0.25 * np.abs(expected).max())
    worst = np.argmax(error - bound)
    assert error[worst] <= bound[worst], (worst, out[worst], expected[worst])
    assert (slots is None) == (arrays[2] is None)
    for got, want in zip((*cache, *(slots or ())), (*written[0], *(written[1] or ())), strict=True):
        np.testing.assert_allclose(wide(got), want, rtol=eps, atol=eps / 4)
        assert np.mean(wide(got) != want) < 1e-3  # all but roundings is bit for bit


@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
@pytest.mark.parametrize("case", quick_of(SMALL, ("first layer",)))
def test_the_kernels_interpreted(case, capsys):
    check(SMALL[case])
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", SMALL | LARGE)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_kernels_on_the_chip(case, dtype):
    check((SMALL | LARGE)[case], dtype)


@pytest.mark.parametrize("case", ["last layer", "plain"])
def test_they_lower_for_hopper_and_write_in_place(case, monkeypatch):
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    shapes = jax.eval_shape(lambda: operands(*LARGE[case]))
    run = jax.jit(lambda *a: kernel.token_attention(*a, epsilon=EPSILON), donate_argnums=(1, 2))
    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "moda_token_attention_N16_K8_P17" in text and "moda_token_merge_N16_P17" in text
    assert "output_operand_aliases" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": jnp.float32}, "dtype=float32"), ({"rows": 2}, "2 rows"), ({"head_dim": 128}, "head_dim=128"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"), ({"num_heads": 6}, "num_heads=6"), ({"capacity": 100}, "100 places"),
    ],
)  # fmt: skip
def test_what_they_do_not_take_they_refuse(fields, message):
    shape = {"dtype": jnp.bfloat16, "rows": 1, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "capacity": 256}
    kernel.check_supported(**shape)
    with pytest.raises(NotImplementedError, match=message):
        kernel.check_supported(**shape | fields)


def test_they_are_chosen_on_hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    shape = dict(dtype=jnp.dtype(jnp.bfloat16), rows=1, num_heads=16, num_kv_heads=8, head_dim=64, capacity=2176)
    choice.best.cache_clear()
    assert choice.best(**shape) == "mosaic_gpu"
    assert choice.best(**shape | {"rows": 2}) == choice.best(**shape | {"num_heads": 32}) == "xla"
    choice.best.cache_clear()
