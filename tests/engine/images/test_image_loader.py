"""What hangs, breaks or ends its process while images are loaded is named, whichever process it happens in."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from src.config import Data
from src.data.module import ImageData
from src.data.sources import load_images
from src.engine.images import image_loader, loader_watch
from src.engine.images.image_loader import LoaderSettings
from src.engine.images.labelled_images import LabelledImages
from src.engine.images.loading import eval_loader, train_loader
from src.engine.images.reading import ImageError
from src.engine.images.resizing import eval_transform
from src.engine.images.sampler import EpochSampler
from src.engine.images.time_limit import NoAnswer, one_by_one
from src.engine.runs.errors import ExitCode, LoaderFault, Terminated, UserError
from src.engine.runs.files import write_csv
from src.engine.runs.position import PositionCheckpoint, StopOnSignal
from src.engine.runs.reading import read_checkpoint
from src.engine.runs.writing import DurableCheckpointIO
from src.tasks.multiclass import Multiclass
from tests import warm
from tests.engine.runs.small_training import SQUARE, classifier, fit
from tests.engine.runs.small_training import data as small_data
from tests.engine.runs.small_training import images as small_images

LABELS = [0, 1] * 6


def _make_images(faults=None, root="photos") -> LabelledImages:
    """12 images of two classes, all of them in train and in val; faults: index -> what happens instead of a read."""

    def read(index: int) -> torch.Tensor:
        (faults or {}).get(index, lambda: None)()
        return torch.full((3, 8, 8), index, dtype=torch.uint8)

    members = list(range(12))
    splits = {"train": members, "val": members, "test": []}
    return LabelledImages(("a", "b"), [f"{index}.png" for index in members], LABELS, splits, read, root=Path(root))


def settings(workers: int, **changes) -> LoaderSettings:
    return replace(LoaderSettings(4, workers, timeout_seconds=0.5), **changes)


def val(images: LabelledImages, workers: int, **changes):
    return eval_loader(images, "val", SQUARE, settings(workers, **changes))


def training(images: LabelledImages, workers: int, **changes):
    sampler = EpochSampler(images.splits["train"], 4, 0)
    return train_loader(images, eval_transform(SQUARE), sampler, settings(workers, **changes), 8)


def broken() -> None:
    raise ImageError("photos/5.png: the file ends too early (truncated)")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_hangs_is_named_in_time(tmp_path, workers):
    os.mkfifo(tmp_path / "5.png")  # a read that nothing interrupts
    batches = iter(val(_make_images({5: (tmp_path / "5.png").read_bytes}, tmp_path), workers))
    next(batches)
    began = time.monotonic()
    with pytest.raises(LoaderFault, match=f"{tmp_path}/5.png: no answer within 0.5 s") as caught:
        next(batches)
    assert caught.value.code == ExitCode.DATA
    assert time.monotonic() - began < 10


def test_a_slow_batch_is_not_a_hanging_image():
    slow = {index: lambda: time.sleep(0.2) for index in range(12)}
    assert len(list(val(_make_images(slow), 0, timeout_seconds=0.3))) == 3


def test_without_a_limit_nothing_is_ended():
    assert len(list(val(_make_images({5: lambda: time.sleep(1.7)}), 0, timeout_seconds=0))) == 3
    with pytest.raises(LoaderFault):  # the same image with one
        list(val(_make_images({5: lambda: time.sleep(1.7)}), 0, timeout_seconds=0.1))


def test_an_error_of_the_work_keeps_its_type_and_what_was_done_before_is_not_lost():
    assert one_by_one(str.upper, ["a", "b"], 5) == ["A", "B"]
    with pytest.raises(ZeroDivisionError):
        one_by_one(lambda number: 1 // number, [1, 0], 5)
    with pytest.raises(NoAnswer, match="3: no answer"):
        one_by_one(lambda number: time.sleep(number - 1), [1, 3], 0.1)


def test_a_loader_process_that_is_killed_is_named_with_its_cause_and_its_image():
    """torch notices the end of a process a second later, so all of them wait at once."""
    expected = {
        signal.SIGKILL: (LoaderFault, ExitCode.PROCESS_LOST, "SIGKILL", "memory was full"),
        signal.SIGSEGV: (LoaderFault, ExitCode.PROCESS_LOST, "SIGSEGV", "a library crashed"),
        signal.SIGBUS: (UserError, ExitCode.UNAVAILABLE, "shared memory", "/dev/shm"),
        signal.SIGTERM: (Terminated, None, "", ""),
    }
    found: dict[int, BaseException] = {}
    before = signal.getsignal(signal.SIGCHLD)

    def wait(number: int, batches) -> None:
        try:
            list(batches)
        except BaseException as error:
            found[number] = error

    threads = []
    for number in expected:
        faults = {9: lambda number=number: (os.kill(os.getpid(), number), time.sleep(60))}
        batches = iter(val(_make_images(faults), 1, timeout_seconds=60))
        next(batches)
        threads.append(threading.Thread(target=wait, args=(number, batches)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    signal.signal(signal.SIGCHLD, before)
    for number, (kind, code, *words) in expected.items():
        assert type(found[number]) is kind, number
        if isinstance(found[number], UserError):
            assert found[number].code == code
            assert all(word in found[number].render() for word in words), found[number].render()
            if kind is LoaderFault:
                assert "it was reading photos/9.png" in found[number].render()


def test_after_ctrl_c_nothing_waits_for_what_hangs():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # tests that run in the background inherit that it is ignored
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        one_by_one(time.sleep, [5], 60)
    assert one_by_one(str, [1], 0.5) == ["1"]


STOPPED = """
import time
from src.engine.images.time_limit import one_by_one
def work(number):
    print("begun", flush=True)
    while time.thread_time() < 0.2: pass
    return number
