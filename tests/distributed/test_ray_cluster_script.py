"""scripts/launch_ray_cluster.sh with stand-ins for `ray`, `python` and SLURM's commands: what it starts, and when.

That Ray makes a cluster of it is tested elsewhere with a real one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.engine.runs.cores import cpu_cores
from tests.conftest import ROOT
from tests.distributed.two_hosts import shell_environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a bash script")

# Each notes what it was asked, but for python's snippets. Ray and the sweep stay until they are told to end. The addresses
# of a machine are ADDRESSES, where the test says some; after ASKED questions all nodes are there.
COMMANDS = {
    "ray": """
        [[ $1 == start ]] || exit 0
        echo "$RAY_AUTH_MODE $GLOO_SOCKET_IFNAME" > ray.environment
        trap 'echo "ray was told to end" >> notes; exit' TERM
        touch ray.ready
        for _ in {1..600}; do sleep 0.05; done""",
    "python": """
        case "$*" in
          *SOCK_DGRAM*) if [[ -n ${ADDRESSES:-} ]]; then echo "$ADDRESSES"; else exec "$PYTHON" "$@"; fi ;;
          *"ray.init("*) echo >> asked; (( $(wc -l < asked) >= ASKED )) ;;
          *src.train*)
            trap 'echo "the sweep was told to end" >> notes; exit $ENDS' TERM
            touch sweep.ready
            [[ $TOLD == yes ]] || exit "$ENDS"
            for _ in {1..600}; do sleep 0.05; done ;;
          *) exec "$PYTHON" "$@" ;;
        esac""",
    "srun": 'while [[ $1 == --* ]]; do shift; done; [[ $SRUN == fails ]] && exit 1; exec "$@"',
    "squeue": "echo $JOB_STATE",
    "scontrol": '[[ $1 == requeue ]] || printf "localhost\\nnode2\\n"',
}


class Machine:
    """A folder in which the script runs, as a user or SLURM starts it, and the notes of the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, folder / "notes"
        self.notes.touch()
        (folder / "bin").mkdir()
        for name, body in COMMANDS.items():
            command = folder / "bin" / name
            command.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] || echo "{name} $*" >> notes\n{body}\n')
            command.chmod(0o755)
        (folder / "scripts").symlink_to(ROOT / "scripts")
        shutil.copy(ROOT / "scripts" / "launch_ray_cluster.sh", folder / "slurm_script")
        self.process: subprocess.Popen[str]

    def start(self, *words: str, script: str = "scripts/launch_ray_cluster.sh", **environment: str) -> None:
        user = {key: value for key, value in shell_environment().items() if not key.startswith(("SLURM", "RAY_"))}
        fake = {"PATH": f"{self.folder / 'bin'}:{user['PATH']}", "PYTHON": sys.executable, "ASKED": "1"}
        self.process = subprocess.Popen(
            [f"./{script}", *words],
            cwd=self.folder,
            env=user | fake | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def start_job(self, *words: str, **environment: str) -> None:
        """As SLURM starts it: a copy, somewhere else."""
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        given = {"JOB_STATE": "RUNNING", "TOLD": "no", "ENDS": "0", "SRUN": "works", "SLURM_CPUS_PER_TASK": "16"}
        self.start(*words, script="slurm_script", **slurm | given | environment)

    def wait_for(self, name: str) -> None:
        until = time.monotonic() + 30
        while not (self.folder / name).exists() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Its exit code and what was printed; SLURM would end the cluster now."""
        code = self.process.wait(timeout=60)
        self.stop()
        return code, self.process.stdout.read()

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def noted(self, command: str) -> list[str]:
        return [line for line in self.notes.read_text().splitlines() if line.startswith(command)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


@pytest.fixture
def head() -> Iterator[str]:
    """A port of this machine on which something answers, as a cluster's head would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        ([], {}, ["HEAD= is missing"]),
        (["seed=0,1"], {"HEAD": "localhost"}, ["seed=0,1 is not for the cluster", "src.train -m seed=0\\,1"]),
        ([], {"HEAD": "nowhere.invalid"}, ["HEAD=nowhere.invalid cannot be reached"]),
        (["seed=0,1"], {"SLURM_JOB_ID": "7"}, ["this is no sweep with Ray", "experiment=tune_head"]),
    ],
)
def test_a_mistake_is_named_before_anything_is_started(machine, words, environment, named):
    machine.start(*words, **environment)
    code, printed = machine.end()
    assert code == 64
    for part in named:
        assert part in printed
    assert machine.notes.read_text() == ""


