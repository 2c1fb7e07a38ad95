"""Compiler options for tests whose cost is compilation: XLA's own passes as always, LLVM's code left unoptimised.

The program, its buffers and its memory analysis are the same; it compiles in about half the time and runs slower.
"""

QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "True"}
# The same for a program that a test starts.
QUICK_XLA_FLAGS = " ".join(f"--{name}={value.lower()}" for name, value in QUICK.items())
