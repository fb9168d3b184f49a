"""The launcher for one machine: environment, logs, signals, restarts, and that nothing is left behind."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_jax.parallel.processes.joining import find
from experiments.command_line import status
from experiments.launch import main
from experiments.train import _STOPPED_STATUS
from tests.parallel.processes import Launched, alive, until

EXAMPLES = Path(__file__).parents[2] / "configs" / "launch"


def launched(tmp_path, script, *options) -> Launched:
    return Launched(tmp_path / "log", [sys.executable, "-c", script, str(tmp_path)], options, {})


def test_every_rank_gets_its_place_and_is_heard(tmp_path):
    script = """
import os
print(os.environ["JAX_PROCESS_ID"], os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"])
"""
    with launched(tmp_path, script, "--processes=3") as run:
        assert run.wait() == 0
        found = re.findall(r"\[(\d)\] (\d) (\d) (127.0.0.1:\d+)\n", run.printed)
    assert sorted((a, b, c) for a, b, c, _ in found) == [(str(i), str(i), "3") for i in range(3)]
    assert len({address for *_, address in found}) == 1


SLEEPER = """
import os, pathlib, signal, subprocess, sys, time
rank, folder = os.environ["JAX_PROCESS_ID"], pathlib.Path(sys.argv[1])
def on_term(*_):
    print("told to stop")
    sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
attempts = folder / f"attempts{rank}"
attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
print("ready")
"""


def test_a_failure_ends_the_others_and_is_tried_again(tmp_path):
    script = SLEEPER + "time.sleep(60 * (rank == '0'))\nsys.exit(3)"
    with launched(tmp_path, script, "--processes=2", "--restarts=1", "--grace=0.1") as run:
        assert run.wait() == 3
        pids = run.pids(0) + run.pids(1)
        printed = run.printed
    assert "[launch] process 1 ended with status 3, starting all again\n" in printed
    assert printed.endswith("[launch] process 1 ended with status 3\n")
    assert printed.count("process 0 did not end within 0.1 s and is killed") == 2
    assert (tmp_path / "attempts1").read_text() == "xx"
    assert not any(map(alive, pids))


def test_who_left_because_of_another_is_not_the_cause(tmp_path):
    """Though it ends first: a killed process is seen to be gone before it has ended."""
    script = SLEEPER + "time.sleep(0.5 * (rank == '1'))\nsys.exit(75 if rank == '0' else 3)"
    with launched(tmp_path, script, "--processes=2", "--grace=20") as run:
        assert run.wait() == 3
        assert run.printed.endswith("[launch] process 1 ended with status 3\n")


MISTAKEN = """
import os, sys, time
rank = os.environ["JAX_PROCESS_ID"]
if rank == "2":
    print("F1126 client.h:80] Terminating process because the JAX distributed service detected fatal errors. This")
    print("    @     0x7f4f48a40634  absl::LogMessage::SendToLog()")
else:
    print("error: unknown config key train.stepz" if sys.argv[1:2] else f"error: process {rank} of 3: no such file")
time.sleep(0.3)
sys.exit(2)
"""


@pytest.mark.parametrize("arguments", [[], ["before they meet"]], ids=["together", "before they meet"])
def test_a_mistake_in_the_command_is_one_line_and_not_tried_again(arguments, capfd):
    command = [sys.executable, "-c", MISTAKEN, *arguments]
    assert main(["--processes=3", "--restarts=3", "--", *command]) == 2
    printed = capfd.readouterr().out
    assert printed.count("[launch] processes") == 1
    assert printed.count("error: ") == 1 and printed.count("[2] ") == 1
    assert "[2] lost the other processes\n" in printed


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_ranks_and_end_the_restarts(tmp_path, signum):
    script = SLEEPER + "signal.signal(signal.SIGINT, on_term)\ntime.sleep(60)"
    with launched(tmp_path, script, "--processes=2", "--restarts=3") as run:
        until(lambda: run.printed.count("ready") == 2, "both ready")
        run.process.send_signal(signum)
        assert run.wait() == 0
        assert run.printed.count("told to stop") == 2 and run.printed.count("[launch]") == 1


def test_nothing_outlives_a_killed_launcher(tmp_path):
    with launched(tmp_path, SLEEPER + "time.sleep(60)", "--processes=2") as run:
        until(lambda: run.printed.count("ready") == 2, "both ready")
        pids = run.pids()
        run.process.kill()
        run.process.wait()
        until(lambda: not any(map(alive, pids)), "the ranks ended", 20)


def test_what_a_rank_started_ends_with_it(tmp_path):
    script = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
sys.exit(5)
"""
    with launched(tmp_path, script, "--processes=1") as run:
        assert run.wait() == 5
    child = int((tmp_path / "child").read_text())
    until(lambda: not alive(child), "the child ended", 20)


def test_options_are_checked(capsys):
    assert status(main, ["--processes=0", "--", "true"]) == 2
    assert "--processes=0 must lie in [1, 1024]" in capsys.readouterr().err


# --- the examples -----------------------------------------------------------------------------------------


def test_kubernetes_example():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", spec["parallelism"])
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    from deepseek_jax.config import DistributedConfig

    join = find(DistributedConfig(), env | {"JOB_COMPLETION_INDEX": "3"})
    assert (join.processes, join.process) == (spec["completions"], 3)
    assert join.coordinator == f"{job['metadata']['name']}-0.{pod['subdomain']}:1234"
    assert f"--{_STOPPED_STATUS.name}=75" in container["args"]
    [config] = [a.removeprefix("--config=") for a in container["args"] if a.startswith("--config=")]
    assert (EXAMPLES.parents[1] / config).exists()


def test_slurm_example():
    text = (EXAMPLES / "slurm.sbatch").read_text()
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sbatch"], check=True, timeout=60)
    assert f"--{_STOPPED_STATUS.name}=$STOPPED" in text and "#SBATCH --requeue" in text
