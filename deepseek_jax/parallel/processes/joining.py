"""Several processes, usually one per host, that train together: how they meet and how they part.

`start` joins them through `jax.distributed`; after it `jax.devices()` are the devices of all processes. What they then
do together is in `together.py`. When a process dies, the others cannot go on: they exit by themselves, within
`distributed.heartbeat_timeout`, and whoever supervises (SLURM, Kubernetes, `experiments.launch`) starts all of them
again from the last checkpoint.
"""

import contextlib
import importlib.util
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from deepseek_jax.config import DistributedConfig

# What `experiments.launch` and the Kubernetes example set; JAX itself reads the first.
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Who says how many processes there are, and which one this is. The first that is set counts.
_SIZES = (PROCESSES, "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
_RANKS = (PROCESS, "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

ABANDONED = 75  # exit status (EX_TEMPFAIL) of a process that left because of another one: start all again
MISTAKE = (
    2  # exit status of one that was told to do what cannot be done, which starting again does not change
)
_MARGIN = 30  # seconds; JAX aborts the process when its own timeout ends, ours must end first


class Join(NamedTuple):
    """How this process joins the others; None where JAX finds it out from the cluster's environment.

    `local_devices`: which devices of the host this process uses. None: one, by its rank on the host; []: all.
    """

    source: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local_devices: list[int] | None = None


def find(cfg: DistributedConfig, environ: Mapping[str, str]) -> Join | None:
    """Whom to join, by the config and the environment; None for a run of one process.

    All devices of its host are the process's own, unless SLURM or Open MPI started several processes there: then each
    has one. JAX_LOCAL_DEVICE_IDS (as "0,1") says otherwise.

    Order: a coordinator in the config or in JAX_COORDINATOR_ADDRESS; a SLURM step of several tasks; Open MPI;
    a Kubernetes Indexed Job. The last three are left to JAX's own detection.

    Raises:
        ValueError: settings that contradict each other or that are incomplete; says what to set.
    """
    environ = environ if cfg.cluster == "auto" else {}
    join = _find(cfg, environ)
    if join is not None and "JAX_LOCAL_DEVICE_IDS" in environ:
        return join._replace(local_devices=_devices(environ["JAX_LOCAL_DEVICE_IDS"]))
    return join


def _find(cfg: DistributedConfig, environ: Mapping[str, str]) -> Join | None:
    coordinator = cfg.coordinator or environ.get(COORDINATOR, "")
    if coordinator:
        return _explicit(cfg, environ, coordinator)
    if cfg.processes > 1 or cfg.process > 0:
        raise ValueError(
            f"distributed.processes={cfg.processes}, distributed.process={cfg.process} without "
            f"distributed.coordinator: set it to HOST:PORT of process 0"
        )
    size, rank = _number(environ, _SIZES), _number(environ, _RANKS)
    if all(name in environ for name in _SLURM_STEP) and size > 1:
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]  # as "8(x4)"
        return Join("SLURM", None, size, rank, [] if per_node == "1" else None)
    if "OMPI_COMM_WORLD_SIZE" in environ and size > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise ValueError(
                "this version of Open MPI does not tell where its first process runs: set "
                "distributed.coordinator=HOST:PORT; rank and size come from OMPI_COMM_WORLD_*"
            )
        alone = _number(environ, ("OMPI_COMM_WORLD_LOCAL_SIZE",)) == 1
        return Join("Open MPI", None, size, rank, [] if alone else None)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise ValueError(
                "in a Kubernetes Indexed Job: set distributed.coordinator and distributed.processes (or the "
                f"environment's {COORDINATOR} and {PROCESSES}) as in configs/launch/kubernetes.yaml, install "
                "jax[k8s] so that JAX asks the cluster, or set distributed.cluster=none to train alone"
            )
        return Join("Kubernetes", local_devices=[])
    return None


def _explicit(cfg: DistributedConfig, environ: Mapping[str, str], coordinator: str) -> Join | None:
    DistributedConfig(coordinator=coordinator)  # the environment's value, checked like the config's
    processes = cfg.processes or _number(environ, _SIZES)
    process = cfg.process if cfg.process >= 0 else _number(environ, _RANKS)
    missing = [
        f"distributed.{name} (or {', '.join(names)})"
        for name, value, names in (("processes", processes, _SIZES), ("process", process, _RANKS))
        if value < 0
    ]
    if missing:
        raise ValueError(f"the coordinator is {coordinator}, but these are not set: {'; '.join(missing)}")
    if not 0 <= process < processes:
        raise ValueError(
            f"distributed.process={process} is not one of distributed.processes={processes}: "
            f"they are numbered from 0 to {processes - 1}"
        )
    return Join("coordinator", coordinator, processes, process, []) if processes > 1 else None


def _devices(listed: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in listed.split(",")):
        raise ValueError(f"the environment's JAX_LOCAL_DEVICE_IDS={listed!r} should be numbers as 0,1")
    return [int(part) for part in listed.split(",")]


def _number(environ: Mapping[str, str], names: tuple[str, ...]) -> int:
    """The first of the variables that is set, as a number; -1 if none is."""
    for name in names:
        if name in environ:
            if not environ[name].isdecimal():
                raise ValueError(f"the environment's {name}={environ[name]!r} should be a number from 0 on")
            return int(environ[name])
    return -1


def start(join: Join, cfg: DistributedConfig) -> None:
    """Joins the other processes. Call before JAX touches a device.

    CPU devices of several processes exchange through gloo.

    Raises:
        ValueError: a coordinator's port that cannot be listened on, or an environment that JAX cannot read.
        TimeoutError: coordinator not reached, or processes missing, within `start_timeout`. The attempt goes on in
            a thread and cannot be taken back: exit the process.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; here a signal sets an event and the loop asks all processes (`together.StopVote`).
    jax.config.update("jax_enable_preemption_service", False)
    if join.coordinator and join.process == 0:
        _check_port(join.coordinator)
    failure: list[BaseException] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                join.coordinator,
                join.processes,
                join.process,
                local_device_ids=join.local_devices,
                initialization_timeout=cfg.start_timeout + _MARGIN,
                heartbeat_timeout_seconds=cfg.heartbeat_timeout,
            )
        except BaseException as error:
            failure.append(error)

    # In a thread, because JAX neither returns nor raises when the others do not come: it aborts the process.
    thread = threading.Thread(target=initialize, name="jax-distributed", daemon=True)
    thread.start()
    thread.join(cfg.start_timeout)
    if thread.is_alive():
        raise TimeoutError(_who_is_missing(join, cfg.start_timeout))
    if failure:
        raise ValueError(f"could not join the other processes ({join.source}): {failure[0]}") from failure[0]


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.create_server(("", port)):  # JAX crashes without a word where this fails
            pass
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} of distributed.coordinator={coordinator}: {error.strerror}; "
            f"choose a free port"
        ) from error


def _who_is_missing(join: Join, seconds: int) -> str:
    if join.coordinator is None:
        return f"the processes of this job ({join.source}) did not meet within {seconds} s: did all of them start?"
    host, _, port = join.coordinator.rpartition(":")
    me = f"process {join.process} of {join.processes}"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            pass
    except OSError as error:
        return (
            f"{me} did not reach the coordinator {join.coordinator} within {seconds} s ({error}): is process 0 "
            f"running there, and does the network let this port through?"
        )
    return (
        f"{me} reached the coordinator {join.coordinator}, but not all {join.processes} processes came within "
        f"{seconds} s: did all start, each with a distributed.process of its own?"
    )


def stop() -> None:
    """Leaves together with the other processes: waits for them. Does nothing in a run of one process."""
    jax.distributed.shutdown()


@contextlib.contextmanager
def failing_fast(say: Callable[[str], None]) -> Iterator[None]:
    """In a run of several processes, an exception in the block ends this process at once.

    Unwinding would run into waits for processes that are gone or stand elsewhere in the program. `say` gets the
    message; the exit status is `MISTAKE` for a ValueError, else `ABANDONED`. The others notice and end likewise. With
    one process, the exception goes its way.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        say(f"process {jax.process_index()} of {jax.process_count()}: {describe(error)}")
        os._exit(MISTAKE if isinstance(error, ValueError) else ABANDONED)


def describe(error: BaseException) -> str:
    """What happened, for the user: one line for what is expected to happen, else the traceback."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, jax.errors.JaxRuntimeError):
        return (
            f"an exchange with the other processes or a computation failed ({first}). If a process died, its own "
            f"output says why; start all of them again to go on from the last checkpoint"
        )
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "".join(traceback.format_exception(error))
