"""Checking all images before training: what it finds, what it remembers, what the refusal says."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from src.engine.images import checking, labelled_images, scanning, time_limit
from src.engine.images.checking import CheckResult, check_images, refuse_bad_images
from src.engine.images.labelled_images import Listing
from src.engine.images.reading import ReadOptions
from src.engine.runs.errors import MAX_LINES, ExitCode, LoaderFault
from tests.engine.images.odd_images import colour_ramp, orientation_exif, write_corrupt_images

OPTIONS = ReadOptions()


def write_images(folder: Path, count: int) -> list[str]:
    """PNGs of 32 x 24, all different."""
    names = [f"cat/{index}.png" for index in range(count)]
    (folder / "cat").mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(colour_ramp() // (index + 1)).save(folder / name)
    return names


def check(folder: Path, names: list[str], memory: Path | None = None, options: ReadOptions = OPTIONS, workers: int = 2):
    return check_images(Listing(folder, names), options, memory, workers)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names that were decoded, in order."""
    names = []
    decode = checking.decode_image

    def recording(data, name, options):
        names.append(name)
        return decode(data, name, options)

    monkeypatch.setattr(checking, "decode_image", recording)
    return names


def test_results_are_complete_and_in_the_order_of_ids(tmp_path):
    good = write_images(tmp_path, 6)
    Image.fromarray(colour_ramp()).save(tmp_path / "turned.jpg", exif=orientation_exif(6))
    ids = [*good[::-1], *write_corrupt_images(tmp_path), "gone.jpg", str(tmp_path / good[0]), "turned.jpg"]
    checked = check(tmp_path, ids)
    assert list(checked) == ids
    assert {name: entry.error is None for name, entry in checked.items() if name in good} == dict.fromkeys(good, True)
    assert checked["empty.jpg"].error == "empty file"
    assert checked["truncated.jpg"].error == "the file ends too early (truncated)"
    assert "not an image" in checked["text.jpg"].error
    assert checked["gone.jpg"] == CheckResult("", 0, 0, "no such file")
    assert checked[good[0]] == checked[str(tmp_path / good[0])]
    assert (checked[good[0]].width, checked[good[0]].height) == (32, 24)
    assert (checked["turned.jpg"].width, checked["turned.jpg"].height) == (24, 32)
    assert len({checked[name].digest for name in good}) == len(good)
    assert all(len(checked[name].digest) == 32 for name in good)


def test_only_changed_files_are_decoded_again(tmp_path, decoded):
    names = [*write_images(tmp_path, 3), *write_corrupt_images(tmp_path)]
    memory = tmp_path / "new" / "memory.json"
    first = check(tmp_path, names, memory)
    assert sorted(decoded) == sorted(names)
    decoded.clear()
    assert check(tmp_path, names, memory) == first
    assert decoded == []
    os.utime(tmp_path / names[1], ns=(1, 1))
    longer = tmp_path / names[2]
    written = longer.stat().st_mtime_ns
    longer.write_bytes(longer.read_bytes() + b"more")
    os.utime(longer, ns=(written, written))
    Image.fromarray(colour_ramp()).save(tmp_path / "empty.jpg")
    again = check(tmp_path, names, memory)
    assert sorted(decoded) == sorted([names[1], names[2], "empty.jpg"])
    assert list(again) == names
    assert again["empty.jpg"].error is None
    assert again[names[1]] == first[names[1]]
    assert again[names[2]].digest != first[names[2]].digest


def test_another_limit_checks_again(tmp_path):
    names = write_images(tmp_path, 2)
    memory = tmp_path / "memory.json"
    assert check(tmp_path, names, memory)[names[0]].error is None
    strict = check(tmp_path, names, memory, ReadOptions(max_megapixels=0.0001))
    assert "megapixels, the limit is 0.0001" in strict[names[0]].error
    assert check(tmp_path, names, memory)[names[0]].error is None


def test_entries_of_other_ids_stay_in_the_memory(tmp_path, decoded):
    names = write_images(tmp_path, 3)
    memory = tmp_path / "memory.json"
    check(tmp_path, names, memory)
    check(tmp_path, [*write_corrupt_images(tmp_path)], memory)
    decoded.clear()
    check(tmp_path, names, memory)
    assert decoded == []


