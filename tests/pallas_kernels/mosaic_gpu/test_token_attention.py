"""A decode step's attention from raw projections on: the kernels, interpreted and on the chip, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.selection import quick_of
from support.token_attention_oracle import EPSILON, check_written, exact, operands, output_bound, wide

from pallas_kernels import dispatch
from pallas_kernels import token_attention as choice
from pallas_kernels.mosaic_gpu import token_attention as kernel
from pallas_kernels.mosaic_gpu import warpgroup

ON_GPU = jax.default_backend() == "gpu"
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


def check(case, dtype=jnp.bfloat16):
    arrays = operands(*case, kernel.padded_slots(case[3]), dtype)
    run = jax.jit(lambda *a: kernel.token_attention(*a, epsilon=EPSILON))
    out, cache, slots = run(*arrays)
    expected, *written = exact(*arrays)
    error, bound = np.abs(wide(out) - expected), output_bound(expected, dtype)
    worst = np.argmax(error - bound)
    assert error[worst] <= bound[worst], (worst, out[worst], expected[worst])
    assert (slots is None) == (arrays[2] is None)
    check_written((*cache, *(slots or ())), (*written[0], *(written[1] or ())), dtype)


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
    shapes = jax.eval_shape(lambda: operands(*LARGE[case], kernel.padded_slots(LARGE[case][3])))
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
