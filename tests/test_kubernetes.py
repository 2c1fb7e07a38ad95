"""The example manifest: its parts fit together, and its command is one that train.py takes."""

from pathlib import Path

import yaml

from configs import moda_700m
from moda_jax import param_count
from moda_jax.config import Config
from moda_jax.exit_codes import ExitCode
from moda_jax.parallel.launch import find_launch
from moda_jax.parallel.mesh import check_config, mesh_sizes
from moda_jax.training.console import check_config_arguments

MANIFEST = Path(__file__).parents[1] / "docs" / "kubernetes.yaml"


def test_the_manifest_starts_the_processes_that_it_says():
    service, _, job = yaml.safe_load_all(MANIFEST.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(flags["num-processes"])
    assert flags["process-id"] == "$(JOB_COMPLETION_INDEX)" and container["env"][0]["name"] == "JOB_COMPLETION_INDEX"
    names = {job["metadata"]["name"], pod["subdomain"], service["metadata"]["name"]}
    assert names == {"moda"} and service["spec"]["selector"] == {"job-name": "moda"}
    host, port = flags["coordinator-address"].split(":")
    assert host == "moda-0.moda" and int(port) == container["ports"][0]["containerPort"]
    assert find_launch({}, flags["coordinator-address"], 2, 1).num_processes == 2

    check_config_arguments([f"--{name}={value}" for name, value in flags.items() if name != "config"])
    values = moda_700m.get_config(flags["config"].partition(":")[2])
    values.mesh.fsdp = int(flags["config.mesh.fsdp"])
    values.train.accumulation_steps = int(flags["config.train.accumulation_steps"])
    config = Config.from_dict(values.to_dict())
    devices = 2 * container["resources"]["limits"]["nvidia.com/gpu"]
    check_config(config, mesh_sizes(config.mesh, devices))


def test_a_stop_is_no_failure_and_a_mistake_is_not_tried_again():
    _, claim, job = yaml.safe_load_all(MANIFEST.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {ExitCode.USER_ERROR: "FailJob", ExitCode.STOPPED: "Ignore", ExitCode.PEER_LOST: "Ignore"}
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    assert pod["containers"][0]["name"] == spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["name"] == pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    # Parameters and two moments in float32 at 100 MB/s, and as long again for the step and an evaluation.
    save = 12 * param_count(Config.from_dict(moda_700m.get_config("row4").to_dict()).model) / 100e6
    assert pod["terminationGracePeriodSeconds"] >= 2 * save