def test_help_shows_both_ways(machine):
    machine.start("--help", SLURM_JOB_ID="7")
    code, printed = machine.end()
    assert code == 0
    assert "HEAD=10.0.0.1 scripts/launch_ray_cluster.sh\n" in printed
    assert "sbatch scripts/launch_ray_cluster.sh experiment=tune_head" in printed


def test_the_machine_that_has_the_address_is_the_head(machine):
    machine.start(HEAD="10.0.0.1", ADDRESSES="10.0.0.1 10.0.0.1", IFNAME="eth7")
    machine.wait_for("ray.ready")
    own = f"--num-cpus={cpu_cores()} --disable-usage-stats --block"
    assert machine.noted("ray") == [
        "ray get-auth-token --generate",
        f"ray start --head --port=6379 --include-dashboard=false --node-ip-address=10.0.0.1 {own}",
    ]
    assert (machine.folder / "ray.environment").read_text() == "token eth7\n"


def test_a_head_that_knows_itself_by_a_loopback_address_gives_none_to_the_others(machine):
    machine.start(HEAD="127.0.1.1", PORT="7777")  # what Debian's /etc/hosts has for the name of the machine
    machine.wait_for("ray.ready")
    assert "--head --port=7777" in machine.noted("ray start")[0]
    assert "--node-ip-address" not in machine.noted("ray start")[0]


def test_another_machine_joins_when_the_head_is_there(machine):
    with socket.socket() as later:
        later.bind(("127.0.0.1", 0))
        port = str(later.getsockname()[1])
        machine.start(HEAD="localhost", ADDRESSES="10.0.0.2 10.0.0.1", PORT=port)
        time.sleep(0.5)
        assert machine.noted("ray") == []
        later.listen()
        machine.wait_for("ray.ready")
    start = machine.noted("ray")
    assert len(start) == 1
    assert start[0].startswith(f"ray start --address=localhost:{port} --node-ip-address=10.0.0.2 ")


def test_a_signal_is_one_to_ray(machine):
    machine.start(HEAD="localhost")
    machine.wait_for("ray.ready")
    machine.process.send_signal(signal.SIGTERM)
    assert machine.end()[0] == 0
    assert machine.noted("ray was told to end")


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["experiment=tune_head"], "experiment=tune_head name=slurm-7 hydra.sweeper"),
        (["hydra/sweeper=ray_tune", "name=a"], "hydra/sweeper=ray_tune name=a name=a hydra.sweeper"),
        (["seed=0,1", "hydra/launcher=ray_tune"], "seed=0,1 hydra/launcher=ray_tune name=slurm-7 hydra.launcher"),
    ],
)
def test_a_job_runs_the_sweep_on_the_cluster_of_its_nodes(machine, head, words, started):
    machine.start_job(*words, PORT=head, ASKED="2", ENDS="1")
    code, printed = machine.end()
    assert code == 1, printed
    assert machine.noted("python") == [f"python -m src.train -m {started}.ray.init.address=localhost:{head}"]
    assert len((machine.folder / "asked").read_text()) == 2, "the sweep began before all nodes were there"
    step = "--ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=0"
    assert machine.noted("srun") == [f"srun {step} scripts/launch_ray_cluster.sh"]
    assert machine.noted("scontrol requeue") == []


def test_a_job_whose_nodes_make_no_cluster_ends(machine, head):
    machine.start_job("experiment=tune_head", PORT=head, ASKED="1000", SRUN="fails")
    code, printed = machine.end()
    assert code == 64
    assert "the 2 nodes did not make a Ray cluster" in printed
    assert machine.noted("python") == []


@pytest.mark.parametrize(
    ("ends", "job_state", "requeued"),
    [("143", "RUNNING", True), ("143", "COMPLETING", False), ("0", "RUNNING", False), ("1", "RUNNING", False)],
)
def test_only_a_sweep_whose_time_was_up_gets_another_turn(machine, head, ends, job_state, requeued):
    machine.start_job("experiment=tune_head", PORT=head, TOLD="yes", ENDS=ends, JOB_STATE=job_state)
    machine.wait_for("sweep.ready")
    machine.process.send_signal(signal.SIGTERM)
    code, printed = machine.end()
    assert code == int(ends), printed
    assert machine.noted("the sweep was told to end")
    assert machine.noted("scontrol requeue") == (["scontrol requeue 7"] if requeued else [])


def test_a_job_that_is_told_to_end_while_it_waits_for_its_nodes_gets_another_turn(machine, head):
    machine.start_job("experiment=tune_head", PORT=head, ASKED="1000")
    machine.wait_for("asked")
    machine.process.send_signal(signal.SIGTERM)
    assert machine.end()[0] == 0
    assert machine.noted("python") == []
    assert machine.noted("scontrol requeue") == ["scontrol requeue 7"]
