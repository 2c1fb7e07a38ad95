"""Experiments: plans, what runs them, and the reports: `python -m experiments PLAN`."""
