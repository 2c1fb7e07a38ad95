"""What the compiled train step must not hold: copies of the depth stream or its gradient, sums in no fixed order."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from support.selection import quick_of

from moda_jax.config import OptimizerConfig, TrainConfig, TransformerConfig
from moda_jax.data.packing import Batch
from moda_jax.model.function import model_function, parameter_kinds
from moda_jax.tasks.language import LanguageObjective, language_params
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.schedule import learning_rate_schedule
from moda_jax.training.state import initial_state
from moda_jax.training.train_step import make_train_step

BATCH, TOKENS, LAYERS, KV_HEADS, HEAD_DIM = 2, 256, 5, 2, 64
SHAPE = f"bf16[{BATCH},{TOKENS},{2 * (LAYERS - 1)},{KV_HEADS},{HEAD_DIM}]"
# Key, value and the gradients of both are filled with zeros; a copy per layer would be 4 for each of them.
FILLS = 4


def buffer_writers(text, shape=SHAPE):
    """(opcode, root opcode of a fusion, line) of every instruction outside of fusions that makes an array of `shape`.

    Views, the kernels (which alias their buffers) and control flow make none of their own.
    """
    computations = re.split(r"^}\n", text, flags=re.MULTILINE)
    roots = {}
    for computation in computations:
        name = re.search(r"^(?:ENTRY )?%([\w.\-]+) \(", computation, re.MULTILINE)
        root = re.search(r"^\s*ROOT %[\w.\-]+ = .*? ([\w\-]+)\(", computation, re.MULTILINE)
        if name and root:
            roots[name[1]] = root[1]
    fused = set(re.findall(r" fusion\(.*?calls=%([\w.\-]+)", text))
    found = []
    for computation in computations:
        name = re.search(r"^(?:ENTRY )?%([\w.\-]+) \(", computation, re.MULTILINE)
        if name is None or name[1] in fused:
            continue
        for line in computation.splitlines():
            made = re.match(r"\s*(?:ROOT )?%[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if made is None or shape not in made[1]:
                continue
            if made[2] in {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "custom-call", "call"}:
                continue
            called = re.search(r"calls=%([\w.\-]+)", line)
            found.append((made[2], roots.get(called[1]) if called else None, line.strip()[:200]))
    return found


def lowered_step(layer_loop, **fields):
    model = TransformerConfig(
        vocab_size=512, num_layers=LAYERS, width=256, num_heads=4, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        ffn_width=256, max_sequence_length=TOKENS, dtype="bfloat16", depth="moda", depth_ffn_kv=True, remat="none",
        layer_loop=layer_loop, **fields,
    )  # fmt: skip
    options = OptimizerConfig()
    optimizer, schedule = make_optimizer(options, 1000, parameter_kinds(model)), learning_rate_schedule(options, 1000)
    step = make_train_step(LanguageObjective(model_function(model)), optimizer, schedule, TrainConfig(batch_size=BATCH))
    state = jax.eval_shape(functools.partial(initial_state, functools.partial(language_params, model), optimizer, 0))
    integers = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    batch = Batch(integers, integers, integers, integers, jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.float32))
    return jax.jit(step, donate_argnums=0).lower(state, batch)


@pytest.mark.parametrize("layer_loop", quick_of(("scan", "unroll"), ("scan",)))
@pytest.mark.parametrize("group", [None, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_no_layer_copies_the_depth_buffer(platform, layer_loop, group):
    if jax.default_backend() != platform:
        pytest.skip(f"compiles for {jax.default_backend()}")
    text = lowered_step(layer_loop, depth_gradient_group=group).compile().as_text()
    if platform == "gpu":
        kernels = ("",) if group is None else ("_deferred", "_slots")
        assert all(f"moda_depth_backward_accumulate{kernel}_T" in text for kernel in kernels)
    assert SHAPE in text
    writers = buffer_writers(text)
    others = [w for w in writers if "dynamic-update-slice" not in (w[0], w[1])]
    assert len(writers) > len(others), "no slot is written"
    listing = "\n".join(w[2] for w in others)
    assert len(others) <= FILLS, f"what makes an array of {SHAPE}:\n{listing}"


def test_nothing_is_summed_in_memory():
    """A scatter to places that may coincide is an atomic sum on a GPU: other bits in every run."""
    text = lowered_step("scan").as_text()
    assert text.count('"stablehlo.scatter"') == text.count("unique_indices = true") >= 1


HLO = """
%fused_dus (p: bf16[4]) -> bf16[4] {
  %p = bf16[4]{0} parameter(0)
  ROOT %dynamic-update-slice.1 = bf16[4]{0} dynamic-update-slice(%p, %u, %i)
}

%fused_add (p: bf16[4]) -> bf16[4] {
  ROOT %add.1 = bf16[4]{0} add(%p, %p)
}

ENTRY %main (a: bf16[4]) -> bf16[4] {
  %a = bf16[4]{0} parameter(0)
  %f.1 = bf16[4]{0} fusion(%a), kind=kLoop, calls=%fused_dus
  %f.2 = bf16[4]{0} fusion(%f.1), kind=kLoop, calls=%fused_add
  ROOT %copy.1 = bf16[4]{0} copy(%f.2)
}
"""


def test_the_reader_of_the_compiled_program_finds_what_makes_an_array():
    found = [(opcode, root) for opcode, root, _ in buffer_writers(HLO, "bf16[4]")]
    assert found == [("fusion", "dynamic-update-slice"), ("fusion", "add"), ("copy", None)]
