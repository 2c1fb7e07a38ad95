"""Compiler options for tests whose cost is compilation: XLA's own passes as always, LLVM's code left unoptimised.

The program, its buffers and its memory analysis are the same; it compiles in a third of the time and runs slower.
"""

QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "True"}
# The same for all of a process, and for one that a test starts. The last, which no single program can be given, goes to
# LLVM without MLIR and halves what is left.
QUICK_XLA_FLAGS = " ".join(f"--{name}={value.lower()}" for name, value in QUICK.items())
QUICK_XLA_FLAGS += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
