"""The example manifest: its parts fit together, and its command is one that train.py takes."""

from pathlib import Path

import yaml

from configs import moda_700m
from moda_jax.config import Config
from moda_jax.parallel.distributed import find_launch
from moda_jax.parallel.mesh import check_config, mesh_sizes
from moda_jax.training.console import check_config_arguments

MANIFEST = Path(__file__).parents[1] / "docs" / "kubernetes.yaml"


def test_the_manifest_starts_the_processes_that_it_says():
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(flags["num_processes"])
    assert flags["process_id"] == "$(JOB_COMPLETION_INDEX)" and container["env"][0]["name"] == "JOB_COMPLETION_INDEX"
    names = {job["metadata"]["name"], pod["subdomain"], service["metadata"]["name"]}
    assert names == {"moda"} and service["spec"]["selector"] == {"job-name": "moda"}
    host, port = flags["coordinator_address"].split(":")
    assert host == "moda-0.moda" and int(port) == container["ports"][0]["containerPort"]
    assert find_launch({}, flags["coordinator_address"], 2, 1).num_processes == 2

    check_config_arguments([f"--{name}={value}" for name, value in flags.items() if name != "config"])
    values = moda_700m.get_config(flags["config"].partition(":")[2])
    values.mesh.fsdp = int(flags["config.mesh.fsdp"])
    values.train.accumulation_steps = int(flags["config.train.accumulation_steps"])
    config = Config.from_dict(values.to_dict())
    devices = 2 * container["resources"]["limits"]["nvidia.com/gpu"]
    check_config(config, mesh_sizes(config.mesh, devices))