FOREIGN = [
    "",
    "{",
    "[]",
    "{}",
    "[" * 100_000,
    '{"version": 1, "options": {}, "files": {}}',
    '{"version": HEAD, "files": []}',
    '{"version": HEAD, "files": {"cat/0.png": [SIZE, TIME]}}',
    '{"version": HEAD, "files": {"cat/0.png": [SIZE, TIME, "d", 2, 3, null]}}',
    '{"version": HEAD, "files": {"cat/0.png": {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}}}',
    '{"version": HEAD, "files": {"cat/0.png": [SIZE, TIME, "", 32, 24, null, 0, 5]}}',
    '{"version": HEAD, "files": {"cat/0.png": [SIZE, TIME, [], 32, 24, {}, 0, []]}}',
    '{"version": HEAD, "files": {"cat/0.png": [SIZE, TIME, "", 32, 24, null, 999, []]}}',
    '{"version": HEAD, "files": {"cat/0.png": [SIZE, TIME, "", 9e, 24, null, 0, []]}}'.replace("9e", "9" * 400),
]


@pytest.mark.parametrize("content", FOREIGN)
def test_damaged_or_foreign_memory_is_ignored_and_replaced(tmp_path, decoded, content):
    names = write_images(tmp_path, 1)
    memory = tmp_path / "memory.json"
    head = json.dumps(checking._head(OPTIONS))
    status = (tmp_path / names[0]).stat()
    content = content.replace("SIZE", str(status.st_size)).replace("TIME", str(status.st_mtime_ns))
    memory.write_text(content.replace('{"version": HEAD', head[:-1]))
    assert check(tmp_path, names, memory)[names[0]].error is None
    assert decoded == names
    check(tmp_path, names, memory)
    assert decoded == names


def test_what_may_pass_without_a_change_of_the_file_is_not_remembered(tmp_path, monkeypatch):
    names = write_images(tmp_path, 2)
    memory = tmp_path / "memory.json"
    with monkeypatch.context() as patch:
        patch.setattr("src.engine.images.reading._to_rgb", raise_error(MemoryError()))
        assert check(tmp_path, names[:1], memory)[names[0]].error == "not enough memory to decode it"
        patch.setattr(Path, "read_bytes", raise_error(PermissionError(13, "Permission denied")))
        assert "Permission denied" in check(tmp_path, names[1:], None)[names[1]].error
    checked = check(tmp_path, names, memory)
    assert [checked[name].error for name in names] == [None, None]


def raise_error(error: BaseException):
    def fail(*arguments, **settings):
        raise error

    return fail


