"""Imports go one way: every module's, read from its source, against one table of layers."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("moda_jax", "pallas_kernels")

# Ground first; docs/design.md says it in words. A module's layer is the one that names it, or the package that it lies
# in; it imports from its own layer and from those before. "=" in front: that module alone, and not what lies in it.
LAYERS = (
    ("pallas_kernels",),
    (
        "moda_jax.numerics", "moda_jax.config", "moda_jax.config_checks", "moda_jax.depth_config",
        "moda_jax.vision_config", "moda_jax.task_config", "moda_jax.parameter", "moda_jax.exit_codes",
        "moda_jax.paths", "moda_jax.progress", "moda_jax.quantities", "moda_jax.source_config",
        "moda_jax.config_files", "moda_jax.command_help", "moda_jax.other_names", "moda_jax.class_path",
        "moda_jax.pictures",
    ),
    ("moda_jax.parallel",),
    ("moda_jax.model", "moda_jax.data"),
    (
        "moda_jax.inference.decode", "moda_jax.inference.packed", "moda_jax.inference.token_attention",
        "moda_jax.inference.generation", "moda_jax.inference.sampling",
    ),
    ("moda_jax.tasks",),
    ("moda_jax.training",),
    ("moda_jax.inference", "moda_jax.interop"),
    ("moda_jax.commands",),
    ("=moda_jax",),
)  # fmt: skip
# Of one layer, and strangers to each other.
APART = (("moda_jax.model", "moda_jax.data"), ("moda_jax.numerics", "moda_jax.config"))


def read_imports(root):
    """Module -> the modules that it imports, wherever in its source, also for type checkers alone."""
    paths = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            paths[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    imports = {}
    for module, path in paths.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                named |= {
                    whole if (whole := f"{node.module}.{alias.name}") in paths else node.module for alias in node.names
                }
        imports[module] = {name for name in named if name in paths and name != module}
        lost = sorted(name for name in named - imports[module] - {module} if name.split(".")[0] in PACKAGES)
        assert not lost, f"{path}: imports {lost}, which are no modules here"
    return imports


def layer_of(module):
    """The place of a module in LAYERS, or None."""
    place, longest = None, ""
    for number, names in enumerate(LAYERS):
        for name in names:
            inside = module == name[1:] if name[0] == "=" else f"{module}.".startswith(f"{name}.")
            if inside and len(name) > len(longest):
                place, longest = number, name
    return place


def upward(imports):
    """The imports that go up, or to a stranger beside, as text."""
    found = []
    for module, named in sorted(imports.items()):
        for other in sorted(named):
            is_apart = any(
                f"{module}.".startswith(f"{a}.") and f"{other}.".startswith(f"{b}.")
                for pair in APART for a, b in (pair, pair[::-1])
            )  # fmt: skip
            if is_apart or layer_of(other) > layer_of(module):
                found.append(f"{module} imports {other}")
    return found


def in_circles(imports):
    """The modules that stand in a circle of imports, or import one that does and are imported by one that does."""
    left = {module: set(named) for module, named in imports.items()}
    while True:
        used = set().union(*left.values()) if left else set()
        gone = {module for module, named in left.items() if not named & left.keys() or module not in used}
        if not gone:
            return sorted(left)
        left = {module: named - gone for module, named in left.items() if module not in gone}


def test_every_module_has_a_layer():
    assert [module for module in read_imports(ROOT) if layer_of(module) is None] == []


def test_no_import_goes_up():
    assert upward(read_imports(ROOT)) == []


def test_no_import_goes_in_a_circle():
    assert in_circles(read_imports(ROOT)) == []


def test_upward_imports_and_circles_are_found(tmp_path):
    sources = {
        "pallas_kernels/a.py": "def f():\n    from moda_jax.numerics import b\n",
        "moda_jax/__init__.py": "",
        "moda_jax/numerics/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moda_jax.config\n",
        "moda_jax/config.py": "import pallas_kernels.a",
        "moda_jax/model/c.py": "import moda_jax.training.d as d\n",
        "moda_jax/training/d.py": "from moda_jax.model.c import x\nfrom moda_jax.numerics.b import y\n",
        "moda_jax/training/e.py": "from moda_jax.training.d import f\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    imports = read_imports(tmp_path)
    assert upward(imports) == [
        "moda_jax.model.c imports moda_jax.training.d",
        "moda_jax.numerics.b imports moda_jax.config",
        "pallas_kernels.a imports moda_jax.numerics.b",
    ]
    assert in_circles(imports) == [
        "moda_jax.config", "moda_jax.model.c", "moda_jax.numerics.b", "moda_jax.training.d", "pallas_kernels.a",
    ]  # fmt: skip
