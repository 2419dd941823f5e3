"""Times sweeps of short jobs from command to prompt: Ray Tune beside Hydra's own launcher and the two other local ones.

    python scripts/benchmarks/sweeps.py [--rounds 3] [--jobs 8 50] [--samples 50]       from the project's folder

The jobs are those of sweep_app/: trivial ones, and trainings of a small Lightning model for ten epochs. Each time is of a
fresh process with CORES cores and one thread per job; prints medians over the rounds. hydra-joblib-launcher and
hydra-ray-launcher are measured if installed. The latter needs an older cloudpickle, so give it its own environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CORES = 2
APP = [sys.executable, "-m", "scripts.benchmarks.sweep_app.app", "-m"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # without it any user could use the cluster
OWN_RAY = f"hydra.launcher.ray.init.num_cpus={CORES}"
NO_DASHBOARD = "+hydra.launcher.ray.init.include_dashboard=false"
TUNE = "hydra/launcher=ray_tune"
TPE_AND_ASHA = ("hydra.sweeper.search=optuna", "hydra.sweeper.scheduler=asha")


@dataclass(frozen=True)
class Launcher:
    """words: on the command line. package: that brings the launcher, if it is not this project's."""

    name: str
    words: tuple[str, ...] = ()
    package: str = ""
    on_cluster: bool = False  # Ray is started before the command

    @property
    def missing(self) -> bool:
        return bool(self.package) and not any(importlib.metadata.distributions(name=self.package))


LAUNCHERS = (
    Launcher("basic"),
    Launcher("joblib", ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={CORES}"), "hydra-joblib-launcher"),
    Launcher(
        "hydra-ray-launcher",
        ("hydra/launcher=ray", "hydra.launcher.ray.init.address=local", f"+{OWN_RAY}", NO_DASHBOARD),
        "hydra-ray-launcher",
    ),
    Launcher("ray_tune", (TUNE, OWN_RAY)),
    Launcher("ray_tune, a process per trial", (TUNE, OWN_RAY, "hydra.launcher.reuse_actors=false")),
    Launcher("ray_tune, cluster is up", (TUNE,), on_cluster=True),
)


def seconds(*words: str, **environment: str) -> float:
    """Time of a command of the app in a new folder. Ends the benchmark if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*APP, *words, f"hydra.sweep.dir={folder}/sweep"]
        start = time.perf_counter()
        done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True)
        passed = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return passed


def launch(launcher: Launcher, work: str, count: int) -> float:
    """Seconds of a sweep of `count` jobs."""
    words = [f"work={work}", "lr=" + ",".join(f"{(job + 1) / 1000:g}" for job in range(count)), *launcher.words]
    if not launcher.on_cluster:
        return seconds(*words)
    with cluster() as address:
        return seconds(*words, f"hydra.launcher.ray.init.address={address}", **TOKEN)


def search(work: str, count: int, *words: str) -> float:
    """Seconds of a hydra/sweeper=ray_tune sweep of `count` trials, by default at random points."""
    sweeper = (
        "hydra/sweeper=ray_tune",
        f"hydra.sweeper.num_samples={count}",
        f"hydra.sweeper.ray.init.num_cpus={CORES}",
    )
    return seconds(f"work={work}", "lr=tag(log,interval(1e-4,1))", *sweeper, *words)


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster on this machine. Yields its address, since 'auto' might find another user's cluster."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        start = ["start", "--head", "--block", "--include-dashboard=false", "--disable-usage-stats"]
        where = ["--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", f"--temp-dir={folder}"]
        ray = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *start, f"--num-cpus={CORES}", *where],
            env=ENVIRONMENT | TOKEN,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said = []
            while "Ray runtime started" not in "".join(said):
                said.append(ray.stdout.readline())
                if not said[-1]:
                    sys.exit(f"the Ray cluster did not start:\n{''.join(said)}")
            time.sleep(5)  # until it is idle
            yield address
        finally:
            ray.terminate()  # ends its child processes too
            ray.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="+", default=[8, 50], help="jobs of a launcher's sweeps")
    parser.add_argument("--samples", type=int, default=50, help="trials of the search")
    options = parser.parse_args()

    installed = [launcher for launcher in LAUNCHERS if not launcher.missing]
    columns = [(work, count) for work in ("trivial", "training") for count in options.jobs]
    reuse = next(launcher for launcher in LAUNCHERS if launcher.name == "ray_tune")
    times: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)
        print(f"{name}: {value:.2f} s", flush=True)

    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", flush=True)
        for work, count in columns:
            for launcher in installed:
                note(f"{launcher.name}, {count} {work}", launch(launcher, work, count))
        note("search", search("training", options.samples, *TPE_AND_ASHA))
        note("a further job", (launch(reuse, "trivial", 60) - launch(reuse, "trivial", 10)) / 50)
        note("a further trial", (search("trivial", 60) - search("trivial", 10)) / 50)

    print(f"\nseconds from command to prompt, {CORES} cores, medians of {options.rounds} rounds")
    print(f"{'launcher':32}" + "".join(f"{f'{count} {work}':>14}" for work, count in columns))
    for launcher in LAUNCHERS:
        if launcher.missing:
            print(f"{launcher.name:32}  not installed: pip install {launcher.package}")
            continue
        row = [statistics.median(times[f"{launcher.name}, {count} {work}"]) for work, count in columns]
        print(f"{launcher.name:32}" + "".join(f"{value:14.1f}" for value in row))
    print(f"{options.samples} trainings, TPE and ASHA: {statistics.median(times['search']):.1f} s")
    job, trial = (statistics.median(times[f"a further {what}"]) for what in ("job", "trial"))
    print(f"a further trivial one, (60 - 10) / 50: {job:.3f} s with the launcher, {trial:.3f} s with the sweeper")


if __name__ == "__main__":
    main()
