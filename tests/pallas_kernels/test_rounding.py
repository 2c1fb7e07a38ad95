"""A float32 array as a narrow one and what rounding takes from it, also where XLA may simplify conversions away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block
from pallas_kernels.operands import Call, Mask
from pallas_kernels.rounding import rounded


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float16", 22)])
def test_the_two_parts_hold_twice_the_bits(dtype, bits):
    wide = jnp.float32(np.random.default_rng(0).normal(size=1000))
    out, rest = jax.jit(lambda x: rounded(x, jnp.dtype(dtype), with_rest=True))(wide)
    assert out.dtype == rest.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(out, np.float64), np.asarray(np.asarray(wide).astype(dtype), np.float64))
    sums = np.asarray(out, np.float64) + np.asarray(rest, np.float64)
    wanted = np.asarray(wide, np.float64)
    limit = 2.0**-bits * np.abs(wanted) + (2.0**-24 if dtype == "float16" else 0.0)  # float16's smallest step
    assert np.all(np.abs(sums - wanted) <= limit)


def test_float32_and_a_caller_that_does_not_ask_get_no_rest():
    wide = jnp.ones(3)
    assert rounded(wide, jnp.dtype("float32"), with_rest=True)[1] is None
    assert rounded(wide, jnp.dtype("bfloat16"), with_rest=False)[1] is None


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_block_returns_it(implementation):
    query, key = (jnp.bfloat16(np.random.default_rng(i).normal(size=(1, 9, 2, 8))) for i in range(2))
    call = Call(query, key, key, Mask(True), scale=0.3)
    out, _, rest = block.forward(call, with_rest=True, implementation=implementation)
    exact = block.forward(jax.tree.map(lambda x: x.astype(jnp.float32), call), implementation=implementation).out
    narrow = np.abs(np.asarray(out, np.float64) - np.asarray(exact, np.float64)).max()
    wide = np.abs(np.asarray(out, np.float64) + np.asarray(rest, np.float64) - np.asarray(exact, np.float64)).max()
    assert block.forward(call, implementation=implementation).rest is None
    assert wide <= narrow
    if implementation == "reference":  # "xla" rounds its probabilities before the second product
        assert wide < narrow / 50
