"""Checks of the command line against the launcher: torchrun, srun or none. Imports no torch."""

from __future__ import annotations

import os
import shlex

from src.engine import features
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected
from src.engine.memory.gpus import check_enough, device_count
from src.engine.processes.launching import launched_from_outside
from src.engine.runs.errors import UserError


def check_launched(config: Config, multirun: bool) -> None:
    """Raises UserError if the settings do not fit the launcher of this process."""
    if not launched_from_outside():
        if features.supervisor() is None:  # a trial's worker may be one of srun's tasks
            _check_alone(config)
            if config.trainer.devices != "auto":
                check_enough(config.trainer.accelerator, config.trainer.devices)
        return
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    name, trainer = config.strategy.name, config.trainer
    if multirun:
        raise UserError(
            "a sweep (-m) cannot be started by torchrun",
            where=f"WORLD_SIZE={world}",
            why="every process would run the sweep; a sweep starts the processes of its jobs by itself",
            fix=corrected("-m", "strategy=ddp", f"trainer.devices={local}") + " # without torchrun",
        )
    if not features.process_per_device(name) and world > 1:
        raise UserError(
            f"strategy={name} does not go with torchrun",
            where=f"{world} processes were started (WORLD_SIZE={world})",
            why=f"strategy={name} is one process, so each of them would train the same by itself",
            fix=[
                corrected(f"trainer.devices={1 if name == 'single' else local}", "trainer.num_nodes=1")
                + " # without torchrun",
                f"torchrun --nproc-per-node {local} -m src.train {_words('strategy=ddp', f'trainer.devices={local}')}",
            ],
        )
    if world != device_count(trainer) * trainer.num_nodes or local != device_count(trainer):
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", -(-world // local)))  # number of machines
        others = (world - local) // (nodes - 1) if nodes > 1 else local  # on each of the other machines
        raise UserError(
            f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes} is not what was started",
            where=f"{world} processes on {nodes} machines, {local} on this machine",
            why="each process trains on one device, and every machine has as many",
            fix="scripts/launch_torchrun.sh "
            + _words(f"trainer.devices={min(local, others)}", f"trainer.num_nodes={nodes}"),
        )
    if config.name is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "name= is missing",
            where=f"--max-restarts={os.environ['TORCHELASTIC_MAX_RESTARTS']}",
            why="a run that is started again has to find what it left",
            fix=f"python -m torch.distributed.run --max-restarts=3 --nproc-per-node {local} "
            f"-m src.train {_words('name=first')}",
        )


def _words(*words: str) -> str:
    """The user's words with these changes, for another program than python -m src.train."""
    return shlex.join(shlex.split(corrected(*words))[3:])


def _check_alone(config: Config) -> None:
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError(
            f"srun started this command {os.environ['SLURM_STEP_NUM_TASKS']} times",
            why="each of them would train by itself; one task per machine is enough, which starts the processes there",
            fix=f"sbatch scripts/launch_slurm.sh {_words()}",
        )
    if config.trainer.num_nodes > 1:
        name = [] if config.name else ["name=first"]  # the machines need it to find each other's run
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes}, but this command runs on one machine",
            why="on several machines it is started on each of them",
            fix=[
                f"NNODES={config.trainer.num_nodes} HEAD=10.0.0.1 scripts/launch_torchrun.sh {_words(*name)} "
                "# on each; HEAD: the address of one",
                f"sbatch scripts/launch_slurm.sh {_words(*name)}",
            ],
        )
