"""python -m src.doctor: what it finds, its exit code, and that it leaves no run."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.faults.injecting import CHILDREN, armed, little_memory
from src.config import Config
from src.engine.doctor import labels, machine, processes
from src.engine.doctor.findings import Findings
from src.engine.doctor.machine import answered, cpu_quota
from src.engine.doctor.rehearsal import _show_doubts
from src.engine.doctor.versions import check_versions, refuse_missing
from src.engine.runs.errors import ErrorOfProcess, ExitCode, UserError
from tests.conftest import ROOT, SMALL, check_error, write_images

FOLDER = ("data=image_folder", "data.root=photos", "data.image_size=64", *SMALL[2:])


@pytest.mark.slow
def test_it_says_what_a_run_would_need_and_find(command, tmp_path):
    """Copies, uneven classes, a setting without effect, and memory for half of the batch."""
    write_images(tmp_path / "photos", {"cats": 40, "rare": 3})
    shutil.copy(tmp_path / "photos/cats/001.png", tmp_path / "photos/cats/copy.png")
    memory = armed([little_memory(8)]) | {"PYTHONPATH": f"{CHILDREN}{os.pathsep}{ROOT}"}
    done = command("doctor", *FOLDER, "oom.policy=stop", "model.min_match=0.5", **memory)

    assert done.code == ExitCode.OUT_OF_MEMORY, done.text
    text = " ".join(done.out.split())
    for found in (
        "warning settings model.min_match=0.5",
        "ok processes 2 reach each other (gloo",
        "warning run 2 images are copies, byte for byte",
        "ok images 44 in 2 classes",
        "warning run The classes are uneven",
        "problem run out of memory with 16 images at a time; 8 fit fix python -m src.train",
        "A training would end with exit code 71.",
    ):
        assert found in text, f"{found!r} is not in:\n{done.out}"
    assert text.count("model.min_match=0.5 has no effect") == 1
    assert "data.batch_size=8" in done.out.splitlines()[-1]
    prose = [line for line in done.out.splitlines() if "python -m" not in line]
    assert max(map(len, prose)) <= 80
    assert "\x1b" not in done.out
    assert {path.name for path in Path("runs").iterdir()} <= {".checked", ".images"}, "no run's folder is left"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_it_finds_labels_that_were_swapped(processes, command, tmp_path):
    """In two processes as in one. The features stay for the training, which computes none of the images again."""
    write_images(tmp_path / "photos", {"cats": 40, "dogs": 40})
    for number in range(2):
        Path(f"photos/cats/{number:03d}.png").rename(f"photos/dogs/swapped{number}.png")
    ddp = ["strategy=ddp", f"trainer.devices={processes}", "trainer.accelerator=cpu"] if processes > 1 else []
    words = [word for word in FOLDER if word != "baseline=none"] + ddp
    done = command("doctor", *words)

    assert done.code == 0, done.text
    text = " ".join(done.out.split())
    assert "ok baseline val accuracy" in text
    assert "warning labels 2 labels of 2 of 80 images in doubt for the baseline, the first of dogs/swapped" in text
    assert "dogs, where it expects cats fix less runs/.doctor-" in text
    (listed,) = Path("runs").glob(".doctor-*/*")
    assert sorted(line.partition(",")[0] for line in listed.read_text().splitlines()[1:]) == [
        "dogs/swapped0.png",
        "dogs/swapped1.png",
    ]
    assert "computing features" not in command("train", *words, "model=features").text


@pytest.mark.parametrize(("labels", "is_said"), [({"seconds": 200.0}, True), ({}, False)])
def test_it_says_which_command_finds_labels_in_doubt_where_that_takes_long(labels, is_said, capsys, tmp_path):
    _show_doubts(Findings(), Config(), {"images": 100, "labels": labels}, tmp_path / "doubts.csv")
    text = " ".join(capsys.readouterr().out.split())
    said = "the run lists those in doubt in doubts.csv, as model=features does alone, by a pass of about 3 min"
    assert (said in text) == is_said


@pytest.mark.parametrize(
    ("rows", "accuracy", "mark"),
    [(5, 0.95, "warning"), (5, 0.6, "ok"), (5, None, "ok"), (1, 0.95, "ok"), (0, 0.95, "ok")],
)
def test_a_bad_baseline_says_little_about_labels(rows, accuracy, mark, capsys, tmp_path):
    """An image may have several labels in doubt."""
    path = tmp_path / "doubts.csv"
    lines = [f"{number}.png,train,{label},not {label},0.9" for number in range(rows) for label in ("owl", "cat")]
    path.write_text("\n".join(["path,split,label,suggested,probability", *lines]))
    _show_doubts(Findings(), Config(), {"images": 100, "labels": {"accuracy": accuracy}}, path)
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"{mark} labels")
    assert f"{2 * rows} labels of {rows} of 100 images in doubt" in text or not rows
    assert path.exists() == bool(rows)


def test_a_pass_over_the_images_that_would_take_long_is_left_out(monkeypatch):
    """Its length follows from the pace of the second batch: the first starts the loader processes."""
    table = SimpleNamespace(has=torch.zeros(1000, dtype=torch.bool))
    clock = count(0.0, 7.0)
    monkeypatch.setattr(labels.time, "perf_counter", lambda: next(clock))

    def compute(members):
        table.has[list(members)] = True
        return table

    task = SimpleNamespace(images=SimpleNamespace(splits={"val": range(100), "test": [], "train": range(100, 1000)}))
    assert labels._seconds_of_pass(task, SimpleNamespace(table=compute), 20) == (1000 - 40) * 7 / 20
    compute(range(100))
    assert labels._seconds_of_pass(task, SimpleNamespace(table=compute), 20) == (900 - 40) * 7 / 20, "val is there"
    compute(range(1000))
    assert labels._seconds_of_pass(task, SimpleNamespace(table=compute), 20) == 0


def test_what_is_typed_wrongly_is_answered_as_in_a_training(command):
    mistyped = command("doctor", "data.batchsize=4")
    check_error(mistyped, ExitCode.CONFIG, "data.batch_size", "python -m src.train data.batch_size=4")
    absent = command("doctor", "data=image_folder", "data.root=nowhere")
    check_error(absent, ExitCode.NO_INPUT, "data.root=nowhere")
    sweep = command("doctor", "-m", "seed=1,2")
    check_error(sweep, ExitCode.CONFIG, "python -m src.doctor seed=1\n")
    assert "python -m src.doctor" in command("doctor", "--help").out
    assert not Path("runs").exists()


def test_versions_that_are_missing_malware_or_out_of_bounds(monkeypatch, capsys):
    real, installed = importlib.metadata.version, {"torch": "2.9.1", "timm": "9.0"}

    def version(name: str) -> str:
        if name in installed and not installed[name]:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check_versions(warned := Findings())
    printed = capsys.readouterr().out
    assert warned.problem is None
    assert "pip install 'torch<2.16,>=2.10'" in printed
    assert "timm is 9.0" in printed

    installed["lightning"] = "2.6.3"
    check_versions(malware := Findings())
    assert malware.problem is not None
    assert "pip uninstall -y lightning" in malware.fix
    installed["lightning"] = ""
    with pytest.raises(UserError, match="not installed: lightning"):
        refuse_missing()


def test_the_cpu_time_of_a_container(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/box\n")
    (tmp_path / "sys/fs/cgroup/pod/box").mkdir(parents=True)
    assert cpu_quota(tmp_path) is None
    (tmp_path / "sys/fs/cgroup/pod/box/cpu.max").write_text("max 100000\n")
    (tmp_path / "sys/fs/cgroup/pod/cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/old\n")
    (tmp_path / "sys/fs/cgroup/cpu/old").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu/old/cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "sys/fs/cgroup/cpu/old/cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) == 0.5


def test_a_disk_that_does_not_answer_ends_the_wait(monkeypatch):
    monkeypatch.setattr(machine, "ANSWER_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"mnt/dead.*no answer"):
        answered(Path("/mnt/dead"), lambda _: threading.Event().wait(30))


def test_processes_that_do_not_answer_and_a_torchvision_for_another_torch(monkeypatch, capsys):
    facts = {
        "torch": "2.14.1",
        "cuda_build": None,
        "driver": None,
        "gpus": [],
        "bf16": False,
        "mps": False,
        "threads": 2,
    }
    answers = [([facts], "no answer within 80 seconds"), ([], "operator torchvision::nms does not exist")]
    monkeypatch.setattr(processes, "_probe", lambda count, accelerator: answers.pop(0))
    monkeypatch.setattr(processes, "most_gpus", lambda: 1)
    config = Config()
    processes.check_processes(alone := Findings(), config)
    assert (alone.problem, alone.warnings) == (None, 2), "no GPU, and no ddp: a run on the CPU would start"
    assert "is a build without CUDA" in capsys.readouterr().out
    processes.check_processes(broken := Findings(), config)
    assert broken.problem is not None
    assert "pip install --force-reinstall torch torchvision" in broken.fix


def test_the_error_of_a_process_is_one_finding(capsys):
    text = "ERROR   no file  (exit code 65)\nwhere   a\nwhy     first\n        second\nfix     ls\nor      cd\ntrace   x.log"
    (findings := Findings()).fail("run", ErrorOfProcess(text, ExitCode.DATA))
    findings.conclude("python -m src.train")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "problem  run        no file (a): first second"
    assert lines[-1] == "  ls"
    assert not any("x.log" in line for line in lines)
