"""Hopper kernels in Pallas Mosaic GPU."""
