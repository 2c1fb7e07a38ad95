"""README's Python blocks run as printed, in order, in one namespace."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run():
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["stream"].length == 8
    gradients = jax.tree.leaves(namespace["gradients"])
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in gradients)
    # The last layers' writes are read by nobody: every other gradient is there.
    assert all(jnp.any(leaf[:-1] != 0) for leaf in gradients)
    assert "attention_1" in namespace["variables"]["params"]


def test_the_first_screen_holds_the_two_commands():
    first_screen = README.splitlines()[:30]
    assert "python -m pip install -e . && python train.py --config=configs/quickstart.py" in first_screen
    assert 'python -m pip install -e ".[test]" && python -m pytest' in first_screen
