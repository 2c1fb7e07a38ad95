"""Head_dims that the Hopper kernels do not take as they lie: padded inside, and nothing of it is seen outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import implementation
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream


def shapes(head_dim, tokens=3, slots=4, heads=2, kv_heads=1):
    return (1, tokens, heads, head_dim), (1, tokens, kv_heads, head_dim), (1, tokens, slots, kv_heads, head_dim)


@pytest.mark.timeout(300, method="thread")
def test_buffers_come_back_as_they_lie():
    """What is added to buffers is what fresh gradients are, and slots that are not seen keep every bit."""
    seeds = jax.random.split(jax.random.key(0), 6)
    heads, _, depth = shapes(42)
    query, dout = (jax.random.normal(seed, heads, jnp.bfloat16) for seed in seeds[:2])
    slots = [jax.random.normal(seed, depth, jnp.bfloat16) for seed in seeds[2:4]]
    buffers = [jax.random.normal(seed, depth, jnp.float32) for seed in seeds[4:]]

    @jax.jit
    def run(query, dout, slots, buffers):
        call = Call(query, depth=DepthKV(*slots, length=jnp.int32(3)), scale=0.2)
        upstream = Upstream(dout, jnp.full(heads[:3], 2.0), jnp.zeros(heads[:3]))
        return implementation.backward(call, upstream), implementation.backward(call, upstream, tuple(buffers))

    fresh, added = run(query, dout, slots, buffers)
    np.testing.assert_array_equal(*(np.asarray(x.query, np.float32) for x in (fresh, added)))
    for name, before in zip(("depth_key", "depth_value"), buffers, strict=True):
        gradient, total = (np.asarray(getattr(x, name), np.float32) for x in (fresh, added))
        assert total.shape == depth
        np.testing.assert_array_equal(total[:, :, 3:], before[:, :, 3:])
        np.testing.assert_allclose(total - np.asarray(before), gradient, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("head_dim", "padded"), [(40, 40), (76, 80), (136, 136)])
def test_depth_arrays_are_copied_only_where_rows_are_no_whole_16_bytes(head_dim, padded):
    heads, keys, depth = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes(head_dim, tokens=16))

    def forward(query, key, value, depth_key, depth_value):
        call = Call(query, key, value, Mask(True), DepthKV(depth_key, depth_value), 0.1)
        return implementation.forward(call, interpret=False)

    lowered = jax.jit(forward).trace(heads, keys, keys, depth, depth).lower(lowering_platforms=("cuda",))
    assert [x.shape[-1] for x in (lowered.out_info.out,)] == [head_dim]
    text = lowered.as_text()
    assert f"moda_depth_forward_T16_S4_N2_K1_H{padded}_" in text
    pads = [line for line in text.splitlines() if "stablehlo.pad" in line and f"16x4x1x{padded}x" in line]
    assert bool(pads) == (padded != head_dim)