print(one_by_one(work, [1], 0.5))
"""


def test_a_process_that_is_stopped_for_longer_than_the_limit_goes_on():
    """Ctrl-Z, or a scheduler that suspends jobs."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", STOPPED], cwd=warm.ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert out == "[1]\n", err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork")
def test_loader_processes_are_forked_with_python_3_14_too():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)  # the default there
    try:
        assert (
            len(list(val(_make_images(), 1))) == 3
        )  # the local function that reads could not be sent to a new process
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_process_that_has_closed_its_pipes_is_waited_for():
    """A moment passes before it has an exit code."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    dying = SimpleNamespace(pid=7, exitcode=None, sentinel=process.sentinel)
    dying.join = lambda: setattr(dying, "exitcode", -signal.SIGKILL)
    explained = loader_watch.explained(ConnectionResetError(), val(_make_images(), 0).dataset, [dying])
    assert isinstance(explained, LoaderFault)
    assert "SIGKILL" in explained.found


class BlockedForks:
    """The forks of this process with these numbers never return in the child, which SIGTERM does not end."""

    def __init__(self) -> None:
        self.forks: set[int] = set()
        self.count = 0
        os.register_at_fork(before=self.count_one, after_in_child=self.block)

    def count_one(self) -> None:
        self.count += 1

    def block(self) -> None:
        if self.count in self.forks:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)


@pytest.fixture(scope="module")
def _blocked_forks():
    return BlockedForks()  # Python cannot take it off again


@pytest.fixture
def blocked_forks(_blocked_forks, monkeypatch):
    """The limit of a start is two seconds here; no process is left."""
    monkeypatch.setattr(image_loader, "START_SECONDS", 2.0)
    monkeypatch.setattr(image_loader, "SECOND_START_SECONDS", 20.0)
    monkeypatch.setattr(loader_watch, "WAIT_SECONDS", 0.25)
    _blocked_forks.count, before = 0, set(multiprocessing.active_children())
    yield _blocked_forks
    _blocked_forks.forks = set()
    assert set(multiprocessing.active_children()) <= before


def shown(batches) -> list[list[int]]:
    return [images[:, 0, 0, 0].tolist() for images, _ in batches]


@pytest.mark.parametrize("blocked", [{1}, {2}, {1, 2}])
def test_a_loader_process_that_blocks_in_fork_is_replaced(blocked_forks, blocked, caplog):
    expected = shown(training(_make_images(), 0))
    for _ in range(2):
        blocked_forks.forks, blocked_forks.count = blocked, 0
        caplog.clear()
        try:
            found = shown(training(_make_images(), 2))
            break
        except LoaderFault:  # Python's own fork blocked at the second start: seldom, and beside threads, as pytest has
            continue
    assert found == expected
    assert caplog.text.count("did not start within 2 s: all of them are started again") == 1
    assert blocked_forks.count == 4


def test_loader_processes_that_block_twice_end_the_run_with_their_cause(blocked_forks, monkeypatch):
    blocked_forks.forks = {1, 3}
    monkeypatch.setattr(image_loader, "SECOND_START_SECONDS", 3.0)
    with pytest.raises(LoaderFault, match="did not start within 3 s") as caught:
        list(val(_make_images(), 2))
    assert caught.value.code == ExitCode.PROCESS_LOST


def test_loader_processes_that_are_slow_but_started_are_left_alone(blocked_forks, caplog):
    slow = _make_images({5: lambda: time.sleep(3)})
    assert len(list(val(slow, 2, timeout_seconds=60))) == 3
    assert not caplog.records
    assert blocked_forks.count == 2


def test_a_blocked_process_is_no_orphan_where_nobody_waits_for_it(blocked_forks):
    blocked_forks.forks = {1}
    loader = val(_make_images(), 1)
    loader.begin(2.0)
    (process,) = loader.processes
    del loader
    assert process.exitcode == -signal.SIGKILL


def test_a_loader_process_ends_with_a_trainer_that_was_killed_while_it_started(tmp_path):
    program = f"""
