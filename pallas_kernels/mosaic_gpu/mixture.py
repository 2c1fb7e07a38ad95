"""`mixture_forward` and `mixture_backward`: a softmax mixture of a token's slots of hidden states, for Hopper.

Equation (one token, its n filled slots v_s [D], a direction w; r_s = 1 / sqrt(mean(v_s^2) + epsilon)):
    l_s = (w . v_s) r_s,  a = softmax(l),  out = sum_s a_s v_s,  lse = log(sum_s exp(l_s))
    dl_s = a_s (dout . v_s - delta),  delta = dout . out - dlse
    dv_s = a_s dout + dl_s r_s (w - l_s r_s / D v_s),  dw = sum over tokens and slots of dl_s r_s v_s

Grid: at most `forward_programs` or `backward_programs` of one warpgroup; a program takes every so manieth group of 4
    tokens.
Blocks: a warp owns a token, see `token_slots`.
Loop: over the slots, with the next one's load in flight. Forward: an online softmax, the mixture in registers.
    Backward: one pass, since delta is known from the rounded mixture; the slot's gradient is added in place.
Bytes: forward n D in; backward n D in, and the gradient of n D in and out (dw: a row for each program). Bound: memory.
Benchmark: python -m benchmarks.family --names=none,attnres,attnres_delta.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib
from pallas_kernels.mosaic_gpu.token_slots import ROWS, TokenShape, wide

FORWARD_CTAS = 1188  # 9 for each multiprocessor of an H100, of which 3 run at a time
BACKWARD_CTAS = 528  # 4, of which 2: each writes a row of dw


@in_default_modes
def mixture_forward(
    hidden: jax.Array, direction: jax.Array, length: jax.Array, *, epsilon: float, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """The mixture and its log-sum-exp.

    Args:
        hidden: [R, S, D], R tokens; bfloat16 or float16. Slots from `length` on are not used.
        direction: [D] float32.
        length: int32 scalar, n.
        epsilon: added to the mean square.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        out [R, D] in hidden's dtype and lse [R] float32; without a slot 0 and -inf.

    Raises:
        NotImplementedError: see `token_slots.check_supported`.
    """
    shape = TokenShape.of(hidden, FORWARD_CTAS)
    out, lse = plgpu.kernel(
        functools.partial(_forward, shape=shape, epsilon=epsilon),
        out_type=(
            jax.ShapeDtypeStruct((shape.tokens, shape.blocks, shape.block), hidden.dtype),
            jax.ShapeDtypeStruct((shape.tokens,), jnp.float32),
        ),
        **shape.options("moda_mixture_forward", interpret),
    )(shape.view(hidden), shape.view(direction), length.reshape(1))
    return out.reshape(shape.tokens, shape.columns), lse


@in_default_modes
def mixture_backward(
    hidden: jax.Array,
    direction: jax.Array,
    length: jax.Array,
    result: tuple[jax.Array, jax.Array],
    dresult: tuple[jax.Array, jax.Array],
    dhidden: jax.Array,
    *,
    epsilon: float,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The direction's gradient, and `dhidden` with the slots' gradients added, in place.

    Args:
        hidden, direction, length, epsilon, interpret: as in `mixture_forward`.
        result: out [R, D] and lse [R] of it.
        dresult: their gradients, in their dtypes.
        dhidden: [R, S, D], of any float dtype; slots from `length` on keep every bit.

    Returns:
        ddirection [D] float32, and dhidden.

    Raises:
        NotImplementedError: see `token_slots.check_supported`.
    """
    shape = TokenShape.of(hidden, BACKWARD_CTAS)
    (out, lse), (dout, dlse) = result, dresult
    total = jax.new_ref(shape.view(dhidden))
    [parts] = plgpu.kernel(
        functools.partial(_backward, shape=shape, epsilon=epsilon),
        out_type=(jax.ShapeDtypeStruct((shape.programs, shape.blocks, shape.block), jnp.float32),),
        scratch_types=dict(sums_smem=plgpu.SMEM((shape.blocks, ROWS, shape.block), jnp.float32)),
        **shape.options("moda_mixture_backward", interpret),
    )(
        shape.view(hidden), shape.view(direction), length.reshape(1), shape.view(out), lse, shape.view(dout), dlse,
        total,
    )  # fmt: skip
    return jnp.sum(parts, axis=0).reshape(shape.columns), jax.freeze(total).reshape(dhidden.shape)


