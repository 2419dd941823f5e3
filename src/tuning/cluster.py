"""Ray on this machine or on a cluster, what of it a trial gets, and whether there is as much."""

from __future__ import annotations

import atexit
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from src.cores import cpu_cores
from src.errors import ExitCode, UserError
from src.tuning.commands import sweep_command
from src.tuning.job import PROJECT, STATE
from src.tuning.quiet import own_handlers
from src.tuning.settings import Ray, Resources, SweeperSettings, Trials
from src.user_command import corrected, shell_command

log = logging.getLogger(__name__)

# Bytes. Below it come /rayXXXXXXXX/r, the session's folder with the time and the process, and /sockets/plasma_store.
LONGEST_PARENT = 107 - 14 - 44 - 21


def connect(settings: Ray) -> None:
    """Afterwards Ray is there: the cluster at the address, or one on this machine. Raises UserError where none answers.

    Ray that runs already, of an earlier batch of the same sweep, is used again. It ends with the process: ended in another
    thread, while the report is made, Ray ends the process at times.
    """
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    if ray.is_initialized():
        return
    address = settings.init.address
    words: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    if address is None:
        # "local", or else RAY_ADDRESS, or a cluster that somebody left running, would be taken.
        words |= {"address": "local", "num_cpus": settings.init.num_cpus or cpu_cores()}
        words["_temp_dir"] = _temporary_folder()
    else:
        words["address"] = address
    if settings.ship_code:
        words["runtime_env"] = {"working_dir": _copy_of_the_code()}
    try:
        with own_handlers():
            ray.init(**words)
    except Exception as error:  # also Ray's own "The current node timed out during startup", an Exception of no kind
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if address:
            raise UserError(
                f"no Ray cluster answers at {address}",
                why=f"{why}\nor it asks for a token, which is in ~/.ray/auth_token of whoever started it",
                fix=[f"RAY_AUTH_MODE=token {shell_command()}", "scripts/launch_ray_cluster.sh --help"],
                code=ExitCode.UNAVAILABLE,
            ) from error
        raise UserError(
            "Ray could not be started",
            where=words["_temp_dir"],
            why=f"{why}\nthe machine is overloaded, or the disk with Ray's files is full",
            fix=[
                f"{shell_command()} # when the machine is less busy",
                f"RAY_TMPDIR=/var/tmp {shell_command()} # another disk",
            ],
            code=ExitCode.UNAVAILABLE,
        ) from error


def _temporary_folder() -> str:
    """A folder for Ray's sockets and logs that only this user can enter, with a path of the length that sockets allow.

    Ray itself would take TMPDIR/ray, which everybody may write to, and die where its path is long. Raises UserError.
    """
    said = os.environ.get("RAY_TMPDIR")
    for parent in [said] if said else [tempfile.gettempdir(), "/tmp"]:
        if len(os.fsencode(parent)) > LONGEST_PARENT:
            why = f"the path of a socket has at most 107 bytes, so that of this folder at most {LONGEST_PARENT}"
            continue
        try:
            folder = tempfile.mkdtemp(prefix="ray", dir=parent)
        except OSError as error:
            why = error.strerror
            continue
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(ray.shutdown)  # what is registered last is done first
        return f"{folder}/r"  # a folder that Ray is given it opens to everybody
    raise UserError(
        "Ray has no folder for its sockets",
        where=parent,
        why=why,
        fix=f"RAY_TMPDIR={'/tmp' if parent != '/tmp' else '/var/tmp'} {shell_command()}",
        code=ExitCode.UNAVAILABLE,
    )


def _copy_of_the_code() -> str:
    """src/ and conf/ alone: the folder they lie in may hold images and runs."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-code-"))
    for name in ("src", "conf"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def check_shared(sweep_dir: Path) -> None:
    """Every machine of the cluster must see the folder of the sweep, and the code. Raises UserError."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    mark = sweep_dir / STATE / "seen-by-all"
    mark.touch()

    @ray.remote(num_cpus=0)
    def look(path: str) -> str:
        try:
            import src.tuning.trainable  # noqa: F401
        except ImportError as error:
            return f"cannot import the code: {error}"
        return "" if Path(path).exists() else f"does not see {Path(path).parent.parent}"

    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            str(mark)
        ): node
        for node in nodes
    }
    problems = [f"{node['NodeManagerAddress']} {said}" for task, node in asked.items() if (said := ray.get(task))]
    if problems:
        raise UserError(
            f"{len(problems)} of {len(nodes)} machines of the cluster cannot take part",
            where=str(sweep_dir),
            why="\n".join(problems[:6]),
            fix=[
                corrected("runs_dir=/a/folder/that/all/machines/share"),
                sweep_command("ray.ship_code=true") + " # where it is the code that they lack",
            ],
            code=ExitCode.NO_INPUT,
        )


