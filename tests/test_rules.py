"""Settings of strategies that contradict each other or have no effect: refused before anything is started."""

from __future__ import annotations

import hydra
import pytest
import torch

from src.engine.commands import config_checks
from src.engine.commands.command_line import CONF
from src.engine.runs.job import computing_at_once
from src.engine.runs.machine import choose_devices, set_threads
from tests.conftest import SMALL, check_error, of_room

SPLIT = ("model=model_parallel_resnet50", "model.weights=none", "trainer.accelerator=cpu")
PIPELINE = (*SPLIT, "strategy=pipeline", "trainer.devices=2")
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
MISTAKES = [
    (["trainer.devices=2"], "strategy=single does not go with trainer.devices=2"),
    (["strategy=ddp", "trainer.devices=0"], "trainer.devices=0 is out of range"),
    (["strategy=ddp", "trainer.devices=[0,0]"], "trainer.devices=[0,0] is out of range"),
    (["strategy=ddp", "trainer.devices=two"], "trainer.devices=two is out of range"),
    of_room("dp", ["strategy=dp", "trainer.num_nodes=2"], "strategy=dp does not go with trainer.num_nodes=2"),
    of_room("dp", ["strategy=dp", "trainer.devices=2", "trainer.compile=true"], "trainer.compile=true does not go"),
    of_room("pipeline", [*PIPELINE, "trainer.compile=true"], "trainer.compile=true does not go"),
    (["strategy=ddp", "trainer.num_nodes=2"], "this command runs on one machine"),
    (["strategy=ddp", "trainer.devices=4", "data.batch_size=3"], "smaller than the number of devices, 4"),
    of_room("dp", ["strategy=dp", "trainer.devices=4", "data.batch_size=3"], "smaller than the number of devices, 4"),
    of_room("pipeline", ["strategy.micro_batches=2"], "strategy.micro_batches=2 has no effect with strategy=single"),
    (["strategy.timeout_seconds=9"], "strategy.timeout_seconds=9.0 has no effect with strategy=single"),
    (["strategy=ddp", "strategy.sync_batchnorm=true"], "does not go with oom.policy=split"),
    (["strategy=ddp", "strategy.sync_batchnorm=true", "trainer.accelerator=cpu"], "trainer.accelerator=cpu"),
    (["strategy=ddp", "strategy.port=29500"], "strategy.port is not a setting"),
    of_room("pipeline", ["strategy=pipeline", "trainer.devices=2"], "strategy=pipeline needs a network that is split"),
    of_room("pipeline", [*SPLIT], "model.split_at=[layer2] has no effect with strategy=single"),
    of_room("pipeline", [*SPLIT, "strategy=model_parallel", "trainer.devices=3"], "2 stages do not fit 3 devices"),
    of_room("pipeline", [*SPLIT, "strategy=model_parallel", "model.split_at=auto"], "1 stages do not fit 1 devices"),
    of_room("pipeline", [*PIPELINE, "data.batch_size=3"], "the number of micro-batches, 4"),
    of_room("pipeline", [*PIPELINE, "strategy.schedule=zigzag"], "strategy.schedule=zigzag"),
    of_room("pipeline", [*PIPELINE, "strategy.micro_batches=0"], "micro_batches=0 is out of range"),
    of_room("pipeline", [*PIPELINE, "data.batch_size=auto"], "data.batch_size=auto does not go"),
    of_room("pipeline", [*PIPELINE, "checkpoint.select=ema"], "checkpoint.select=ema does not go"),
    of_room("pipeline", [*PIPELINE, "model.backbone=resnet18"], "model.backbone=resnet18"),
    of_room("pipeline", [*PIPELINE, "model.split_at=layer2"], "is not a list of layers"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES)
def test_a_mistake_is_answered_before_anything_is_started(command, words, named):
    check_error(command("train", *words), 64, named)


@pytest.mark.needs("pipeline")
def test_a_layer_that_does_not_exist_is_named(command):
    words = (*SMALL, *SPLIT, "model.backbone=resnet50", "strategy=model_parallel", "trainer.devices=2")
    check_error(command("train", *words, "model.split_at=[layer9]"), 64, "cannot be split after 'layer9'", "layer3.5")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        of_room("dp", ["strategy=dp", "trainer.devices=2"], "strategy=dp does not go with torchrun"),
        (["strategy=single"], "strategy=single does not go with torchrun"),
        (["strategy=ddp", "trainer.devices=3"], "is not what was started"),
    ],
)
def test_what_does_not_go_with_torchrun(command, words, named):
    check_error(command("train", *words, "trainer.accelerator=cpu", **TORCHRUN), 64, named)


