"""How a GPU kernel finds its category; the traces themselves need a GPU."""

import jax
import pytest

from benchmarks import profile

HLO = """
  %fusion.3 = f32[8]{0} fusion(%a), kind=kLoop, calls=%f, metadata={op_name="jit(step)/optimizer/mul" stack_frame_id=1}
  ROOT %custom-call.2 = bf16[8]{0} custom-call(%b), metadata={op_name="jit(step)/transpose(jvp(logits))/dot_general"}
  %tuple.1 = () tuple()
"""


def test_instructions_are_named_by_their_scope():
    assert profile.op_names(HLO) == {
        "fusion.3": "jit(step)/optimizer/mul",
        "custom-call.2": "jit(step)/transpose(jvp(logits))/dot_general",
    }


@pytest.mark.parametrize(
    ("kernel", "op_name", "expected"),
    [
        ("moda_sequence_forward_T4096", "", "attention forward"),
        ("moda_sequence_dkv_T4096", "", "attention backward"),
        ("moda_sequence_dq_T4096", "", "attention backward"),
        ("moda_depth_forward_T1", "", "depth forward"),
        ("moda_depth_backward_accumulate_T1", "", "depth backward"),
        ("nvjet_sm90_tst", "jit(step)/jvp(btd,df->btf)/dot_general", "matmuls"),
        ("nvjet_sm90_tst", "jit(step)/transpose(jvp(logits))/dot_general", "logits and loss"),
        ("loop_add_fusion_1", "jit(step)/jvp(loss)/add", "logits and loss"),
        ("loop_add_fusion_1", "jit(step)/optimizer/add", "optimizer"),
        ("MemcpyD2D", "", "copies"),
        ("loop_add_fusion_1", "jit(step)/jvp(glossary)/add", profile.OTHER),
    ],
)
def test_category(kernel, op_name, expected):
    assert profile.category(kernel, op_name) == expected


def test_seconds_are_summed_by_category_largest_first():
    kernels = {("gemm_1", ""): (1.0, 2), ("gemm_2", ""): (2.0, 1), ("loop_fusion", "fusion.3"): (4.0, 1)}
    sums = profile.seconds_by_category(kernels, HLO)
    assert list(sums.items()) == [("optimizer", 4.0), ("matmuls", 3.0)]


def test_the_kernel_table_joins_launches_of_one_computation():
    kernels = {
        ("gemm_fusion_dot_12", ""): (1e-3, 2),
        ("gemm_fusion_dot_7", ""): (2e-3, 1),
        ("f", "fusion.3"): (4e-3, 1),
    }
    first, second = profile.kernel_table(kernels, HLO).splitlines()
    assert first.split() == ["4.000", "ms", "1", "x", "f", "|", "fusion.3", "|", "jit(step)/optimizer/mul"]
    assert second.startswith("    3.000 ms     3 x gemm_fusion_dot |")
    assert len(profile.kernel_table(kernels, HLO, lines=1).splitlines()) == 1


def test_seconds_and_idle_time_of_launches():
    traced = [  # the second runs beside the first; nothing runs from 5 to 8 us
        profile.Launch("gemm_1", "dot.1", 0.0, 5e3),
        profile.Launch("add", "fusion.3", 1e3, 2e3),
        profile.Launch("gemm_2", "dot.2", 8e3, 9e3),
        profile.Launch("gemm_1", "dot.1", 9e3, 9.5e3),
    ]
    assert profile.kernel_seconds(traced)["gemm_1", "dot.1"] == (pytest.approx(5.5e-6), 2)
    total, longest, other = profile.idle_table(traced).splitlines()
    assert total.split() == ["0.003", "ms", "of", "0.009", "without", "a", "kernel,", "4", "launches"]
    assert longest.split() == ["0.003", "ms", "3", "x,", "at", "most", "3.0", "us,", "before", "gemm"]
    assert other.split()[:3] == ["0.000", "ms", "1"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there are GPU kernels")
def test_a_trace_without_gpu_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="no GPU kernels"):
        profile.launches(lambda: jax.numpy.ones(3) + 1)
