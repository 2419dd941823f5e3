"""The folder of a run: who gets its name, what a refused command leaves, and what older runs are taken for."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from src.config import Config, Data
from src.engine.commands import config_checks
from src.engine.runs import files, run_dir
from src.engine.runs.errors import ExitCode, Terminated, UserError
from src.engine.runs.files import locked, write_csv, write_json, write_text
from src.engine.runs.run_dir import RunFolder, made_a_step
from src.engine.runs.run_names import claim


@pytest.fixture
def settings(tmp_path: Path):
    """settings(lr=0.1) -> the whole config as plain values, of a run in tmp_path/runs."""

    def make(lr: float = 0.001) -> dict:
        config = asdict(Config(data=Data(source="digits"), runs_dir=str(tmp_path / "runs")))
        config["optimizer"] |= {"name": "adamw", "lr": lr}
        config["model"]["backbone"] = "resnet18"
        config["strategy"]["name"], config["precision"]["name"] = "single", "fp32"
        return config

    return make


def opened(tmp_path: Path, config: dict, error: BaseException | None = None, resume: str = "auto", step: bool = False):
    """Opens runs/x, makes a step or not, and ends with the error."""
    with RunFolder.open(tmp_path / "runs/x", config, resume) as folder:
        if step:
            write_text(folder.checkpoints / "last.ckpt", "position")
        if error:
            raise error


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.UNAVAILABLE])
def test_a_refused_command_leaves_no_folder(tmp_path, settings, code):
    with pytest.raises(UserError):
        opened(tmp_path, settings(), UserError("refused", code=code))
    assert left(tmp_path) == []
    assert run_dir.opened() is None  # its traceback goes elsewhere


def test_nor_does_one_in_a_sub_folder(tmp_path, settings):
    config = settings() | {"name": "heads/big/x"}
    for others, stay in (([], []), (["heads/y"], ["heads"])):
        for path in others:
            (tmp_path / "runs" / path).mkdir(parents=True)
        with pytest.raises(UserError), RunFolder.open(tmp_path / "runs/heads/big/x", config):
            raise UserError("refused")
        assert left(tmp_path) == stay
        assert not (tmp_path / "runs/heads/big").exists()


def test_another_name_stays_in_the_sub_folder(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("TRAIN_COMMAND", "python -m src.train name=heads/x optimizer.lr=0.5")
    path, word = tmp_path / "runs/heads/x", {"name": "heads/x"}
    with RunFolder.open(path, settings() | word) as folder:
        write_text(folder.checkpoints / "last.ckpt", "position")
    with pytest.raises(UserError) as caught, RunFolder.open(path, settings(lr=0.5) | word):
        pass
    assert caught.value.fix == ["python -m src.train name=heads/x-2 optimizer.lr=0.5"]


def test_what_a_message_names_or_somebody_else_put_there_stays(tmp_path, settings):
    mine = tmp_path / "runs/x/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError):
        opened(tmp_path, settings(), UserError("2 of 9 images, listed there", code=ExitCode.DATA))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt(), Terminated()])
def test_another_end_leaves_the_folder_and_its_name_is_free(tmp_path, settings, error):
    with pytest.raises(type(error)):
        opened(tmp_path, settings(), error)
    run = tmp_path / "runs/x"
    assert run_dir.opened() == run  # where the traceback goes
    write_json(run / "batch_size.json", {"batch_size": 512})
    write_text(run / "error.log", "of the run before")
    opened(tmp_path, settings(lr=0.5))
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 0.5
    assert not (run / "batch_size.json").exists()  # it was found for other settings
    assert not (run / "error.log").exists()
    opened(tmp_path, settings(lr=0.6), resume="never")


def test_a_run_that_made_a_step_keeps_its_name(tmp_path, settings):
    with pytest.raises(UserError, match="refused"):  # even so it is no reason to delete anything
        opened(tmp_path, settings(), UserError("refused"), step=True)
    with pytest.raises(UserError, match="other settings") as caught:
        opened(tmp_path, settings(lr=0.5))
    assert "optimizer.lr: 0.001 there, 0.5 now" in caught.value.why
    assert caught.value.fix == ["python -m src.train name=x-2"]
    with pytest.raises(UserError, match="exists already"):
        opened(tmp_path, settings(), resume="never")
    assert json.loads((tmp_path / "runs/x/result.json").read_text())["state"] == "failed"
    assert run_dir.opened() is None  # a refused command writes nothing into a run that is not its own
    (tmp_path / "runs/x-2").mkdir()
    with pytest.raises(UserError) as caught:
        opened(tmp_path, settings(lr=0.5))
    assert caught.value.fix == ["python -m src.train name=x-3"]


def test_damaged_checkpoints_and_rows_count_as_steps(tmp_path):
    assert not made_a_step(tmp_path)
    write_text(tmp_path / "metrics.csv", "epoch,step\n")
    assert not made_a_step(tmp_path)
    write_text(tmp_path / "metrics.csv", "epoch,step\n1,3\n")
    assert made_a_step(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/previous.ckpt").write_bytes(b"")
    assert made_a_step(tmp_path)


def test_a_folder_in_use_is_not_touched(tmp_path, settings):
    with pytest.raises(ValueError, match="defect"):
        opened(tmp_path, settings(), ValueError("defect"))
    before = (tmp_path / "runs/x/config.yaml").read_text()
    with FileLock(tmp_path / "runs/x/.lock"), pytest.raises(UserError, match="another process") as caught:
        opened(tmp_path, settings(lr=0.5))
    assert caught.value.code == ExitCode.BUSY
    assert (tmp_path / "runs/x/config.yaml").read_text() == before


def test_a_job_of_a_sweep_keeps_its_folder(tmp_path, settings):
    config = settings() | {"runs_dir": str(tmp_path)}  # the sweep's folder is runs/, the job's is runs/x
    with pytest.raises(UserError):
        opened(tmp_path, config, UserError("refused"))
    assert json.loads((tmp_path / "runs/x/result.json").read_text())["state"] == "failed"


def test_an_error_after_the_end_does_not_undo_it(tmp_path, settings):
    with RunFolder.open(tmp_path / "runs/x", settings()) as folder:
        folder.finish(metrics={}, best_epoch=1, weights="epoch 1", epochs=1, steps=1)
    with pytest.raises(KeyError):
        opened(tmp_path, settings(), KeyError("val/new"))
    assert json.loads((tmp_path / "runs/x/result.json").read_text())["state"] == "finished"


def test_a_setting_that_an_older_run_does_not_know_has_its_default_there(tmp_path, settings, caplog):
    opened(tmp_path, settings(), step=True)
    file = tmp_path / "runs/x/config.yaml"
    stored = yaml.safe_load(file.read_text())
    del stored["model"]["label_smoothing"], stored["oom"], stored["data"]["image_size"]
    stored["model"]["gone"] = 3
    file.write_text(yaml.safe_dump(stored))
    opened(tmp_path, settings())
    assert "model.gone, which this version of the program does not know" in caplog.text
    composed = settings()
    composed["data"]["image_size"] = 64  # conf/data/digits.yaml has another default than the schema
    opened(tmp_path, composed)
    composed["model"]["label_smoothing"] = 0.3
    with pytest.raises(UserError) as caught:
        opened(tmp_path, composed)
    assert caught.value.why == "model.label_smoothing: 0.1, its default, there, 0.3 now"


def test_balanced_had_no_limit_in_older_runs(tmp_path, settings, caplog):
    from src.engine.runs.run_settings import stored_settings

    opened(tmp_path, settings(), step=True)
    stored = settings()
    stored["data"]["class_weights"] = "balanced"
    now = yaml.safe_load(yaml.safe_dump(stored))
    del stored["data"]["layout"]
    (tmp_path / "runs/x/config.yaml").write_text(yaml.safe_dump(stored))
    assert stored_settings(tmp_path / "runs/x")["data"]["class_weights"] == "inverse"  # evaluate: the loss of the run
    opened(tmp_path, now)
    assert "had no limit" in caplog.text


def test_evaluate_reads_settings_of_any_age(tmp_path, settings):
    from src.engine.runs.run_settings import merged, stored_settings

    stored = settings()
    del stored["memory"], stored["data"]["background"]
    stored["data"]["gone"], stored["tuning"] = 1, {"x": 2}
    write_text(tmp_path / "config.yaml", yaml.safe_dump(stored))
    read = config_checks.read(merged(stored_settings(tmp_path), {"data.batch_size": 7, "data.split_file": None}))
    assert (read.data.batch_size, read.data.background, read.memory.log) == (7, [255, 255, 255], True)


@pytest.mark.parametrize("text", ["", "- a", "x: [", "name: other program"])
def test_a_config_that_is_none_is_named(tmp_path, text):
    from src.engine.runs.run_settings import stored_settings

    write_text(tmp_path / "config.yaml", text)
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        stored_settings(tmp_path)


def test_names_that_are_no_text_keep_their_bytes(tmp_path):
    from src.engine.images.splits import read_split_file

    name = b"cats/Stra\xdfe.jpg".decode("utf-8", "surrogateescape")
    write_csv(tmp_path / "split.csv", ("path", "label", "split"), [(name, "cats", "test")])
    assert b"Stra\xdfe" in (tmp_path / "split.csv").read_bytes()
    assert list(read_split_file(tmp_path / "split.csv")) == [name]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "file.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("file.csv")
    write_text(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "file.csv").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "rows")
    assert os.read(reader, 10) == b"rows"
    (tmp_path / "as_stdout").symlink_to(
        f"/dev/fd/{os.open(tmp_path / 'pipe', os.O_RDWR)}"
    )  # as /dev/stdout in `| head`
    write_text(tmp_path / "as_stdout", "more")
    assert os.read(reader, 10) == b"more"
    os.close(reader)
    assert not (tmp_path / "pipe").is_file()


def dead_pid() -> int:
    """Of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_only_the_runs_own_leftovers_of_dead_processes_are_removed(tmp_path, settings):
    dead, alive = dead_pid(), os.getppid()
    run = tmp_path / "runs/x"
    own = ["config.yaml", "checkpoints/last.ckpt", "checkpoints/epoch-0012.ckpt", "model/model.safetensors"]
    others = ["notes.tmp", f"notes.txt.{dead}.tmp", f"checkpoints/mine.ckpt.{dead}.tmp", f"deep/config.yaml.{dead}.tmp"]
    for name in [*(f"{name}.{pid}.tmp" for name in own for pid in (dead, alive)), *others]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    opened(tmp_path, settings())
    left = {str(path.relative_to(run)) for path in run.rglob("*.tmp")}
    assert left == {*(f"{name}.{alive}.tmp" for name in own), *others}


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "/tmp/x",
        ".",
        "",
        "a/../b",
        "a/",
        "/",
        "./a",
        "a//b",
        "~",
        "~/x",
        ".checked",
        "a\0b",
    ],
)
def test_a_name_is_one_or_more_plain_parts(tmp_path, name):
    """Also that of a launch of torchrun, and the name in the command that is suggested."""
    with pytest.raises(UserError) as caught:
        claim(tmp_path, name)
    assert caught.value.code == ExitCode.CONFIG
    words = shlex.split(caught.value.fix[0])
    fixed = next(word.partition("=")[2] for word in words if word.startswith("name="))
    claim(tmp_path, fixed)
    with pytest.raises(UserError):
        claim(tmp_path, "x" * 300)
    assert not any(tmp_path.iterdir())