def resources_of(config: DictConfig, settings: Trials, count: int | None) -> tune.PlacementGroupFactory:
    """What a trial gets: a bundle for each machine that it trains on. count: how many trials there are.

    config: of the job, whose trainer.devices, num_nodes and accelerator are what it asks for, and whose `resources` may
    refer to it (${data.num_workers}). A share of the cores that is not said is a machine's, divided by the trials that run
    at once there. Raises UserError where it never fits.
    """
    nodes = int(OmegaConf.select(config, "trainer.num_nodes", default=1))
    devices = OmegaConf.select(config, "trainer.devices", default=1)
    accelerator = OmegaConf.select(config, "trainer.accelerator", default="auto")
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_gpus = max(machine.get("GPU", 0) for machine in machines)
    on_gpu = accelerator == "gpu" or (accelerator == "auto" and most_gpus > 0)
    if devices == "auto":
        devices = int(most_gpus) if on_gpu else 1
    if OmegaConf.is_list(devices) and on_gpu:
        raise UserError(
            f"trainer.devices={str(devices).replace(' ', '')} cannot be had in a sweep",
            where="trainer.devices",
            why="Ray chooses which GPUs a trial gets; CUDA_VISIBLE_DEVICES says which it may choose from",
            fix=corrected(f"trainer.devices={len(devices)}"),
        )
    devices = len(devices) if OmegaConf.is_list(devices) else int(devices)

    plugin = "sweeper" if isinstance(settings, SweeperSettings) else "launcher"
    wanted: Resources = OmegaConf.select(config, f"hydra.{plugin}.resources", default=settings.resources)
    gpus = wanted.gpu if wanted.gpu is not None else (devices if on_gpu else 0)
    cpus = wanted.cpu
    if cpus is None:
        cores = int(max(machine.get("CPU", 0) for machine in machines))
        room = _slots("GPU", most_gpus, gpus) if gpus else cores // devices
        at_once = max(1, min(settings.max_concurrent or room, count or room, room))
        cpus = max(min(devices, cores), cores // at_once)
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    _check_fits(bundle, nodes, machines)
    return tune.PlacementGroupFactory([bundle] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")


def _check_fits(bundle: dict[str, float], nodes: int, machines: list[dict[str, float]]) -> None:
    """Tune would wait for ever."""
    fitting = [machine for machine in machines if all(machine.get(name, 0) >= much for name, much in bundle.items())]
    if len(fitting) >= nodes:
        return
    shown = [f"{machine.get('CPU', 0):g} cores, {machine.get('GPU', 0):g} GPUs" for machine in machines]
    asked = " and ".join(f"{much:g} {name}" for name, much in bundle.items())
    raise UserError(
        f"a trial asks for {asked}" + (f" on each of {nodes} machines" if nodes > 1 else ""),
        where="trainer.devices, trainer.num_nodes and resources of the sweep",
        why=f"the cluster has {len(machines)} machine{'s' if len(machines) > 1 else ''}: {'; '.join(shown[:6])}",
        fix=[corrected("trainer.devices=1", remove=["trainer.num_nodes"]), sweep_command("resources.cpu=1")],
        code=ExitCode.UNAVAILABLE,
    )


def at_once(resources: tune.PlacementGroupFactory, limit: int | None) -> int:
    """How many such trials the cluster has room for."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = resources.bundles  # one for each machine of a trial, all alike
    asked = {name: much for name, much in bundles[0].items() if much}
    fitting = (min(_slots(name, machine.get(name, 0), much) for name, much in asked.items()) for machine in machines)
    room = sum(fitting) // len(bundles)
    return max(1, min(room, limit or room))


def _slots(name: str, there: float, share: float) -> int:
    """How often the share fits into what a machine has. A share of a GPU is of one GPU: 2 GPUs have 4 times 0.4."""
    if name == "GPU" and share < 1:
        return int(there) * _slots("", 1, share)
    return math.floor(there / share + 1e-4)  # 1 // 0.2 is 4.0; Ray itself counts in steps of 1e-4
