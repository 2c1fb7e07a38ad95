"""Compiler options for tests whose cost is compilation: XLA's own passes as always, LLVM's code left unoptimised.

The program, its buffers and its memory analysis are the same; it compiles in a third of the time and runs slower.
"""

QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "True",
    # A program is one LLVM module, not up to 32 for as many threads: each holds again what it calls.
    "xla_cpu_parallel_codegen_split_count": "1",
}
# XLA's default, for tests that want equal bits of two programs: in one module, what else is there decides how LLVM
# rounds a kernel's sums.
APART = {"xla_cpu_parallel_codegen_split_count": "32"}
# The same for all of a process, and for one that a test starts.
QUICK_XLA_FLAGS = " ".join(f"--{name}={value.lower()}" for name, value in QUICK.items())
# And, what no single program can be given: no MLIR on the way to LLVM, which halves what is left of it. Sums round
# otherwise then, and where a gradient nearly cancels two float32 programs differ by more.
NO_MLIR_XLA_FLAGS = f"{QUICK_XLA_FLAGS} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
