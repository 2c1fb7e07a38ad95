"""The sequence part: compute-bound kernels on the tensor cores of a warpgroup."""
