"""The memory promises of the xla implementation: nothing of size T * T, gradient buffers updated in place."""

import math
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from pallas_kernels import block, moda_attention
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream


def _largest_array(jaxpr) -> int:
    """Elements of the largest array that a jaxpr computes, loop bodies and called functions included."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            largest = max(largest, math.prod(getattr(variable.aval, "shape", ())))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            largest = max(largest, _largest_array(inner))
    return largest


def _shapes(tokens: int, slots: int) -> list[jax.ShapeDtypeStruct]:
    heads = [(1, tokens, 4, 8), (1, tokens, 2, 8), (1, tokens, 2, 8), *2 * [(1, tokens, slots, 2, 8)]]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in heads]


def _forward_and_backward(implementation, query, *arrays):
    """out, lse and the gradients of their sums, with a traced depth_length."""
    length = query[0, 0, 0, 0].astype(jnp.int32)

    def op(*arrays):
        return moda_attention(*arrays, depth_length=length, implementation=implementation, return_lse=True)

    results, pullback = jax.vjp(op, query, *arrays)
    return results, pullback(results)


def test_no_array_of_tokens_squared():
    tokens, slots = 1024, 8
    largest = {}
    for implementation in ("xla", "reference"):
        traced = jax.make_jaxpr(lambda *a, name=implementation: _forward_and_backward(name, *a))
        largest[implementation] = _largest_array(traced(*_shapes(tokens, slots)).jaxpr)
    assert largest["reference"] >= tokens * (tokens + slots)  # the measure sees what it should
    assert largest["xla"] < tokens * tokens // 2

    compiled = jax.jit(lambda *a: _forward_and_backward("xla", *a)).lower(*_shapes(tokens, slots)).compile()
    shapes = re.findall(r"= \w+\[([\d,]+)\]", compiled.as_text())
    elements = max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)
    assert elements < tokens * tokens // 2


def test_memory_is_linear_in_the_length_of_the_sequence():
    traced = jax.make_jaxpr(lambda *a: _forward_and_backward("xla", *a))
    short, long = (_largest_array(traced(*_shapes(tokens, 8)).jaxpr) for tokens in (4096, 16384))
    assert long <= 4 * short


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["attention", "depth"])
def test_gradient_buffers_are_carried_in_place(operation, dtype):
    """A reverse scan over layers adds to the same two buffers: no copy of them, neither per layer nor in all."""
    B, T, S, K, H, layers = 2, 48, 64, 2, 16, 8

    def zeros(*shape):
        return jnp.zeros(shape, jnp.bfloat16)

    query, key, depth = zeros(B, T, 2 * K, H), zeros(B, T, K, H), zeros(B, T, S, K, H)
    statistics = jnp.zeros((B, T, 2 * K), jnp.float32)

    def run(query, key, depth, buffers):
        def layer(buffers, index):
            slots = DepthKV(depth, depth, length=8 * index)
            call = Call(query, key, key, Mask(True), slots, 0.1)
            if operation == "depth":
                call = Call(query, depth=slots, scale=0.1)
            upstream = Upstream(query, statistics, statistics)
            dquery, *_, dk, dv = block.backward(call, upstream, buffers=buffers, implementation="xla")
            return (dk, dv), dquery

        return jax.lax.scan(layer, buffers, jnp.arange(layers), reverse=True)

    buffers = tuple(jnp.zeros((B, T, S, K, H), dtype) for _ in range(2))
    compiled = jax.jit(run, donate_argnums=3).lower(query, key, depth, buffers).compile()
    buffer_shape = f"[{B},{T},{S},{K},{H}]"
    copies = [line for line in compiled.as_text().splitlines() if re.search(r"= .* copy(-start)?\(", line)]
    assert not [line for line in copies if buffer_shape in line]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * buffers[0].nbytes
    assert memory.temp_size_in_bytes < buffers[0].nbytes