def test_plain_names_and_folders_of_them(tmp_path):
    for name in ("x", "a/b", "2026-11-28", "Bücher (1)", "-x", "a.b~"):
        assert claim(tmp_path, name) == tmp_path / name
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("of a run")
    with pytest.raises(UserError, match="lies in the folder of the run a"):
        claim(tmp_path, "a/model")


def test_a_disk_that_may_only_be_read_by_now_ends_with_73(tmp_path, settings):
    """A real mount where that is allowed, else a folder without permission to write."""
    opened(tmp_path, settings())
    run = tmp_path / "runs/x"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", run], capture_output=True).returncode == 0
    (tmp_path / "runs/x").chmod(0o555) if not mounted else None
    try:
        if not mounted and os.access(run, os.W_OK):
            pytest.skip("root without the right to mount")
        with pytest.raises(UserError) as caught:
            opened(tmp_path, settings())
    finally:
        subprocess.run(["umount", run]) if mounted else run.chmod(0o755)
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert str(run) in caught.value.found


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(tmp_path, settings, monkeypatch, caplog, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files._say_no_locks.cache_clear()
    opened(tmp_path, settings())
    opened(tmp_path, settings())
    assert caplog.text.count("The file system has no locks") == 1


def test_file_systems_that_know_less_than_a_disk(tmp_path, monkeypatch):
    """No fsync, and no rename over a file that is there."""
    rename = Path.replace

    def unsupported(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def replace(source, target):
        if Path(target).exists():
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", unsupported)
    monkeypatch.setattr(Path, "replace", replace)
    for text in ("1", "2"):
        write_text(tmp_path / "a.json", text)
        assert (tmp_path / "a.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_run_is_finished_when_all_of_its_files_are_there(tmp_path, settings):
    """The report is made before result.json says so; a disk that does not take result.json is no end."""
    seen = []

    def report(result):
        seen.append(result["state"])
        assert json.loads((tmp_path / "runs/x/result.json").read_text())["state"] == "running"

    with RunFolder.open(tmp_path / "runs/x", settings()) as folder:
        folder.finish(report, metrics={})
        assert seen == ["finished"]
        (folder.path / "result.json").unlink()
        (folder.path / "result.json").mkdir()
        with pytest.raises(OSError, match="directory"):
            folder.finish(metrics={})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no other process inherits the lock there")
def test_a_loader_process_does_not_keep_the_lock_of_a_run_that_was_killed(tmp_path):
    """It lives some seconds longer than its trainer, and the command may be repeated at once."""
    lock, busy, (ready, tell) = tmp_path / ".lock", UserError("busy"), os.pipe()
    with locked(lock, busy):
        if (loader := os.fork()) == 0:
            os.write(tell, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
    try:
        with locked(lock, busy), pytest.raises(UserError), locked(lock, busy):
            pass
    finally:
        os.kill(loader, signal.SIGKILL)
        os.waitpid(loader, 0)


def test_a_run_in_a_folder_whose_name_is_no_text(tmp_path, settings):
    """Bytes that are no UTF-8, as of a disk that an older system wrote."""
    from src.engine.runs.reading import flaw
    from src.engine.runs.writing import DurableCheckpointIO

    config = settings() | {"runs_dir": str(tmp_path / "Stra\udcdfe")}
    for _ in range(2):
        with RunFolder.open(tmp_path / "Stra\udcdfe/x", config) as folder:
            io = DurableCheckpointIO()
            io.save_checkpoint({"epoch": 0, "global_step": 1, "state_dict": {}}, folder.checkpoints / "last.ckpt")
            io.teardown()
    assert "holds code" in flaw(folder.checkpoints / "last.ckpt")  # it was read: a checkpoint without weights
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"Stra\xdfe"]
    folder.finish(metrics={})
    assert run_dir.read_result(folder.path)["state"] == "finished"
