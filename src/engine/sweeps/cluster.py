"""Ray on this machine or on a cluster, and the resources of a trial."""

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

from src.engine.commands.user_command import corrected, shell_command
from src.engine.project import PROJECT
from src.engine.runs.cores import cpu_cores
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps.folder import STATE
from src.engine.sweeps.ray_environment import own_handlers
from src.engine.sweeps.settings import Ray, Resources, SweeperSettings, SweepSettings, sweep_command

log = logging.getLogger(__name__)

# Bytes. Below it come /rayXXXXXXXX/r, the session's folder with the time and the process, and /sockets/plasma_store.
LONGEST_PARENT = 107 - 14 - 44 - 21


def connect(settings: Ray) -> None:
    """Joins the Ray cluster at the address, or starts Ray on this machine. Raises UserError if that fails.

    A running Ray, of an earlier batch of the same sweep, is used again. It ends with the process, not before: while it ends
    in another thread, beside the report, it sometimes ends the process.
    """
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    if ray.is_initialized():
        return
    address = settings.init.address
    words: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    if address is None:
        # Not None: Ray would take RAY_ADDRESS, or a cluster that somebody left running.
        words |= {"address": "local", "num_cpus": settings.init.num_cpus or cpu_cores()}
        words["_temp_dir"] = _temporary_folder()
    else:
        words["address"] = address
    if settings.ship_code:
        words["runtime_env"] = {"working_dir": _copy_of_the_code()}
    try:
        with own_handlers():
            ray.init(**words)
    except Exception as error:  # also Ray's "The current node timed out during startup", a plain Exception
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        command = shell_command()
        if address:
            raise UserError(
                f"no Ray cluster answers at {address}",
                why=f"{why}\nor it asks for a token, which is in ~/.ray/auth_token of whoever started it",
                fix=[f"RAY_AUTH_MODE=token {command}", "scripts/launch_ray_cluster.sh --help"],
                code=ExitCode.UNAVAILABLE,
            ) from error
        raise UserError(
            "Ray could not be started",
            where=words["_temp_dir"],
            why=f"{why}\nthe machine is overloaded, or the disk with Ray's files is full",
            fix=[f"{command} # when the machine is less busy", f"RAY_TMPDIR=/var/tmp {command} # another disk"],
            code=ExitCode.UNAVAILABLE,
        ) from error


def _temporary_folder() -> str:
    """A folder for Ray's sockets and logs that only this user can enter, with a path short enough for a socket.

    Ray's own TMPDIR/ray is writable for everybody, and Ray dies if its path is long. Raises UserError.
    """
    chosen, parent, why = os.environ.get("RAY_TMPDIR"), "", ""
    for parent in [chosen] if chosen else [tempfile.gettempdir(), "/tmp"]:
        if len(os.fsencode(parent)) > LONGEST_PARENT:
            why = f"the path of a socket has at most 107 bytes, so that of this folder at most {LONGEST_PARENT}"
            continue
        try:
            folder = tempfile.mkdtemp(prefix="ray", dir=parent)
        except OSError as error:
            why = error.strerror or str(error)
            continue
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(ray.shutdown)  # registered last, called first
        return f"{folder}/r"  # Ray opens the folder that it is given to everybody
    raise UserError(
        "Ray has no folder for its sockets",
        where=parent,
        why=why,
        fix=f"RAY_TMPDIR={'/tmp' if parent != '/tmp' else '/var/tmp'} {shell_command()}",
        code=ExitCode.UNAVAILABLE,
    )


def _copy_of_the_code() -> str:
    """A folder with src/ and conf/ alone: beside them there may be images and runs."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-code-"))
    for name in ("src", "conf"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def check_shared(sweep_dir: Path) -> None:
    """Raises UserError if a machine of the cluster does not see the folder of the sweep, or lacks the code."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    mark = sweep_dir / STATE / "seen-by-all"
    mark.touch()

    @ray.remote(num_cpus=0)
    def look(path: str) -> str:
        try:
            import src.engine.sweeps.trainable  # noqa: F401
        except ImportError as error:
            return f"cannot import the code: {error}"
        return "" if Path(path).exists() else f"does not see {Path(path).parent.parent}"

    answers = []  # several nodes may have one address
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers.append((node["NodeManagerAddress"], look.options(scheduling_strategy=there).remote(str(mark))))
    problems = [f"{address} {text}" for address, answer in answers if (text := ray.get(answer))]
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


