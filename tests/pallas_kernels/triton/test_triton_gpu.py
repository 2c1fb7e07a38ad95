"""The Triton kernels on the chip, where only the chip tells: lengths that are trained, and what is done in place.

The contract and the kernels' own tests run there too (`python -m pytest -m gpu -k triton`), and once more with
MODA_TRITON_CAPABILITY=8.0, which runs an A100's instructions.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.tolerances import relative_error

from moda_jax import Transformer, TransformerConfig
from pallas_kernels import moda_attention
from pallas_kernels.operands import Call, DepthKV, Mask, Upstream
from pallas_kernels.triton import implementation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "slots", "filled", "documents"),
    [
        (16384, 16, 8, 64, 70, 35, 1),
        (4096, 8, 2, 128, 20, 19, 5),
        (2047, 4, 4, 256, 3, 3, 1),
        (8190, 6, 2, 80, 64, 60, 3),
    ],
)
def test_long_sequences_match_xla(tokens, heads, kv_heads, head_dim, slots, filled, documents):
    """The blockwise XLA implementation in float32 is the reference: the dense one does not fit."""
    keys = iter(jax.random.split(jax.random.key(tokens), 7))
    shapes = [(1, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    shapes += [(1, tokens, slots, kv_heads, head_dim)] * 2
    arrays = [jax.random.normal(next(keys), shape, jnp.bfloat16) for shape in shapes]
    dout = jax.random.normal(next(keys), shapes[0], jnp.bfloat16)
    dlse = jax.random.normal(next(keys), shapes[0][:3], jnp.float32)
    ids = (jnp.arange(tokens, dtype=jnp.int32) * documents // tokens)[None] if documents > 1 else None

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(length, dout, dlse, *arrays, implementation):
        op = functools.partial(
            moda_attention, depth_length=length, segment_ids=ids, return_lse=True, implementation=implementation
        )
        results, pullback = jax.vjp(op, *arrays)
        return *results, *pullback((dout, dlse))

    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (dout, *arrays)]
        expected = run(jnp.int32(filled), wide[0], dlse, *wide[1:], implementation="xla")
        expected = [np.asarray(x) for x in expected]
    poisoned = [x.at[:, :, filled:].set(jnp.nan) if i > 2 else x for i, x in enumerate(arrays)]
    first, second = (run(jnp.int32(filled), dout, dlse, *poisoned, implementation="triton") for _ in range(2))
    for name, came, again, wanted in zip(
        ("out", "lse", "dquery", "dkey", "dvalue", "ddepth_key", "ddepth_value"), first, second, expected, strict=True
    ):
        assert np.asarray(came).tobytes() == np.asarray(again).tobytes(), f"{name} differs from run to run"
        error = relative_error(came, wanted)
        assert error < (1e-5 if name == "lse" else 4e-3 if name == "out" else 8e-3), (name, error)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_depth_gradients_accumulate_without_a_copy(dtype):
    """In the compiled program of a scan over layers the donated gradient buffers are never copied."""
    tokens, slots, kv_heads, head_dim = 512, 16, 2, 64
    draw = functools.partial(jax.random.normal, jax.random.key(0))
    query, key = draw((1, tokens, 8, head_dim), jnp.bfloat16), draw((1, tokens, kv_heads, head_dim), jnp.bfloat16)
    depth = draw((1, tokens, slots, kv_heads, head_dim), jnp.bfloat16)
    statistics = jnp.ones((1, tokens, 8), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def layers(buffers):
        def layer(buffers, length):
            call = Call(query, key, key, Mask(True), DepthKV(depth, depth, length=length), 0.125)
            *_, dk, dv = implementation.backward(call, Upstream(query, statistics, statistics), buffers)
            return (dk, dv), None

        return jax.lax.scan(layer, buffers, jnp.arange(slots, 0, -1))[0]

    buffers = tuple(jnp.zeros(depth.shape, dtype) for _ in range(2))
    places = [buffer.unsafe_buffer_pointer() for buffer in buffers]
    compiled = layers.lower(buffers).compile()
    name = {jnp.bfloat16: "bf16", jnp.float32: "f32"}[dtype]
    shape = f"{name}[1,{tokens},{slots},{kv_heads},{head_dim}]"
    lines = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line]
    assert not [line for line in lines if " copy(" in line or "copy-start" in line]
    results = compiled(buffers)
    assert [buffer.unsafe_buffer_pointer() for buffer in results] == places


@pytest.mark.parametrize("depth", ["moda", "none"])
def test_a_whole_models_gradients_are_those_of_xla(depth):
    """To what bfloat16 leaves of them."""
    tokens = jnp.arange(2 * 300, dtype=jnp.int32).reshape(2, 300) % 251

    def gradients(implementation):
        config = TransformerConfig(
            vocab_size=256, num_layers=4, width=256, num_heads=8, num_kv_heads=4, head_dim=64, ffn_width=512,
            dtype="bfloat16", depth=depth, depth_ffn_kv=depth == "moda", attention_implementation=implementation,
        )  # fmt: skip
        graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))

        @jax.jit
        @jax.value_and_grad
        def loss(state):
            logits = nnx.merge(graphdef, state)(tokens)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

        return loss(state)

    (loss, expected), (came_loss, came) = gradients("xla"), gradients("triton")
    np.testing.assert_allclose(came_loss, loss, rtol=1e-3)
    norm = optax.tree.norm(expected)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, came, expected)) < 0.02 * norm


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit")
def test_no_kernel_touches_memory_beyond_its_arrays():
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    done = subprocess.run(
        [*sanitizer, sys.executable, "-m", "support.triton_memcheck"], cwd=tests, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("ran (") == 3
