"""A decode step's attention of many rows: the kernel, interpreted and on the chip, against float64 row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import quick_of
from support.token_attention_oracle import EPSILON, H, check_written, exact, operands, output_bound, wide

from pallas_kernels import dispatch
from pallas_kernels import token_attention as choice
from pallas_kernels.mosaic_gpu import token_rows as kernel
from pallas_kernels.mosaic_gpu import warpgroup

ON_GPU = jax.default_backend() == "gpu"
# B, P, (N, K, C, slots (0: none), n, filled, whether there is an entry), outputs of the product before the entry's.
SMALL = {
    "first layer": (1, 1, (4, 4, 128, 20, 64, 0, False), 0),
    "more blocks than stages": (1, 1, (4, 4, 384, 40, 330, 33, True), 0),
    "groups and parts": (2, 2, (8, 4, 256, 5, 130, 2, True), 512),
    "plain, an empty cache": (2, 1, (4, 4, 128, 0, 0, 0, False), 0),
    "fewer blocks than parts": (2, 3, (4, 4, 384, 5, 65, 1, False), 0),
}
LARGE = {
    "last layer": (64, None, (16, 8, 2176, 71, 2100, 69, True), 8192),
    "one slot": (64, None, (16, 8, 2176, 71, 2175, 1, False), 0),
    "plain": (64, None, (16, 8, 2176, 0, 127, 0, False), 0),
    "more rows than run at a time": (97, None, (16, 8, 1024, 71, 1000, 70, True), 0),
    "one row in many parts": (1, None, (8, 4, 128 * 40, 33, 128 * 39, 31, True), 0),
}


def rows_of(batch, parts, case, before, dtype=jnp.bfloat16):
    """Arguments of the kernel; a row's are those that `one_row` gives back."""
    del parts
    N, K, C, slots, _, _, has_entry = case
    shape = kernel.slots_shape(batch, slots, K, H)
    token, _, _, length, filled = operands(*case, shape[2], dtype)
    keys = iter(jax.random.split(jax.random.key(1), 6))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    entry = draw(batch, before + 2 * K * H) if has_entry else None
    token = token._replace(raw=draw(batch, (N + 2 * K) * H), entry=entry)
    buffers = (draw(*shape), draw(*shape)) if slots else None
    return token, (draw(batch, K, C, H), draw(batch, K, C, H)), buffers, length, filled


def one_row(arrays, row):
    """The same as the oracle takes it."""
    token, cache, slots, n, filled = arrays
    entry = token.entry
    if entry is not None:
        entry = entry[row, entry.shape[1] - 2 * cache[0].shape[1] * H :]
    token = token._replace(raw=token.raw[row], entry=entry)
    slots = None if slots is None else tuple(x[row].swapaxes(0, 1) for x in slots)
    return token, tuple(x[row] for x in cache), slots, n, filled


def check(case, dtype=jnp.bfloat16, rows=None):
    arrays = rows_of(*case, dtype)
    out, cache, slots = jax.jit(lambda *a: kernel.token_attention(*a, epsilon=EPSILON, parts=case[1]))(*arrays)
    assert (slots is None) == (arrays[2] is None)
    for row in rows or range(case[0]):
        expected, *written = exact(*one_row(arrays, row))
        error, bound = np.abs(wide(out[row]) - expected), output_bound(expected, dtype)
        worst = np.argmax(error - bound)
        assert error[worst] <= bound[worst], (row, worst, out[row, worst], expected[worst])
        found = (*(x[row] for x in cache), *(x[row].swapaxes(0, 1) for x in slots or ()))
        check_written(found, (*written[0], *(written[1] or ())), dtype)


@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
@pytest.mark.parametrize("case", quick_of(SMALL, ("first layer",)))
def test_the_kernel_interpreted(case, capsys):
    check(SMALL[case])
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, jnp.bfloat16) for case in SMALL | LARGE), *((case, jnp.float16) for case in SMALL)]
)
def test_the_kernel_on_the_chip(case, dtype):
    case = (SMALL | LARGE)[case]
    check(case, dtype, None if case[0] < 3 else (0, 1, case[0] // 2, case[0] - 1))


@pytest.mark.parametrize(
    ("batch", "case", "parts"), [(64, "last layer", 1), pytest.param(32, "plain", 2, marks=pytest.mark.slow)]
)  # fmt: skip
def test_it_lowers_for_hopper_and_writes_in_place(batch, case, parts, monkeypatch):
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    shapes = jax.eval_shape(lambda: rows_of(batch, *LARGE[case][1:]))
    run = jax.jit(lambda *a: kernel.token_attention(*a, epsilon=EPSILON), donate_argnums=(1, 2))
    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert f"moda_token_rows_B{batch}_N16_K8_P{parts}" in text and "output_operand_aliases" in text
    assert (f"moda_token_rows_merge_B{batch}_N16_P{parts}" in text) == (parts > 1)


@pytest.mark.parametrize(
    ("rows", "capacity", "parts"),
    [(64, 2176, 1), (66, 2176, 1), (32, 2176, 2), (96, 2176, 2), (1, 2176, 17), (1, 128, 1)],
)  # fmt: skip
def test_parts_fill_the_multiprocessors(rows, capacity, parts):
    assert kernel.num_parts(8 * rows, capacity, 132) == parts


def test_as_many_programs_as_it_counts_on_share_a_multiprocessor():
    scratch = kernel.scratch(jnp.bfloat16, 2, True)
    bytes_of_program = warpgroup.shared_bytes(scratch) + kernel.REDUCTION_BYTES + 1024  # what CUDA takes for itself
    assert kernel.PROGRAMS_OF_MULTIPROCESSOR * bytes_of_program <= 228 * 1024


def test_what_it_does_not_take_it_refuses():
    shape = {"dtype": jnp.bfloat16, "rows": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "capacity": 256}
    kernel.check_supported(**shape)
    with pytest.raises(NotImplementedError, match="head_dim=128"):
        kernel.check_supported(**shape | {"head_dim": 128})
    with pytest.raises(NotImplementedError, match="100 places"):
        kernel.check_supported(**shape | {"capacity": 100})


def test_nobody_gets_it_who_does_not_ask(monkeypatch):
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    shape = dict(dtype=jnp.dtype(jnp.bfloat16), rows=64, num_heads=16, num_kv_heads=8, head_dim=64, capacity=2176)
    choice.best.cache_clear()
    assert choice.best(**shape) == "xla"
    choice.check_supported(**shape)
    monkeypatch.setattr(choice, "MOST_ROWS", 64)
    choice.best.cache_clear()
    assert choice.best(**shape) == "mosaic_gpu"
    choice.best.cache_clear()
