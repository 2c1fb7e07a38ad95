"""What the kernels share, where the interpreter does not run the chip's own code."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func
from support.thread_values import THREAD, evaluate

from pallas_kernels.mosaic_gpu import warpgroup


def fragment(layout, shape, values, is_signed, arguments, known):
    """An array of which `values` [threads, registers, numbers of one] are known; it takes the next arguments."""
    registers = np.empty(layout.registers_shape(shape), object)
    for number, index in enumerate(np.ndindex(registers.shape)):
        argument = next(arguments)
        known[argument] = values[:, number]
        registers[index] = argument
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def places(layout, shape):
    """Per register the index of its first number, by thread: as Mosaic has them."""
    return [[evaluate(x, {}) for x in index] for index in layout.thread_idxs(shape)]


@pytest.mark.parametrize("columns", [64, 128])
def test_a_row_s_columns_are_hidden_behind_its_last(columns):
    rng = np.random.default_rng(columns)
    last = rng.integers(-3, columns + 3, 64)
    tile, row = plgpu.Layout.WGMMA.to_mgpu(), plgpu.Layout.WGMMA.reduce(1).to_mgpu()
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        count = columns // 8 * 2
        with ir.InsertionPoint(module.body):
            body = func.FuncOp("f", ([pair] * count + [one] * 2, [])).add_entry_block()
        with ir.InsertionPoint(body):
            arguments, known = iter(body.arguments), {}
            values = rng.standard_normal((128, count, 2))
            x = fragment(tile, (64, columns), values, None, arguments, known)
            ends = np.stack([last[rows] for (rows,) in places(row, (64,))], axis=1)[..., None]
            hidden = warpgroup.hide_registers(x, fragment(row, (64,), ends, True, arguments, known))
            got = [evaluate(register, known) for register in hidden.registers.flat]
            for number, (rows, first) in enumerate(places(tile, (64, columns))):
                for i in range(2):
                    wanted = np.where(first + i <= last[rows], values[:, number, i], -np.inf)
                    np.testing.assert_array_equal(got[number][:, i], wanted)
    assert len(got) * 2 * len(THREAD) == 64 * columns


@pytest.mark.parametrize(("programs", "items"), [(1, 3), (4, 3), (5, 5), (7, 40), (132, 2816)])
def test_every_item_has_one_turn(programs, items):
    taken, lengths = [], []
    for program in range(programs):
        turns = warpgroup.Turns(jnp.int32(program), programs, items)
        mine = [int(turns.item(turn)) for turn in range(int(turns.count))]
        taken += mine
        lengths.append(sum(items - item for item in mine))  # the longest come first
    assert sorted(taken) == list(range(items))
    if items > 10 * programs:
        assert max(lengths) < 1.02 * sum(lengths) / programs
