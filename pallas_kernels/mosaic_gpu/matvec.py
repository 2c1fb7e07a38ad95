"""A matrix times one row of inputs on Hopper, with what stands before and behind such products in a decode step.

Equations, o an output, d an input; r(z) = 1 / sqrt(mean(z^2) + epsilon); what is in brackets is there or not:
    x' = x [+ y]  or  x + add_scale * y r(y);   h = x' [* input_scale * r(x')];   a[o] = sum_d matrix[o, d] h[d]
    out = a; or of the first 2F outputs, gate and up:  silu(a[f]) * a[F + f], and the others as they are

Grid: (programs,), one warpgroup each, of which a warp takes `sets` outputs (of a gate `sets` pairs): all of its rows of
    the matrix are loaded at once, before anything is computed, and no program waits for another. There are about as
    many programs as run at a time, so nearly the whole matrix is on its way at once.
Blocks: a row of the matrix is D / 256 blocks, of which a lane holds 8 columns: 16 bytes a load, 512 a warp.
Resident: rows of the matrix and h in their dtype, in registers. Every program computes h for itself, from inputs of a
    few kilobytes; the first one writes x'.
Arithmetic: float32 on CUDA cores; what the model rounds between its operations, x', y normed and h, is rounded here.
Bytes: O * D * 2 and little else. FLOPs: 2 a parameter. Bound: memory; 4 MB in 1 us at 4.2 TB/s.
Benchmark: python -m benchmarks.decode --layouts=packed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.modes import in_default_modes
from pallas_kernels.mosaic_gpu import warpgroup as wg_lib

DTYPES = ("bfloat16", "float16")
WARPS = 4
LANE_COLUMNS = 8  # of a lane and a block: 16 bytes
BLOCK = 32 * LANE_COLUMNS
MOST_INPUTS = 8192  # 64 registers of a lane for a row of the matrix, and as many for h
REGISTER_ROWS = 8  # of 1024 columns, that a lane has a part of: 128 registers
# Programs of a multiprocessor for at least so many of such rows: they leave room for 128 and for 168 registers a lane.
PROGRAMS_OF_MULTIPROCESSOR = {5: 3, 1: 4}

LAYOUT = plgpu.Layout.TILED(fragmented_array.Tiling(((WARPS, BLOCK), (LANE_COLUMNS,))), (-3,), (-2,), -1)
OF_COLUMNS = LAYOUT.reduce(0)


@dataclasses.dataclass(frozen=True)
class Product:
    """What is computed besides the product.

    Attributes:
        adds, norms_added, norms_input: y is there; is normed; x' is normed.
        gated: F; 0: no gate.
        epsilon: of the norms.
    """

    adds: bool = False
    norms_added: bool = False
    norms_input: bool = False
    gated: int = 0
    epsilon: float = 0.0


def check_supported(*, dtype: jnp.dtype, rows: int, inputs: int, outputs: int, gated: int = 0) -> None:
    """Raises NotImplementedError, with the reason, if the kernel does not take such a product.

    Args:
        dtype: of inputs and matrix.
        rows: of inputs.
        inputs, outputs: D, O.
        gated: F.
    """
    kind = jnp.dtype(dtype).name
    if kind not in DTYPES:
        raise NotImplementedError(f"matvec: dtype={kind}: expected {' or '.join(DTYPES)}")
    if rows != 1:
        raise NotImplementedError(f"matvec: {rows} rows of inputs: expected 1")
    if inputs % BLOCK or not 0 < inputs <= MOST_INPUTS:
        raise NotImplementedError(f"matvec: {inputs} inputs: expected a multiple of {BLOCK} up to {MOST_INPUTS}")
    if not _fitting(outputs, gated):
        multiple = f"{2 * WARPS} with a gate" if gated else str(WARPS)
        raise NotImplementedError(
            f"matvec: {outputs} outputs, {gated} of them with a gate: expected multiples of {multiple}"
        )


def sets_for(inputs: int, outputs: int, gated: int, multiprocessors: int) -> int:
    """Outputs, or with a gate pairs, of a warp: the fewest with which all programs run at a time, or the most."""
    width, factor = -(-inputs // 1024), 2 if gated else 1
    fitting = [sets for sets in _fitting(outputs, gated) if sets * factor * width <= REGISTER_ROWS] or [1]
    for sets in fitting:
        held = sets * width * factor
        at_once = multiprocessors * next(n for rows, n in PROGRAMS_OF_MULTIPROCESSOR.items() if held >= rows)
        if sum(_programs(outputs, gated, sets)) <= at_once:
            return sets
    return fitting[-1]


def _fitting(outputs: int, gated: int) -> list[int]:
    """Numbers of sets with which no program reaches beyond the outputs."""
    factor = 2 if gated else 1
    counts = [gated, (outputs - 2 * gated) // factor]
    if (outputs - 2 * gated) % factor or outputs < 2 * gated or outputs == 0:
        return []
    return [sets for sets in range(1, REGISTER_ROWS + 1) if not any(count % (WARPS * sets) for count in counts)]


def _programs(outputs: int, gated: int, sets: int) -> tuple[int, int]:
    """Of pairs, and of other outputs."""
    return gated // (WARPS * sets), (outputs - 2 * gated) // (WARPS * sets * (2 if gated else 1))


# Jitted, so that the layers of an unrolled model share what is traced and lowered.
@functools.partial(jax.jit, static_argnames=("gated", "epsilon", "sets", "interpret"))
@in_default_modes
def matvec(
    x: jax.Array,
    matrix: jax.Array,
    add: jax.Array | None = None,
    add_scale: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    *,
    gated: int = 0,
    epsilon: float = 0.0,
    sets: int | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """(x', the gate's outputs, the other outputs), see the equations.

    Args:
        x: [D], bfloat16 or float16.
        matrix: [O, D] of that dtype.
        add: [D] of that dtype: y; None: nothing is added.
        add_scale: [D] float32; None: y is added as it is.
        input_scale: [D] float32; None: h = x'.
        gated: F.
        epsilon: of the norms.
        sets: see above; None: as `sets_for` says.
        interpret: run under the interpreter; None: where there is no GPU.

    Returns:
        [D], x itself where nothing is added; [F], or None; [O - 2F], or None if that is 0. In x's dtype.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    outputs, inputs = matrix.shape
    check_supported(dtype=x.dtype, rows=1, inputs=inputs, outputs=outputs, gated=gated)
    product = Product(add is not None, add_scale is not None, input_scale is not None, gated, epsilon)
    sets = sets or sets_for(inputs, outputs, gated, wg_lib.multiprocessors())
    if sets not in _fitting(outputs, gated):
        raise ValueError(f"matvec: sets={sets}: expected one of {_fitting(outputs, gated)}")
    blocks, rest = inputs // BLOCK, outputs - 2 * gated
    of_pairs, of_rest = _programs(outputs, gated, sets)
    loads = sets * (2 if gated else 1)  # rows of a warp

    def body(*refs):
        x_ref, matrix_ref, *refs = refs
        add_ref = refs.pop(0) if product.adds else None
        add_scale_ref = refs.pop(0) if product.norms_added else None
        input_scale_ref = refs.pop(0) if product.norms_input else None
        sum_ref = refs.pop(0) if product.adds else None
        gated_ref = refs.pop(0) if gated else None
        rest_ref = refs.pop(0) if rest else None
        program = lax.axis_index("program")
        pair, single = program * (WARPS * sets), (program - of_pairs) * (WARPS * loads)

        def first_row(number):
            """Of the four that the warps load as their `number`-th."""
            own = 2 * gated + single + WARPS * number
            if not gated:
                return own
            of_pair = pair + WARPS * number if number < sets else gated + pair + WARPS * (number - sets)
            return jnp.where(program < of_pairs, of_pair, own) if rest else of_pair

        rows = [
            [
                plgpu.load(matrix_ref.at[pl.ds(first_row(number), WARPS), i], layout=LAYOUT, optimized=False)
                for i in range(blocks)
            ]
            for number in range(loads)
        ]
        x = _vector(x_ref, blocks)  # behind the loads of the matrix, which take longer
        dtype = x_ref.dtype
        if product.adds:
            y = _vector(add_ref, blocks)
            if product.norms_added:
                y = _rounded(_normed(y, _vector(add_scale_ref, blocks), product.epsilon), dtype)
            x = [(a + b).astype(dtype) for a, b in zip(x, y, strict=True)]

            @pl.when(program == 0)
            def _():
                for i, block in enumerate(x):
                    sum_ref[i] = block

            x = [block.astype(jnp.float32) for block in x]
        if product.norms_input:
            x = _rounded(_normed(x, _vector(input_scale_ref, blocks), product.epsilon), dtype)
        sums = [_dot(row, x) for row in rows]

        def store_rest():
            for number, value in enumerate(sums):
                rest_ref[pl.ds(single + WARPS * number, WARPS)] = value.astype(dtype)

        def store_pairs():
            for number in range(sets):
                gate, up = sums[number], sums[sets + number]
                value = gate * (1.0 / (1.0 + jnp.exp(-gate))) * up
                gated_ref[pl.ds(pair + WARPS * number, WARPS)] = value.astype(dtype)

        if gated and rest:
            pl.when(program < of_pairs)(store_pairs)
            pl.when(program >= of_pairs)(store_rest)
        else:
            (store_pairs if gated else store_rest)()

    def view(array):
        return array.reshape(*array.shape[:-1], blocks, BLOCK)

    interpret = wg_lib.default_interpret() if interpret is None else interpret
    types = [((blocks, BLOCK), product.adds), ((gated,), gated), ((rest,), rest)]
    results = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, x.dtype) for shape, wanted in types if wanted),
        grid=(of_pairs + of_rest,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # nothing that is written is read
        ),
        interpret=wg_lib.interpret_params(interpret),
        kernel_name=f"moda_matvec_O{outputs}_D{inputs}_F{gated}_sets{sets}",
    )(*(view(a) for a in (x, matrix, add, add_scale, input_scale) if a is not None))
    results = list(results)
    total = results.pop(0).reshape(inputs) if product.adds else x
    return total, results.pop(0) if gated else None, results.pop(0) if rest else None


def _vector(ref, blocks: int) -> list[jax.Array]:
    """[blocks, 256] as float32, the same in every warp."""
    return [plgpu.load(ref.at[i], layout=OF_COLUMNS, optimized=False).astype(jnp.float32) for i in range(blocks)]


def _normed(x: list[jax.Array], scale: list[jax.Array], epsilon: float) -> list[jax.Array]:
    inverse = lax.rsqrt(jnp.sum(functools.reduce(jnp.add, [a * a for a in x])) / (len(x) * BLOCK) + epsilon)
    return [s * (a * inverse) for s, a in zip(scale, x, strict=True)]


def _rounded(x: list[jax.Array], dtype: jnp.dtype) -> list[jax.Array]:
    return [a.astype(dtype).astype(jnp.float32) for a in x]


def _dot(row: list[jax.Array], x: list[jax.Array]) -> jax.Array:
    """Of four rows of the matrix with x: [4]."""
    spread = [plgpu.layout_cast(lax.broadcast_in_dim(b, (WARPS, BLOCK), (1,)), LAYOUT) for b in x]
    products = [a.astype(jnp.float32) * b for a, b in zip(row, spread, strict=True)]
    return jnp.sum(functools.reduce(jnp.add, products), axis=1)