import os, pathlib, signal, threading, time
from tests.engine.images.test_image_loader import _make_images, val
def start():
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(2)
os.register_at_fork(after_in_child=start)
threading.Timer(1, os.kill, [os.getpid(), signal.SIGKILL]).start()
list(val(_make_images(), 1))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -signal.SIGKILL
    loader = Path("/proc") / (tmp_path / "pid").read_text()
    for _ in range(100):
        if not loader.exists():
            return
        time.sleep(0.1)
    os.kill(int(loader.name), signal.SIGKILL)
    pytest.fail("the loader process is left over")


@pytest.fixture
def silence_of_3_seconds(monkeypatch):
    """With a limit of 1 s for an image, a silent loader process is waited for three seconds."""
    monkeypatch.setattr(loader_watch, "WAIT_SECONDS", 0.25)
    monkeypatch.setattr(loader_watch, "GRACE_SECONDS", 2.0)


def test_a_loader_process_that_is_stopped_amid_an_image_is_named(silence_of_3_seconds, caplog):
    """By a signal to it alone: its own time limit stands still, too. It is not started again: the image may be the cause."""
    faults = {9: lambda: (os.kill(os.getpid(), signal.SIGSTOP), time.sleep(60))}
    batches = iter(val(_make_images(faults), 1, timeout_seconds=1))
    next(batches)
    (process,) = batches.loader.processes
    with pytest.raises(LoaderFault, match=rf"no answer from a loader process \(pid {process.pid}\)") as caught:
        list(batches)
    assert "stopped by a signal" in caught.value.render()
    assert "reading photos/9.png" in caught.value.render()
    assert not caplog.records
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


def test_a_loader_process_that_is_stopped_between_two_batches_is_replaced(silence_of_3_seconds, caplog):
    loader = val(_make_images(), 1, timeout_seconds=1)
    batches = iter(loader)
    batches.batches = loader.begin(60.0)
    (process,) = loader.processes
    time.sleep(1)  # two batches are done, and it waits until one of them was received
    os.kill(process.pid, signal.SIGSTOP)
    assert shown(batches) == shown(val(_make_images(), 0))
    assert caplog.text.count(f"(pid {process.pid}) for 3 s: all of them are started again") == 1
    assert process.exitcode == -signal.SIGKILL


def test_loader_processes_stay_from_pass_to_pass():
    """A fork in every epoch had the trainer copy all of its memory."""
    loader = training(_make_images(), 2)
    expected = shown(loader)
    processes = loader.processes
    assert shown(loader) == expected
    assert loader.processes == processes
    assert len(processes) == 2
    loader.end()
    assert not processes & set(multiprocessing.active_children())
    assert shown(loader) == expected


def test_loader_processes_end_with_the_training():
    """Those of train and val would lie idle beside those that measure the network on test, with memory of their own."""
    module = ImageData(Data(augment="none", batch_size=5, num_workers=1), small_images(), SQUARE, seed=0)
    trainer = fit(classifier(1), 1, module=module)
    assert trainer.train_dataloader.num_workers == trainer.val_dataloaders.num_workers == 1
    assert not multiprocessing.active_children()