def resources_of(config: DictConfig, settings: SweepSettings, count: int | None) -> tune.PlacementGroupFactory:
    """The resources of a trial: a bundle for each machine that it trains on. count: how many trials there are.

    It asks by trainer.devices, num_nodes and accelerator, and by the `resources` of the sweep, which may refer to the job's
    settings (${data.num_workers}). If the share of the cores is not set, it is a machine's, divided by the trials that run
    there at once. Raises UserError where it never fits.
    """
    machines = _machines()
    cores, most_gpus = (max(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU"))
    accelerator = OmegaConf.select(config, "trainer.accelerator", default="auto")
    on_gpu = accelerator == "gpu" or (accelerator == "auto" and most_gpus > 0)
    devices = OmegaConf.select(config, "trainer.devices", default=1)
    if OmegaConf.is_list(devices):
        if on_gpu:
            raise UserError(
                f"trainer.devices={str(devices).replace(' ', '')} cannot be had in a sweep",
                where="trainer.devices",
                why="Ray chooses which GPUs a trial gets; CUDA_VISIBLE_DEVICES says which it may choose from",
                fix=corrected(f"trainer.devices={len(devices)}"),
            )
        devices = len(devices)
    elif devices == "auto":
        devices = int(most_gpus) if on_gpu else 1
    plugin = "sweeper" if isinstance(settings, SweeperSettings) else "launcher"
    asked: Resources = OmegaConf.select(config, f"hydra.{plugin}.resources", default=settings.resources)
    gpus = asked.gpu
    if gpus is None:
        gpus = devices if on_gpu else 0
    cpus = asked.cpu
    if cpus is None:
        room = _slots("GPU", most_gpus, gpus) if gpus else int(cores) // devices
        trials_at_once = max(1, min(settings.max_concurrent or room, count or room, room))
        cpus = max(min(devices, int(cores)), int(cores) // trials_at_once)
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    needed = int(OmegaConf.select(config, "trainer.num_nodes", default=1))
    _check_fits(bundle, needed, machines)
    return tune.PlacementGroupFactory([bundle] * needed, strategy="STRICT_SPREAD" if needed > 1 else "PACK")


def _machines() -> list[dict[str, float]]:
    """The resources of each machine of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_fits(bundle: dict[str, float], count: int, machines: list[dict[str, float]]) -> None:
    """Tune would wait for ever. count: of the machines that a trial needs."""
    fitting = [machine for machine in machines if all(machine.get(name, 0) >= share for name, share in bundle.items())]
    if len(fitting) >= count:
        return
    sizes = [f"{machine.get('CPU', 0):g} cores, {machine.get('GPU', 0):g} GPUs" for machine in machines]
    asked = " and ".join(f"{share:g} {name}" for name, share in bundle.items())
    raise UserError(
        f"a trial asks for {asked}" + (f" on each of {count} machines" if count > 1 else ""),
        where="trainer.devices, trainer.num_nodes and resources of the sweep",
        why=f"the cluster has {len(machines)} machine{'s' if len(machines) > 1 else ''}: {'; '.join(sizes[:6])}",
        fix=[corrected("trainer.devices=1", remove=["trainer.num_nodes"]), sweep_command("resources.cpu=1")],
        code=ExitCode.UNAVAILABLE,
    )


def at_once(resources: tune.PlacementGroupFactory, limit: int | None) -> int:
    """How many such trials the cluster has room for."""
    bundles = resources.bundles  # one for each machine of a trial, all alike
    shares = {name: share for name, share in bundles[0].items() if share}
    slots = (
        min(_slots(name, machine.get(name, 0), share) for name, share in shares.items()) for machine in _machines()
    )
    room = sum(slots) // len(bundles)
    return max(1, min(room, limit or room))


def _slots(name: str, amount: float, share: float) -> int:
    """How often the share fits into a machine's amount. A share of a GPU is of one GPU: 2 GPUs have 4 times 0.4."""
    if name == "GPU" and share < 1:
        return int(amount) * _slots("", 1, share)
    return math.floor(amount / share + 1e-4)  # 1 // 0.2 is 4.0; Ray itself counts in steps of 1e-4
