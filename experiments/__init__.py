"""Experiments that answer a question: plans of runs, the runner, and the report with its intervals.

A wheel holds this package inside of `moda_jax`, so that no other one in site-packages can have its name. Its modules
and plans say `from experiments.plan import Plan` there too: imported by its long name, it is known by the short one.
"""

import sys

sys.modules.setdefault("experiments", sys.modules[__name__])