def test_ctrl_c_keeps_what_was_checked(tmp_path, monkeypatch):
    names = write_images(tmp_path, 40)
    memory = tmp_path / "memory.json"
    decode = checking.decode_image
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

    def interrupted(data, name, options):
        if name == names[20]:
            time.sleep(0.3)  # the main thread takes the results of the others
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return decode(data, name, options)

    with monkeypatch.context() as patch:
        patch.setattr(checking, "decode_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(tmp_path, names, memory)
    signal.signal(signal.SIGINT, before)
    kept = json.loads(memory.read_text())["files"]
    assert 10 <= len(kept) <= 21
    assert all(result.error is None for result in check(tmp_path, names, memory).values())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["memory.json"]


def test_memory_is_replaced_in_one_step(tmp_path, monkeypatch, caplog):
    names = write_images(tmp_path, 2)
    memory = tmp_path / "memory.json"
    check(tmp_path, names[:1], memory)
    before = memory.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", raise_error(OSError(28, "No space left on device")))
        check(tmp_path, names, memory)
    assert "No space left on device" in caplog.text
    assert memory.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["memory.json"]


def test_memory_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    names = write_images(tmp_path, 1)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        checked = check(tmp_path, names, tmp_path / "file" / "memory.json")
    assert checked[names[0]].error is None
    assert "cannot be remembered" in caplog.text


def test_files_are_decoded_at_the_same_time(tmp_path, monkeypatch):
    names = write_images(tmp_path, 2)
    both = threading.Barrier(2, timeout=10)
    decode = checking.decode_image

    def meet(data, name, options):
        both.wait()
        return decode(data, name, options)

    monkeypatch.setattr(checking, "decode_image", meet)
    assert len(check(tmp_path, names)) == 2


def test_progress_goes_to_stderr_and_only_to_a_terminal(tmp_path, capfd, monkeypatch):
    names = write_images(tmp_path, 3)
    check(tmp_path, names)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stderr for a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    memory = tmp_path / "memory.json"
    check_images(Listing(tmp_path, names), OPTIONS, memory, 2)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "checking images" in printed.err
    check_images(Listing(tmp_path, names), OPTIONS, memory, 2)
    assert capfd.readouterr() == ("", "")


LONG = "a folder with a long name/" * 8


@pytest.mark.parametrize("count", [1, 8, 9, 5000])
@pytest.mark.parametrize("folder", ["cat/", LONG, "två\nkatter/"])
def test_refusal_fits_the_screen_and_names_the_files(tmp_path, count, folder):
    bad = {f"{folder}broken_{index}.jpg": "not an image of a format " * 6 for index in range(count)}
    root = tmp_path / LONG
    error = refuse_bad_images(bad, 6000, root, tmp_path / "lists" / "bad.tsv")
    rendered = error.render(Path("/tmp/error.log"))
    assert error.code == ExitCode.DATA
    assert len(rendered.splitlines()) <= MAX_LINES
    assert "        ..." not in rendered.splitlines()
    assert f"{count} of 6000 images cannot be read" in rendered
    for index in range(min(count, 8)):
        assert f"broken_{index}.jpg: not an image" in rendered
    assert (f"and {count - 8} more" in rendered) == (count > 8)
    assert str(tmp_path / "lists" / "bad.tsv") in rendered
    listed = (tmp_path / "lists" / "bad.tsv").read_text(encoding="utf-8").splitlines()
    assert len(listed) == count
    assert all(len(line.split("\t")) == 2 for line in listed)


def test_refusal_suggests_a_command_that_can_be_pasted(tmp_path):
    error = refuse_bad_images({"a.jpg": "empty file"}, 2, tmp_path, None)
    command = shlex.split(error.fix[0], comments=True)
    assert command == ["python", "-m", "src.train", "data.on_bad_image=skip"]
    assert "listed" not in error.render()


def test_list_that_cannot_be_written_is_not_promised(tmp_path, caplog):
    (tmp_path / "file").touch()
    error = refuse_bad_images({"a.jpg": "empty file"}, 2, tmp_path, tmp_path / "file" / "bad.tsv")
    assert "bad.tsv" not in error.render()
    assert "cannot be written" in caplog.text


def test_names_that_are_not_text_are_shown_with_escapes(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(b"")
    memory = tmp_path / "memory.json"
    assert check(tmp_path, [name], memory)[name].error == "empty file"
    assert check(tmp_path, [name], memory)[name].error == "empty file"
    error = refuse_bad_images({name: "empty file"}, 1, tmp_path, tmp_path / "bad.tsv")
    assert "caf\\udce9.jpg: empty file" in error.render()


def test_a_file_that_hangs_ends_the_check_with_its_name(tmp_path, monkeypatch):
    """A read from a named pipe: nothing interrupts it, and no other thread of the check may wait for it."""
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    real = labelled_images.read_bytes
    pipe = tmp_path / "pipe"
    monkeypatch.setattr(
        labelled_images, "read_bytes", lambda path, name: pipe.read_bytes() if name == "3.png" else real(path, name)
    )
    began = time.monotonic()
    with pytest.raises(LoaderFault, match=r"3\.png: no answer within 0\.2 s") as caught:
        check_images(Listing(tmp_path, names), OPTIONS, None, 2, timeout_seconds=0.2)
    assert caught.value.code == ExitCode.DATA
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("look", ["scan", "holds_images"])
def test_a_folder_that_hangs_is_named(tmp_path, monkeypatch, look):
    monkeypatch.setattr(time_limit, "SECONDS", 0.2)
    for work in ("_entries", "_begins_with_images"):
        monkeypatch.setattr(scanning, work, lambda folder: time.sleep(5))
    with pytest.raises(LoaderFault, match=f"{tmp_path}: no answer within 0.2 s") as caught:
        getattr(scanning, look)(tmp_path)
    assert "timeout_seconds" not in caught.value.render(), "which is for images"