def _logit(shape, direction, v, epsilon):
    """l and r of a slot, [ROWS] each."""
    inverse = lax.rsqrt(shape.dot(v, v) / shape.columns + epsilon)
    return shape.dot(direction, v) * inverse, inverse


def _forward(hidden_ref, direction_ref, length_ref, out_ref, lse_ref, *, shape, epsilon):
    length = length_ref[0]
    direction = shape.load_direction(direction_ref)
    per_token = shape.layout.reduce(1)

    def group(rows, carry):
        def one_slot(s, state):
            following, top, total, mixture = state
            v = wide(following)
            following = shape.load(hidden_ref, rows, jnp.minimum(s + 1, length - 1))
            logit, _ = _logit(shape, direction, v, epsilon)
            higher = jnp.maximum(top, logit)
            rescale, p = jnp.exp(top - higher), jnp.exp(logit - higher)
            wide_rescale, wide_p = shape.rows(rescale), shape.rows(p)
            mixture = tuple(m * wide_rescale + x * wide_p for m, x in zip(mixture, v, strict=True))
            return following, higher, total * rescale + p, mixture

        start = (
            shape.load(hidden_ref, rows, 0),
            wg_lib.full((ROWS,), wg_lib.LOWEST, per_token), wg_lib.full((ROWS,), 0.0, per_token), shape.zeros(),
        )  # fmt: skip
        _, top, total, mixture = lax.fori_loop(0, length, one_slot, start)
        seen = total > 0.0
        divisor = jnp.where(seen, total, 1.0)
        lse_ref[rows] = jnp.where(seen, top + jnp.log(divisor), wg_lib.HIDDEN)
        share = shape.rows(1.0 / divisor)
        for block, m in enumerate(mixture):
            out_ref[rows, block] = (m * share).astype(out_ref.dtype)
        return carry

    shape.walk(lax.axis_index("program"), group, 0)


def _backward(
    hidden_ref, direction_ref, length_ref, out_ref, lse_ref, dout_ref, dlse_ref, total_ref, parts_ref, *, sums_smem,
    shape, epsilon,
):  # fmt: skip
    length = length_ref[0]
    program = lax.axis_index("program")
    direction = shape.load_direction(direction_ref)

    def group(rows, sums):
        dout = wide(shape.load(dout_ref, rows))
        lse = shape.load_row_values(lse_ref, rows)
        delta = shape.dot(dout, wide(shape.load(out_ref, rows))) - shape.load_row_values(dlse_ref, rows)

        def one_slot(s, state):
            following, sums = state
            v = wide(following)
            old = shape.load(total_ref, rows, s)
            following = shape.load(hidden_ref, rows, jnp.minimum(s + 1, length - 1))
            logit, inverse = _logit(shape, direction, v, epsilon)
            weight = jnp.exp(logit - lse)
            slope = weight * (shape.dot(dout, v) - delta) * inverse
            curvature = slope * logit * inverse / shape.columns
            wide_weight, wide_slope, wide_curvature = map(shape.rows, (weight, slope, curvature))
            for block, (x, w, d, o) in enumerate(zip(v, direction, dout, old, strict=True)):
                more = wide_weight * d + wide_slope * w - wide_curvature * x
                total_ref[rows, s, block] = (o.astype(jnp.float32) + more).astype(total_ref.dtype)
            return following, tuple(total + wide_slope * x for total, x in zip(sums, v, strict=True))

        return lax.fori_loop(0, length, one_slot, (shape.load(hidden_ref, rows, 0), sums))[1]

    sums = shape.walk(program, group, shape.zeros())
    for block, total in enumerate(sums):
        sums_smem[block] = total
    plgpu.commit_smem()  # also a barrier
    flat = plgpu.Layout.WG_STRIDED((shape.block,), vec_size=shape.block // 128)
    for block in range(shape.blocks):
        warps = [plgpu.load(sums_smem.at[block, warp], layout=flat) for warp in range(ROWS)]
        parts_ref[program, block] = functools.reduce(jnp.add, warps)