def test_loader_processes_end_with_a_loader_that_the_collector_of_cycles_finds():
    """As the trainer's are. torch's own way to end them waits 5 s for each there, in vain, and sends SIGTERM."""
    loader = val(_make_images(), 2)
    list(loader)
    processes, cycle = loader.processes, [loader]
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


def test_a_loader_process_that_is_stopped_between_two_passes_is_replaced(silence_of_3_seconds, caplog):
    loader = val(_make_images(), 1, timeout_seconds=1)
    expected = shown(loader)
    (process,) = loader.processes
    os.kill(process.pid, signal.SIGSTOP)
    assert shown(loader) == expected
    assert caplog.text.count(f"(pid {process.pid}) for 3 s: all of them are started again") == 1
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow  # torch looks every 5 s whether a process was killed
def test_a_loader_process_that_is_killed_between_two_passes_is_named():
    loader = val(_make_images(), 1, timeout_seconds=60)
    list(loader)
    (process,) = loader.processes
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(LoaderFault, match=rf"a loader process \(pid {process.pid}\) was ended by SIGKILL"):
        list(loader)


def test_who_reads_in_a_thread_of_the_trainer_computes_with_one_thread():
    """A second team of OpenMP threads made every step 1.4 times as slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images, seen = _make_images(), []
        read = lambda index: (seen.append(torch.get_num_threads()), images.read(index))[1]  # noqa: E731
        list(val(replace(images, read=read), 0))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def lock_of_the_second(monkeypatch):
    """A lock that the second of the loader processes takes before it reads its first image."""
    lock = threading.Lock()

    def after_the_lock(*arguments):
        worker = get_worker_info()
        if worker and worker.id == 1:
            with lock:
                pass
        return one_by_one(*arguments)

    monkeypatch.setattr(image_loader, "one_by_one", after_the_lock)
    return lock


def test_a_loader_process_that_hangs_before_its_first_image_is_replaced(
    silence_of_3_seconds, lock_of_the_second, caplog
):
    """For a lock that was held when it was forked, as CPython's are sometimes; the first process has made a batch by then."""
    expected = shown(training(_make_images(), 0))
    loader = training(_make_images(), 2, timeout_seconds=1)
    with lock_of_the_second:
        loader.begin(60.0)
    assert shown(loader) == expected
    assert caplog.text.count("for 3 s: all of them are started again") == 1


@pytest.mark.slow  # torch looks every 5 s whether a process was killed
def test_a_loader_process_that_hangs_before_its_first_image_twice_ends_the_run(
    silence_of_3_seconds, lock_of_the_second, caplog
):
    with lock_of_the_second, pytest.raises(LoaderFault, match="no answer from a loader process") as caught:
        list(val(_make_images(), 2, timeout_seconds=1))
    assert "a first attempt failed alike" in caught.value.why
    assert caught.value.code == ExitCode.PROCESS_LOST
    assert len(caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_is_named_or_skipped_as_the_policy_says(workers, caplog):
    images = _make_images({5: broken, 7: broken})
    with pytest.raises(LoaderFault, match=r"broke while the run was under way: photos/5\.png: the file ends too early"):
        list(val(images, workers))

    measured = [labels.tolist() for _, labels in val(images, workers, skip_bad=True)]
    assert measured == [LABELS[:4], [0, 0], LABELS[8:]]  # left out: nothing counts twice in a metric
    assert caplog.text.count("it broke since it was checked and is left out") == 2

    batches = list(training(images, workers, skip_bad=True))
    assert [len(labels) for _, labels in batches] == [4, 4, 4]
    shown = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches]).tolist()
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert sorted(shown) == [0, 1, 2, 3, 4, 6, 8, 9, 9, 9, 10, 11]  # 9 is the next of the class that can be read
    assert labels == [LABELS[index] for index in shown]
    again = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in training(images, 1 - workers, skip_bad=True)])
    assert again.tolist() == shown


def test_a_batch_or_a_class_of_which_nothing_is_left(caplog):
    nothing_of_a_batch = _make_images(dict.fromkeys(range(4), broken))
    assert [len(labels) for _, labels in val(nothing_of_a_batch, 0, skip_bad=True)] == [4, 4]
    no_class = _make_images(dict.fromkeys(range(1, 12, 2), broken))
    with pytest.raises(LoaderFault, match="nor can any other image of its class"):
        list(training(no_class, 0, skip_bad=True))


