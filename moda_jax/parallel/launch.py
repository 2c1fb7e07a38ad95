"""Start-up of a run of many processes, on JAX's distributed runtime.

Every process runs the same command. How many there are, which one this is and where the coordinator listens comes from

1. flags: `--coordinator-address=HOST:PORT --num-processes=P --process-id=I` (Kubernetes, or by hand);
2. SLURM: a step of several tasks (`srun`), one task per process;
3. Open MPI: `mpirun` with several ranks.

Under none of them the run is one process. Must happen before anything asks JAX for its devices.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
from absl import flags

from moda_jax.parallel import peers
from moda_jax.parallel.roll_call import roll_call

_logger = logging.getLogger(__name__)

_COORDINATOR = flags.DEFINE_string("coordinator-address", None, "HOST:PORT of process 0, for a run of many processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num-processes", None, "Processes of the run, all machines together.")
_PROCESS_ID = flags.DEFINE_integer("process-id", None, "This process's number, from 0.")
FLAGS = (_COORDINATOR.name, _NUM_PROCESSES.name, _PROCESS_ID.name)

# What a launcher sets: (name for jax.distributed, number of processes, this one's number).
_LAUNCHERS = (
    ("slurm", "SLURM_NTASKS", "SLURM_PROCID"),
    ("ompi", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
# Inside `salloc` or `sbatch`, but not under `srun`, SLURM_NTASKS is set as well: only a step has this.
_SLURM_STEP = "SLURM_STEP_NODELIST"


class Launch(NamedTuple):
    """How this process is to join the others.

    Attributes:
        method: "flags", "slurm" or "ompi"; None: it is alone.
        coordinator_address: with "flags"; the launchers' is found by JAX.
        num_processes, process_id: how many, and which one this is.
    """

    method: str | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_launch(
    environment: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch:
    """Decides how to start; flags come before launchers.

    Args:
        environment: the environment's variables.
        coordinator_address, num_processes, process_id: the flags; None: not given.

    Raises:
        ValueError: some of the flags without the others, or numbers out of range.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--num-processes={num_processes} --process-id={process_id}: expected a process-id in "
                f"0..{max(num_processes, 1) - 1}"
            )
        return Launch("flags", **given) if num_processes > 1 else Launch()
    if len(missing) < len(given):
        names = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"{names}: missing; --coordinator-address, --num-processes and --process-id go together")
    for method, count, index in _LAUNCHERS:
        if method == "slurm" and _SLURM_STEP not in environment:
            continue
        if index in environment and int(environment.get(count, "1")) > 1:
            return Launch(method, None, int(environment[count]), int(environment[index]))
    return Launch()


def start_processes(peer_timeout_seconds: float = 30.0) -> None:
    """Joins the other processes of the run, if there are any, and begins to watch them; the flags must be parsed.

    While others are awaited a line every ten seconds says whom. On CPUs the processes talk through Gloo, on GPUs
    through NCCL. All processes but the first log warnings only. No device is touched yet: XLA's flags may still be set.

    Args:
        peer_timeout_seconds: `train.peer_timeout_seconds`, see `peers`.

    Raises:
        ValueError: see `find_launch`; or process 0 cannot listen at the coordinator's address.
        PeersMissingError: not all processes came.
    """
    launch = find_launch(os.environ, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if launch.method is None:
        return
    address = _coordinator_address(launch)
    roll_call(address, launch.num_processes, launch.process_id)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX notices a lost peer by itself, and aborts all others: later than our own watch, which ends them in order.
    options = {"heartbeat_timeout_seconds": int(max(100, 3 * peer_timeout_seconds))}
    if launch.method == "flags":
        jax.distributed.initialize(launch.coordinator_address, launch.num_processes, launch.process_id, **options)
    else:
        jax.distributed.initialize(cluster_detection_method=launch.method, **options)
    atexit.register(
        peers.start(address, peer_timeout_seconds).stop
    )  # before JAX's own end, in which a lost one is missed for long
    if launch.process_id > 0:
        for name in ("moda_jax", "pallas_kernels"):
            logging.getLogger(name).setLevel(logging.WARNING)
    _logger.info("process %d of %d", launch.process_id, launch.num_processes)


def _coordinator_address(launch: Launch) -> str:
    """HOST:PORT of process 0: as given, or as JAX finds it under the launcher."""
    if launch.coordinator_address is not None:
        return launch.coordinator_address
    from jax._src.clusters import ompi_cluster, slurm_cluster  # JAX has no public name for what it finds

    cluster = {"slurm": slurm_cluster.SlurmCluster, "ompi": ompi_cluster.OmpiCluster}[launch.method]
    return cluster.get_coordinator_address(
        timeout_secs=None, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
    )
