"""How the kernels that go over a token's slots of hidden states lie on the chip: a warp for each token.

A program of one warpgroup takes groups of 4 tokens; a warp goes over its token's slots [D]. A lane holds 8 columns out
of every 256 (4 out of 128, where D is no multiple of 256), so that sums over a slot's columns stay inside the warp and
no warp waits for another. All of it is bound by memory: what counts is that a slot is loaded once, and that the next
one's load is in flight meanwhile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import warpgroup as wg_lib

ROWS = 4  # tokens of a program at a time, one for each warp
MAX_COLUMNS = 1024  # a lane then holds 32 numbers of a slot, and as many of everything that goes with it


def check_supported(*, dtype: jnp.dtype, tokens: int, columns: int) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a stream.

    Args:
        dtype: of the hidden states.
        tokens: B T.
        columns: D.
    """
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"slots of a token: dtype={name}: expected bfloat16 or float16")
    if columns > MAX_COLUMNS or columns % 128:
        raise NotImplementedError(
            f"slots of a token: {columns} columns: expected a multiple of 128, at most {MAX_COLUMNS}"
        )
    if tokens % ROWS:
        raise NotImplementedError(f"slots of a token: {tokens} tokens: expected a multiple of {ROWS}")


class TokenShape:
    """How a stream [R, S, D] lies on programs, warps and lanes.

    Attributes:
        tokens, slots, columns: R, S, D.
        block: columns that a warp holds side by side, `lane` of them in a lane.
        blocks: of a slot.
        groups: of `ROWS` tokens.
        programs: that share the groups.
        layout: of [ROWS, block] over the warps and their lanes.
    """

    def __init__(self, tokens: int, slots: int, columns: int, most: int) -> None:
        self.tokens, self.slots, self.columns = tokens, slots, columns
        self.lane = 8 if columns % 256 == 0 else 4
        self.block = 32 * self.lane
        self.blocks = columns // self.block
        self.groups = tokens // ROWS
        self.programs = min(most, self.groups)
        tiling = fragmented_array.Tiling(((ROWS, self.block), (self.lane,)))
        self.layout = plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)

    @classmethod
    def of(cls, hidden: jax.Array, most: int) -> TokenShape:
        """Of hidden states [R, S, D] for at most so many programs; see `check_supported`."""
        tokens, slots, columns = hidden.shape
        check_supported(dtype=hidden.dtype, tokens=tokens, columns=columns)
        return cls(tokens, slots, columns, most)

    def view(self, array: jax.Array) -> jax.Array:
        """[..., D] as [..., blocks, block]."""
        return array.reshape(*array.shape[:-1], self.blocks, self.block)

    def options(self, name: str, interpret: bool | None) -> dict:
        """Of `plgpu.kernel`."""
        interpret = wg_lib.default_interpret() if interpret is None else interpret
        return {
            "grid": (self.programs,), "grid_names": ("program",),
            "compiler_params": plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane,
                unsafe_no_auto_barriers=True,  # the one place that is read after it was written has a barrier
            ),
            "interpret": wg_lib.interpret_params(interpret),
            "kernel_name": f"{name}_R{self.tokens}_S{self.slots}_D{self.columns}",
        }  # fmt: skip

    # In a kernel.

    def zeros(self) -> tuple[jax.Array, ...]:
        """A token's columns, by block, [ROWS, block] float32 each."""
        return tuple(wg_lib.full((ROWS, self.block), 0.0, self.layout) for _ in range(self.blocks))

    def load(self, ref, *index) -> tuple[jax.Array, ...]:
        """A row's blocks, as they are stored. index: the tokens, and the slot if there is one."""
        return tuple(
            plgpu.load(ref.at[(*index, block)], layout=self.layout, optimized=False) for block in range(self.blocks)
        )

    def load_direction(self, ref) -> tuple[jax.Array, ...]:
        """The direction, the same for every token of the group."""
        columns = self.layout.reduce(0)
        parts = (plgpu.load(ref.at[block], layout=columns, optimized=False) for block in range(self.blocks))
        return tuple(self._spread(part, 1) for part in parts)

    def load_row_values(self, ref, rows) -> jax.Array:
        """[ROWS] float32."""
        return plgpu.load(ref.at[rows], layout=self.layout.reduce(1), optimized=False)

    def rows(self, values: jax.Array) -> jax.Array:
        """[ROWS], over a block's columns."""
        return self._spread(values, 0)

    def dot(self, a, b) -> jax.Array:
        """Of every token, over all its columns: [ROWS]."""
        return jnp.sum(functools.reduce(jnp.add, [x * y for x, y in zip(a, b, strict=True)]), axis=1)

    def walk(self, program, step, carry):
        """carry = step(tokens of the group, carry), over the program's groups."""

        def one(i, carry):
            return step(pl.ds(ROWS * (program + i * self.programs), ROWS), carry)

        return lax.fori_loop(0, lax.div(self.groups - program + self.programs - 1, self.programs), one, carry)

    def _spread(self, array, dimension: int) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(array, (ROWS, self.block), (dimension,)), self.layout)


def wide(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Blocks as float32."""
    return tuple(part.astype(jnp.float32) for part in parts)
