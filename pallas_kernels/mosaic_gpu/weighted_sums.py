"""`sums_forward` and `sums_backward`: weighted sums of a token's slots of hidden states, for Hopper.

Equation (one token, its n filled slots v_s [D], C rows of weights a_c of its own):
    out_c = sum_s a_cs v_s;    dv_s = sum_c a_cs dout_c,  da_cs = dout_c . v_s

Grid: at most `CTAS` programs of one warpgroup; a program takes every so manieth group of 4 tokens.
Blocks: a warp owns a token, see `token_slots`.
Loop: over the slots, with the next one's load and weights in flight. Forward: all C sums in registers. Backward: all C
    gradients in registers, 16 bits each; the slot's gradient is added in place.
Bytes: forward n D in; backward n D in, and the gradient of n D in and out. Bound: memory.
Benchmark: python -m benchmarks.family --names=none,mudd,denseformer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu.token_slots import TokenShape, wide

CTAS = 1056  # 8 for each multiprocessor of an H100, of which 2 run at a time
MAX_SUMS = 4  # forward, a lane holds 32 numbers of each


def check_sums(sums: int) -> None:
    """Raises NotImplementedError if the kernels do not make so many sums of a slot."""
    if sums > MAX_SUMS:
        raise NotImplementedError(f"slots of a token: {sums} sums: expected at most {MAX_SUMS}")


@in_default_modes
def sums_forward(
    hidden: jax.Array, weights: jax.Array, length: jax.Array, *, interpret: bool | None = None
) -> jax.Array:
    """The sums.

    Args:
        hidden: [R, S, D], R tokens; bfloat16 or float16. Slots from `length` on are not used.
        weights: [R, C, S] float32.
        length: int32 scalar, n.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        [R, C, D] in hidden's dtype; 0 without a slot.

    Raises:
        NotImplementedError: see `token_slots.check_supported` and `check_sums`.
    """
    shape, sums = TokenShape.of(hidden, CTAS), weights.shape[1]
    check_sums(sums)
    [out] = plgpu.kernel(
        functools.partial(_forward, shape=shape, sums=sums),
        out_type=(jax.ShapeDtypeStruct((shape.tokens, sums, shape.blocks, shape.block), hidden.dtype),),
        **shape.options(f"moda_weighted_sums_forward_C{sums}", interpret),
    )(shape.view(hidden), weights, length.reshape(1))
    return out.reshape(shape.tokens, sums, shape.columns)


@in_default_modes
def sums_backward(
    hidden: jax.Array,
    weights: jax.Array,
    length: jax.Array,
    dout: jax.Array,
    dhidden: jax.Array,
    *,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weights' gradient, and `dhidden` with the slots' gradients added, in place.

    Args:
        hidden, weights, length, interpret: as in `sums_forward`.
        dout: [R, C, D] in hidden's dtype.
        dhidden: [R, S, D], of any float dtype; slots from `length` on keep every bit.

    Returns:
        dweights [R, C, S] float32, in which slots from `length` on hold anything, and dhidden.

    Raises:
        NotImplementedError: as `sums_forward`.
    """
    shape, sums = TokenShape.of(hidden, CTAS), weights.shape[1]
    check_sums(sums)
    total = jax.new_ref(shape.view(dhidden))
    [dweights] = plgpu.kernel(
        functools.partial(_backward, shape=shape, sums=sums),
        out_type=(jax.ShapeDtypeStruct(weights.shape, jnp.float32),),
        **shape.options(f"moda_weighted_sums_backward_C{sums}", interpret),
    )(shape.view(hidden), weights, length.reshape(1), shape.view(dout), total)
    return dweights, jax.freeze(total).reshape(dhidden.shape)


def _slot(shape, sums, hidden_ref, weights_ref, rows, s):
    """A slot's blocks and weights, as they are stored."""
    weights = tuple(shape.load_row_values(weights_ref.at[:, c, s], rows) for c in range(sums))
    return shape.load(hidden_ref, rows, s), weights


def _forward(hidden_ref, weights_ref, length_ref, out_ref, *, shape, sums):
    length = length_ref[0]

    def group(rows, carry):
        def one_slot(s, state):
            (stored, weights), totals = state
            v = wide(stored)
            following = _slot(shape, sums, hidden_ref, weights_ref, rows, jnp.minimum(s + 1, length - 1))
            totals = tuple(
                tuple(t + shape.rows(weight) * x for t, x in zip(total, v, strict=True))
                for total, weight in zip(totals, weights, strict=True)
            )
            return following, totals

        first = _slot(shape, sums, hidden_ref, weights_ref, rows, 0)
        _, totals = lax.fori_loop(0, length, one_slot, (first, tuple(shape.zeros() for _ in range(sums))))
        for c, total in enumerate(totals):
            for block, t in enumerate(total):
                out_ref[rows, c, block] = t.astype(out_ref.dtype)
        return carry

    shape.walk(lax.axis_index("program"), group, 0)


def _backward(hidden_ref, weights_ref, length_ref, dout_ref, total_ref, dweights_ref, *, shape, sums):
    length = length_ref[0]

    def group(rows, carry):
        douts = tuple(shape.load(dout_ref, rows, c) for c in range(sums))

        def one_slot(s, state):
            stored, weights = state
            old = shape.load(total_ref, rows, s)
            following = _slot(shape, sums, hidden_ref, weights_ref, rows, jnp.minimum(s + 1, length - 1))
            v, more = wide(stored), shape.zeros()
            for c, (dout, weight) in enumerate(zip(douts, weights, strict=True)):
                d = wide(dout)
                dweights_ref[rows, c, s] = shape.dot(d, v)
                more = tuple(m + shape.rows(weight) * x for m, x in zip(more, d, strict=True))
            for block, (m, o) in enumerate(zip(more, old, strict=True)):
                total_ref[rows, s, block] = (o.astype(jnp.float32) + m).astype(total_ref.dtype)
            return following

        lax.fori_loop(0, length, one_slot, _slot(shape, sums, hidden_ref, weights_ref, rows, 0))
        return carry

    shape.walk(lax.axis_index("program"), group, 0)
