"""What of a machine, or of several, a trial gets, and what is said where there is not as much."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.engine.runs.cores import cpu_cores
from src.engine.runs.errors import ExitCode, UserError
from src.engine.sweeps import cluster
from src.engine.sweeps.settings import LauncherSettings, Ray, RayInit, Resources, SweeperSettings


@pytest.fixture
def machines(monkeypatch):
    """machines({"CPU": 8}, ...): those of the cluster, and one that is gone."""

    def make(*resources: dict[str, float]) -> None:
        nodes = [{"Alive": True, "Resources": {"memory": 1e9, **one}} for one in resources]
        gone = {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}
        total = {name: sum(one.get(name, 0) for one in resources) for name in ("CPU", "GPU")}
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, gone])
        monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: total)

    return make


def share(count=None, cpu=None, gpu=None, max_concurrent=None, **trainer):
    """Of a trial of `count`, with these trainer.* settings."""
    settings = LauncherSettings(resources=Resources(cpu=cpu, gpu=gpu), max_concurrent=max_concurrent)
    return cluster.resources_of(OmegaConf.create({"trainer": trainer}), settings, count)


def bundle(*arguments, **settings) -> dict[str, float]:
    (only,) = share(*arguments, **settings).bundles
    return only


@pytest.mark.parametrize(
    ("asked", "cores"),
    [
        ({}, 1),
        ({"count": 2}, 4),
        ({"count": 3}, 2),
        ({"count": 20}, 1),
        ({"max_concurrent": 4}, 2),
        ({"max_concurrent": 4, "count": 2}, 4),
        ({"devices": 2}, 2),
        ({"devices": 2, "count": 2}, 4),
        ({"devices": [0, 1]}, 2),
        ({"devices": "auto"}, 1),
        ({"devices": 16}, 8),
        ({"cpu": 3}, 3),
        ({"cpu": 0.5}, 0.5),
        ({"accelerator": "mps"}, 1),
    ],
    ids=str,
)
def test_the_cores_of_a_machine_are_divided_among_the_trials_at_once(machines, asked, cores):
    machines({"CPU": 8})
    assert bundle(**asked) == {"CPU": cores}


def test_a_job_of_any_application_gets_a_core(machines):
    machines({"CPU": 8})
    (only,) = cluster.resources_of(OmegaConf.create({}), LauncherSettings(), None).bundles
    assert only == {"CPU": 1}


def test_resources_may_refer_to_the_settings_of_each_job(machines):
    machines({"CPU": 16, "GPU": 4})
    for plugin, settings in (("launcher", LauncherSettings()), ("sweeper", SweeperSettings())):
        for workers, gpus in ((2, 0), (6, 0.5)):
            resources = {"cpu": "${data.num_workers}", "gpu": gpus}
            config = OmegaConf.create({"data": {"num_workers": workers}, "hydra": {plugin: {"resources": resources}}})
            (only,) = cluster.resources_of(config, settings, 4).bundles
            assert only == {"CPU": workers} | ({"GPU": gpus} if gpus else {})


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({}, {"CPU": 4, "GPU": 1}),
        ({"devices": 2}, {"CPU": 8, "GPU": 2}),
        ({"devices": "auto"}, {"CPU": 16, "GPU": 4}),
        ({"gpu": 0.5}, {"CPU": 2, "GPU": 0.5}),
        ({"gpu": 0.5, "cpu": 1}, {"CPU": 1, "GPU": 0.5}),
        ({"accelerator": "gpu"}, {"CPU": 4, "GPU": 1}),
        ({"accelerator": "cpu"}, {"CPU": 1}),
        ({"gpu": 0}, {"CPU": 1}),
    ],
    ids=str,
)
def test_a_trial_has_a_gpu_per_device_and_its_part_of_the_cores(machines, asked, given):
    machines({"CPU": 16, "GPU": 4})
    assert bundle(**asked) == given


def test_a_trial_on_several_machines_has_a_part_of_each(machines):
    machines({"CPU": 8}, {"CPU": 8})
    both = share(num_nodes=2, devices=2)
    assert both.bundles == [{"CPU": 2.0}, {"CPU": 2.0}]
    assert both.strategy == "STRICT_SPREAD", "both parts could be of one machine"
    assert share(num_nodes=1).strategy == "PACK"


@pytest.mark.parametrize(
    ("there", "asked", "named"),
    [
        ([{"CPU": 8}], {"accelerator": "gpu"}, ("1 GPU", "1 machine: 8 cores, 0 GPUs")),
        ([{"CPU": 8, "GPU": 2}], {"devices": 3}, ("3 GPU", "8 cores, 2 GPUs")),
        ([{"CPU": 8}], {"cpu": 99}, ("99 CPU", "1 machine: 8 cores")),
        ([{"CPU": 8}] * 2, {"num_nodes": 3}, ("on each of 3 machines", "2 machines: 8 cores, 0 GPUs; 8 cores")),
        ([{"CPU": 8}, {"CPU": 2}], {"num_nodes": 2, "cpu": 4}, ("4 CPU on each of 2 machines", "2 cores, 0 GPUs")),
        # As much in all is not enough.
        ([{"CPU": 8}, {"CPU": 8}], {"cpu": 9}, ("9 CPU", "2 machines")),
    ],
    ids=str,
)
def test_what_never_fits_is_refused_with_what_there_is(machines, there, asked, named):
    machines(*there)
    with pytest.raises(UserError) as error:
        share(**asked)
    assert error.value.code == ExitCode.UNAVAILABLE
    for part in named:
        assert part in error.value.render()


@pytest.mark.parametrize(
    ("there", "asked", "limit", "room"),
    [
        ([{"CPU": 8}], {"cpu": 2}, None, 4),
        ([{"CPU": 8}], {"cpu": 2}, 3, 3),
        ([{"CPU": 8}], {"cpu": 2}, 9, 4),
        ([{"CPU": 8}], {"cpu": 5}, None, 1),
        ([{"CPU": 16, "GPU": 4}], {}, None, 4),
        ([{"CPU": 16, "GPU": 4}], {"gpu": 0.5, "cpu": 1}, None, 8),
        ([{"CPU": 8}, {"CPU": 8}], {"num_nodes": 2, "cpu": 4}, None, 2),
        ([{"CPU": 16, "GPU": 1}], {"gpu": 0.2, "cpu": 1}, None, 5),
        ([{"CPU": 16, "GPU": 1}], {"gpu": 0.1, "cpu": 1}, None, 10),
        ([{"CPU": 16, "GPU": 1}], {"gpu": 0.2}, None, 5),
        ([{"CPU": 16, "GPU": 1}], {"gpu": 0.3333}, None, 3),
        ([{"CPU": 16, "GPU": 2}], {"gpu": 0.4, "cpu": 1}, None, 4),  # what is left of two GPUs is of neither enough
        ([{"CPU": 3}, {"CPU": 3}], {"cpu": 2}, None, 2),
        ([{"CPU": 1}], {"cpu": 0.2}, None, 5),
    ],
    ids=str,
)
def test_how_many_trials_there_is_room_for(machines, there, asked, limit, room):
    machines(*there)
    assert cluster.at_once(share(**asked), limit) == room


@pytest.fixture
def started(monkeypatch):
    """The words with which Ray would be started."""
    words = {}
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: bool(words))
    monkeypatch.setattr(cluster.ray, "init", lambda **given: words.update(given))
    return words


def test_ray_is_started_here_once_unless_there_is_an_address(started, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    cluster.connect(Ray())
    assert (started["address"], started["num_cpus"]) == ("local", cpu_cores())
    assert "runtime_env" not in started
    cluster.connect(Ray(init=RayInit(address="10.0.0.1:6379")))
    assert started["address"] == "local", "an earlier batch of the sweep has started it"
    started.clear()
    cluster.connect(Ray(init=RayInit(address="10.0.0.1:6379")))
    assert started["address"] == "10.0.0.1:6379"
    assert "num_cpus" not in started, "a cluster has its own"


def test_a_cluster_that_does_not_answer(started, monkeypatch):
    def refuse(**words):
        raise ConnectionError("nobody there\nand a page more")

    monkeypatch.setattr(cluster.ray, "init", refuse)
    with pytest.raises(UserError, match="no Ray cluster answers at auto") as error:
        cluster.connect(Ray(init=RayInit(address="auto")))
    assert error.value.code == ExitCode.UNAVAILABLE
    assert error.value.why.startswith("nobody there\n")
    with pytest.raises(UserError, match="Ray could not be started"):
        cluster.connect(Ray())


def test_the_code_that_is_sent_is_the_code_alone(started, tmp_path, monkeypatch):
    files = (
        "src/a.py",
        "src/data/b.py",
        "conf/c.yaml",
        "src/data/__pycache__/b.pyc",
        "runs/x/best.ckpt",
        "photos/1.jpg",
    )
    for name in files:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(cluster, "PROJECT", tmp_path / "project")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cluster.connect(Ray(ship_code=True))
    sent = Path(started["runtime_env"]["working_dir"])
    found = sorted(path.relative_to(sent).as_posix() for path in sent.rglob("*") if path.is_file())
    assert found == ["conf/c.yaml", "src/a.py", "src/data/b.py"]
