"""Evaluates the MLIR of a kernel's inlined function for all threads of a warpgroup at once, in NumPy.

For functions that neither touch memory nor other threads: every value becomes an array over the 128 threads, of a
vector [128, n]. Operations are followed backwards from a result.
"""

import numpy as np
from jaxlib.mlir import ir

THREAD = np.arange(128)
INTEGERS = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "andi": np.bitwise_and, "divui": np.floor_divide,
    "remui": np.remainder, "shli": np.left_shift, "shrui": np.right_shift,
}  # fmt: skip
COMPARISONS = {2: np.less, 3: np.less_equal, 4: np.greater, 5: np.greater_equal}  # signed, as arith numbers them


def evaluate(value, known):
    """The number of a value, by thread; known: value -> numbers, which grows."""
    if value in known:
        return known[value]
    operation = value.owner
    name = operation.name.removeprefix("arith.")
    operands = [evaluate(operand, known) for operand in operation.operands]
    if name == "constant":
        attribute = operation.attributes["value"]
        kind = ir.FloatAttr if isinstance(attribute, ir.FloatAttr) else ir.IntegerAttr
        result = np.full(128, kind(attribute).value)
    elif name == "gpu.thread_id":
        result = THREAD if "x" in str(operation.attributes["dimension"]) else np.zeros(128, int)
    elif name == "gpu.block_dim":
        result = np.full(128, 128 if "x" in str(operation.attributes["dimension"]) else 1)
    elif name in INTEGERS:
        result = INTEGERS[name](*operands)
    elif name in ("index_cast", "index_castui", "trunci", "extui", "extsi"):
        result = operands[0]
    elif name == "cmpi":
        result = COMPARISONS[ir.IntegerAttr(operation.attributes["predicate"]).value](*operands)
    elif name == "select":
        result = np.where(*operands)
    elif name == "vector.extract":
        (place,) = operation.attributes["static_position"]
        result = operands[0][:, place]
    elif name == "vector.insert":
        (place,) = operation.attributes["static_position"]
        result = operands[1].copy()
        result[:, place] = operands[0]
    else:
        raise NotImplementedError(f"{operation.name}: not an operation that is evaluated here")
    known[value] = result
    return result
