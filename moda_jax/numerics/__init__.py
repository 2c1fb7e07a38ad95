"""Arithmetic that knows no model: the dtype policy, sums in a fixed order, cross-entropy over a large vocabulary."""