@pytest.mark.parametrize(
    ("local", "world", "machines", "said"),
    [(2, 4, 2, "trainer.devices=2 trainer.num_nodes=2"), (4, 6, 2, "trainer.devices=2 trainer.num_nodes=2")],
)
def test_what_torchrun_started_is_said_in_words_that_fit(command, local, world, machines, said):
    """4 GPUs and 2 are 2 and 2 at best: machines have as many processes each."""
    environment = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local)}
    words = ("strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=8")
    done = command("train", *SMALL, *words, cold=True, GROUP_WORLD_SIZE=str(machines), **environment)
    check_error(done, 64, "is not what was started", f"{world} processes on {machines} machines", said)


def test_a_sweep_is_not_started_by_torchrun(command):
    """Every process would run it, with folders of its own."""
    done = command("train", "-m", "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", **TORCHRUN)
    assert done.code == 64
    assert "a sweep (-m) cannot be started by torchrun" in done.err


def test_a_run_that_may_be_started_again_needs_a_name(command):
    words = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    check_error(command("train", *words, **TORCHRUN, TORCHELASTIC_MAX_RESTARTS="3"), 64, "name= is missing")


def test_srun_without_the_script_is_noticed(command):
    done = command("train", "strategy=ddp", SLURM_STEP_NUM_TASKS="4")
    check_error(done, 64, "srun started this command 4 times", "launch_slurm.sh")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
def test_several_devices_without_a_gpu(command):
    done = command("train", *SMALL, "strategy=ddp", "trainer.devices=2")
    check_error(done, 69, "trainer.devices=2, but this machine has no GPU", "trainer.devices=2 trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("words", "at_once"),
    [
        (["strategy=single"], 1),
        of_room("dp", ["strategy=dp", "trainer.devices=2"], 1),
        (["strategy=ddp", "trainer.devices=2"], 2),
        of_room("pipeline", [*SPLIT, "strategy=model_parallel", "trainer.devices=2"], 1),
        of_room("pipeline", [*SPLIT, "strategy=model_parallel", "trainer.devices=2", "strategy.micro_batches=4"], 2),
        of_room("pipeline", [*PIPELINE], 2),
    ],
)
def test_the_threads_of_a_job_are_divided_among_those_that_compute_at_once(monkeypatch, words, at_once):
    """Two processes with all cores each are not a little slower than one, but many times."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        settings = config_checks.read(hydra.compose("train", [*words, "trainer.accelerator=cpu"]))
    devices = choose_devices(settings.trainer.accelerator, settings.trainer.devices)
    assert computing_at_once(settings, devices) == at_once
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    set_threads(6, sharers=at_once)
    assert asked == [6 // at_once]
    monkeypatch.setattr("src.engine.runs.machine.cpu_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_threads(None, sharers=at_once)
    assert asked[1:] == ([8 // at_once] if at_once > 1 else [])


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU number {number}")
    assert choose_devices("auto", "auto") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_devices("gpu", [1]) == [torch.device("cuda", 1)]
    with pytest.raises(Exception, match=r"trainer.devices=\[0,2\], but this machine has 2 GPUs") as error:
        choose_devices("gpu", [0, 2])
    assert "GPU number 1" in error.value.render()
