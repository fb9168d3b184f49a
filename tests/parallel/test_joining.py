"""How processes find each other: settings, environments, and what is said when it goes wrong."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax.config import DistributedConfig, MeshConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes.joining import Join, describe, failing_fast, find
from deepseek_jax.parallel.processes.together import StopVote, batch_share, from_first, whole_copy
from experiments.launch import free_port

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
LAUNCHER = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("settings", "environ", "join"),
    [
        ({}, {}, None),
        ({}, LAUNCHER, Join("coordinator", "a:1", 4, 3, [])),
        ({"cluster": "none"}, LAUNCHER, None),
        (
            {"coordinator": "b:2", "processes": 8, "process": 0},
            LAUNCHER,
            Join("coordinator", "b:2", 8, 0, []),
        ),
        ({"coordinator": "b:2", "processes": 1, "process": 0}, {}, None),
        ({"coordinator": "b:2"}, SLURM, Join("coordinator", "b:2", 16, 3, [])),
        ({"coordinator": "b:2", "processes": 4}, KUBERNETES, Join("coordinator", "b:2", 4, 2, [])),
        ({}, SLURM, Join("SLURM", None, 16, 3, None)),
        ({}, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, Join("SLURM", None, 16, 3, [])),
        ({}, SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Join("SLURM", None, 16, 3, [0, 1])),
        ({}, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, {k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # the batch script itself
        ({}, OMPI, Join("Open MPI", None, 2, 1, None)),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no Indexed Job
    ],
)
def test_who_is_joined(settings, environ, join):
    assert find(DistributedConfig(**settings), environ) == join


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        ({"processes": 2, "process": 1}, {}, "processes=2, .*without distributed.coordinator: set it"),
        (
            {"coordinator": "a:1"},
            {},
            r"a:1, but these are not set: distributed.processes \(or JAX_NUM_.*process ",
        ),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            {},
            "process=2 is not one .*numbered from 0 to 1",
        ),
        ({}, LAUNCHER | {"JAX_COORDINATOR_ADDRESS": "host"}, "coordinator='host' should be HOST:PORT"),
        ({}, LAUNCHER | {"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID='two' should be a number"),
        ({}, LAUNCHER | {"JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS='0;1' should be numbers"),
        (
            {},
            {k: v for k, v in OMPI.items() if "MCA" not in k},
            "Open MPI does not tell .*set distributed.coord",
        ),
    ],
)
def test_mistakes_are_named(settings, environ, message):
    with pytest.raises(ValueError, match=message):
        find(DistributedConfig(**settings), environ)


def test_kubernetes_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Indexed Job: set distributed.coordinator .* install jax\[k8s\]"):
        find(DistributedConfig(), KUBERNETES)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert find(DistributedConfig(), KUBERNETES) == Join("Kubernetes", local_devices=[])


@pytest.mark.parametrize(
    "settings",
    [
        {"coordinator": "host"},
        {"coordinator": ":1"},
        {"coordinator": "a:0"},
        {"coordinator": "a:x"},
        {"processes": -1},
        {"process": -2},
        {"start_timeout": 0},
        {"heartbeat_timeout": 0},
        {"cluster": "slrum"},
    ],
)
def test_config_is_checked(settings):
    with pytest.raises(ValueError, match=f"distributed.{next(iter(settings))}="):
        DistributedConfig(**settings)


# --- starting ---------------------------------------------------------------------------------------------

START = """
import os, sys
from deepseek_jax.config import DistributedConfig
from deepseek_jax.parallel.processes import joining
cfg = DistributedConfig(sys.argv[1], 2, int(sys.argv[2]), start_timeout=1)
try:
    joining.start(joining.find(cfg, {}), cfg)
except (TimeoutError, ValueError) as error:
    print(type(error).__name__, error, flush=True)
    os._exit(2)
"""


def start(coordinator, process) -> str:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", START, coordinator, str(process)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    return done.stdout


def test_nobody_at_the_coordinators_address():
    said = start(f"127.0.0.1:{free_port()}", 1)
    assert "TimeoutError process 1 of 2 did not reach the coordinator 127.0.0.1:" in said
    assert "within 1 s" in said and "is process 0 running there" in said


def test_the_others_do_not_come():
    said = start(f"127.0.0.1:{free_port()}", 0)
    assert "TimeoutError process 0 of 2 reached" in said and "not all 2 processes came within 1 s" in said


def test_the_port_is_taken():
    import socket

    with socket.create_server(("", 0)) as taken:
        said = start(f"127.0.0.1:{taken.getsockname()[1]}", 0)
    assert "ValueError process 0 cannot listen on port" in said and "choose a free port" in said


# --- one process ------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged():
    mesh = make_mesh(MeshConfig(), jax.devices())
    assert batch_share(mesh) == (0, 1)
    vote = StopVote(mesh)
    assert [vote(wish) for wish in (False, True, False)] == [False, True, False]
    assert from_first(7) == 7
    tree = {"x": jax.numpy.ones(3)}
    assert (whole_copy(tree, mesh)["x"] == tree["x"]).all()
    with pytest.raises(KeyError), failing_fast(pytest.fail):
        raise KeyError


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def mesh_of(shape, *processes):
    """A stand-in with (pipe, data, node, local, tensor) of `shape` and the processes of its devices in order."""
    devices = np.array([Device(p) for p in processes], object).reshape(shape)
    names = ("pipe", "data", "node", "local", "tensor")

    class Stand:
        pass

    stand = Stand()
    stand.devices, stand.axis_names, stand.size = devices, names, devices.size
    stand.shape = dict(zip(names, shape, strict=True))
    return stand


@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        (mesh_of((1, 4, 1, 1, 1), 0, 0, 1, 1), (1, 2)),
        (mesh_of((1, 1, 2, 2, 1), 0, 0, 1, 1), (1, 2)),
        (mesh_of((2, 2, 1, 1, 1), 0, 0, 1, 1), (0, 1)),  # stages on two hosts: both feed everything
        (mesh_of((1, 2, 1, 1, 2), 0, 0, 1, 1), (1, 2)),
    ],
)
def test_share_of_a_batch(monkeypatch, mesh, share):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert batch_share(mesh) == share


@pytest.mark.parametrize("processes", [(0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0)])
def test_meshes_that_do_not_divide_by_process(monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process \d holds the parts .* equally many per process"):
        batch_share(mesh_of((1, 4, 1, 1, 1), *processes))


def test_failures_are_described():
    assert "start all of them again" in describe(
        jax.errors.JaxRuntimeError("Connection closed by peer\nmore")
    )
    assert describe(ValueError("x is 3")) == "x is 3" and describe(KeyboardInterrupt()) == "interrupted"
    assert "ZeroDivisionError" in describe(ZeroDivisionError("1 / 0"))