@pytest.mark.parametrize(
    ("fault", "workers", "error"),
    [
        ("hangs", 0, LoaderFault),
        ("killed", 2, LoaderFault),
        ("told to end", 0, Terminated),
        ("told to end", 2, Terminated),
    ],
)
def test_a_fault_between_two_steps_saves_the_position_and_training_goes_on_exactly(tmp_path, fault, workers, error):
    """When image 3 is read for the third time, it hangs, kills its loader process, or hangs without a limit of time while
    SIGTERM arrives, which is answered at once: what was trained is not lost."""

    def train(folder, last=0, resume=None):
        module, reads = small_data(), multiprocessing.Value("i", 0)
        module.config.timeout_seconds = 0 if fault == "told to end" else 0.1 if fault == "hangs" else 60
        module.config.num_workers = workers
        healthy, trainer, step_before = small_images(), os.getpid(), multiprocessing.Event()

        class Steps(L.Callback):
            def on_train_batch_end(self, trainer, *arguments):
                if trainer.global_step == 9:
                    step_before.set()

        def read(index):
            if index == 3:
                with reads.get_lock():
                    reads.value += 1
                if reads.value == last:
                    step_before.wait(60)
                    time.sleep(0.2)
                    if fault == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if fault == "told to end":
                        os.kill(trainer, signal.SIGTERM)
                    hang.wait(300)
            return healthy.read(index)

        module.images = replace(healthy, read=read)
        model = classifier()
        options = {"resume": resume, "plugins": [DurableCheckpointIO()], "module": module}
        position = PositionCheckpoint(folder)
        fit(model, 5, Steps(), position, StopOnSignal(position), **options)
        return [*model.state_dict().values()]

    hang = threading.Event()
    expected = train(tmp_path / "whole")
    began = time.monotonic()
    with pytest.raises(error):
        train(tmp_path / "cut", last=3)
    hang.set()
    time.sleep(0.5)  # the thread that hung goes on, and puts random states back: not in the middle of a training
    assert time.monotonic() - began < 150, "not the 300 s of the image"
    assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == 9, "amid the third epoch"
    found = train(tmp_path / "cut", resume=tmp_path / "cut" / "last.ckpt")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_little_shared_memory_takes_fewer_loader_processes(monkeypatch, caplog):
    free = type("Free", (), {"f_bavail": 40, "f_frsize": 4 * 3 * 64})()  # 40 batches
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    assert val(_make_images(), 19).num_workers == 19
    assert not caplog.records
    assert val(_make_images(), 20).num_workers == 19
    free.f_bavail = 3
    assert val(_make_images(), 20).num_workers == 0
    assert "none of them are used" in caplog.text


def test_batches_are_in_shared_memory_before_another_thread_hands_them_over(monkeypatch):
    """Without room the error of that thread would be swallowed, and its batch be waited for without an end."""
    items = ([(torch.zeros(3, 8, 8), 1)] * 2, {})
    alone, _ = image_loader._collate(image_loader.default_collate, items)
    assert not any(part.is_shared() for part in alone)
    monkeypatch.setattr(image_loader, "get_worker_info", lambda: "a loader process")
    batch, _ = image_loader._collate(image_loader.default_collate, items)
    assert all(part.is_shared() for part in batch)
    assert image_loader._collate(image_loader.default_collate, ([], {"x": "broke"})) == (None, {"x": "broke"})


def test_a_run_that_goes_on_keeps_the_images_that_broke_so_that_its_epochs_stay_as_long(tmp_path):
    root, split = tmp_path / "photos", tmp_path / "split.csv"
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
    data = Data(source="image_folder", root=str(root), on_bad_image="skip")
    places = {"cache_dir": tmp_path / "memory"}
    whole = load_images(data, Multiclass(), 0, **places)
    write_csv(split, *whole.table())
    for name in (whole.names[whole.splits["train"][0]], whole.names[whole.splits["test"][0]]):
        (root / name).write_bytes(b"")
    again = load_images(data, Multiclass(), 0, **places, run_split=split)
    assert again.rows() == whole.rows()
    assert len(load_images(data, Multiclass(), 0, **places).names) == 10  # a run that begins leaves them out
