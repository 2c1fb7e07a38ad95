"""Benchmarks: each a script `python -m benchmarks.NAME` that prints a table and writes JSON and a plot to results/."""
