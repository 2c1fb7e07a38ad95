"""What an installed package is: its commands, its version, and a wheel that works far from the repository."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import moda_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("moda_jax", "pallas_kernels", "configs", "experiments", "setup.py", "pyproject.toml", "README.md", "LICENSE")
OWN_WARNING = re.compile(
    r"(?:moda_jax|pallas_kernels|configs|experiments)/\S*:\d+: \w*Warning.*"
)  # libraries have theirs
MAPPED = ("configs", "experiments")  # of the repository's top level, inside of moda_jax in a wheel


def in_the_repository(module):
    """The name of a wheel's module in a clone."""
    for name in MAPPED:
        module = re.sub(rf"^moda_jax\.{name}\b", name, module)
    return module


def test_the_console_scripts_are_functions():
    assert sorted(PROJECT["scripts"]) == ["moda-evaluate", "moda-experiments", "moda-generate", "moda-train"]
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(in_the_repository(module)), function)), target


@pytest.mark.parametrize("name", ["train", "generate", "evaluate"])
def test_a_script_at_the_top_level_is_the_console_script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    module, _, function = PROJECT["scripts"][f"moda-{name}"].partition(":")
    assert script.main is getattr(importlib.import_module(module), function)


def test_there_is_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert moda_jax.__version__ == citation["version"] == newest[1]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for name in SOURCES[:4] for path in (ROOT / name).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def pip(*arguments):
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds of it, so that a build leaves nothing in this one."""
    copy = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", place, clone)
    (path,) = place.glob("*.whl")
    return path


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_takes_no_other_name(wheel):
    assert wheel.name == f"moda_jax-{moda_jax.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in held} == {"moda_jax", "pallas_kernels"}
    expected = {"moda_jax/py.typed", "pallas_kernels/py.typed"}
    for name in SOURCES[:4]:
        inside = "moda_jax/" if name in MAPPED else ""
        expected |= {f"{inside}{path.relative_to(ROOT)}" for path in (ROOT / name).rglob("*.py")}
    expected |= {f"moda_jax/{path.relative_to(ROOT)}" for path in (ROOT / "experiments" / "plans").glob("*.json")}
    assert held == expected


def environment_with(place, *arguments):
    """A fresh environment with what pip is told to install, and this one's libraries behind it; nothing of this clone.
    Returns where its commands are."""
    venv.create(place, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    # A line of a .pth file adds a directory without the .pth files that lie in it: no editable install comes along.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    pip("--python", place / "bin" / "python", "install", *options, *arguments)
    return place / "bin"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return environment_with(tmp_path_factory.mktemp("installed"), wheel)


def call(installed, directory, command, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command, *map(str, arguments)], cwd=directory, capture_output=True, text=True, timeout=600,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default"}, check=False,
    )  # fmt: skip
    assert OWN_WARNING.findall(done.stderr) == []
    return done


@pytest.mark.slow
def test_an_installed_wheel_trains_quickstart_and_uses_it(installed, tmp_path):
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    where = call(installed, directory, "python", "-c", "import moda_jax, pallas_kernels; print(moda_jax.__file__)")
    assert where.stdout.startswith(str(installed.parent)), where.stderr
    short = (
        "--config.train.num_steps=4",
        "--config.optimizer.warmup_steps=2",
        "--config.eval.num_batches=2",
        "--config.train.sample_tokens=8",
    )
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    done = call(installed, directory, "moda-train", "--config=quickstart", *short, cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs/quickstart: finished, step 4 of 4\n")
    text = call(installed, directory, "moda-generate", "--workdir=runs/quickstart", "--prompt=import", "--max-tokens=9")
    assert text.returncode == 0 and text.stdout.startswith("import"), text.stderr
    (directory / "text.txt").write_text("import os\n" * 20)
    table = call(installed, directory, "moda-evaluate", "--workdir=runs/quickstart", "--data=own=text.txt")
    assert table.returncode == 0 and "bits/byte" in table.stdout, table.stderr


@pytest.mark.slow
def test_a_config_outside_of_the_repository_works_from_a_wheel(installed, tmp_path):
    """Beside a folder `configs` of the user's own, which its files go on importing from."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sizes.py").write_text("LAYERS = 2\n")
    (tmp_path / "mine.py").write_text(
        "from configs import base, quickstart, sizes\n\n\n"
        "def get_config():\n    config = quickstart.get_config()\n"
        "    assert config.keys() == base.get_config().keys()\n    config.model.num_layers = sizes.LAYERS\n"
        "    config.model.num_heads = 3\n    return config\n"
    )
    done = subprocess.run(
        [installed / "moda-train", "--config=mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        check=False, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == ("error: model.num_heads=3: expected a multiple of model.num_kv_heads=2")


@pytest.mark.slow
def test_installed_experiments_run_a_plan(installed, tmp_path):
    plan = (ROOT / "experiments" / "plans" / "table6.py").read_text()
    (tmp_path / "mine.py").write_text(plan.replace('name="table6"', 'name="mine"'))
    done = call(
        installed, tmp_path, "moda-experiments", "mine.py", "--tiny", "--devices=cpu", "--seeds=0", "--arms=depth"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "experiments" / "mine_tiny" / "depth" / "seed_0" / "result.json").is_file()
    report = call(installed, tmp_path, "moda-experiments", "report", "table6")
    assert report.returncode == 2
    assert report.stderr.splitlines()[-1] == "error: report table6: no table6.json yet; name results with --from=FILE"


@pytest.mark.slow
def test_an_editable_install_has_the_commands_too(clone, tmp_path):
    commands = environment_with(tmp_path / "environment", "-e", clone)
    where = call(commands, tmp_path, "python", "-c", "import moda_jax; print(moda_jax.__file__)")
    assert where.stdout == f"{clone / 'moda_jax' / '__init__.py'}\n", where.stderr
    for command, expected in {"moda-train": "Configs by name: base,", "moda-experiments": "table6_48"}.items():
        done = call(commands, tmp_path, command, "--help")
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    # A plan imports a config.
    done = call(commands, tmp_path, "moda-experiments", "report", "table6", f"--output={tmp_path}")
    assert done.stderr.splitlines()[-1].startswith("error: report table6: no ")
