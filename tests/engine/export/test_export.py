"""Every format leaves a file that gives the network's outputs, or leaves nothing."""

from __future__ import annotations

import csv
import importlib.util
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from src import export
from src.engine.export import export_run, verification
from src.engine.export.formats import FORMATS, TORCH_EXPORT, Format, choose_format
from src.engine.export.verification import TOLERANCE, verify
from src.engine.export.writers import WRITERS
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.trained_model import TrainedModel
from src.models.building import load_whole, rebuild
from tests.conftest import SMALL, check_error, command_environment, write_images
from tests.tolerance import rounding


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a folder of images, whose path it knows from everywhere."""
    folder = tmp_path_factory.mktemp("export")
    photos = write_images(folder / "photos", {"apple": 20, "pear": 20, "plum": 14})
    data = ("data=image_folder", f"data.root={photos}", "data.image_size=32", "data.test_fraction=0.4")
    words = (*data, *SMALL[2:], "trainer.max_epochs=1", "name=fruit")
    subprocess.run(
        [sys.executable, "-m", "src.train", *words], cwd=folder, env=command_environment(), check=True, timeout=300
    )
    return folder / "runs" / "fruit"


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """The command without a process of its own: work('run=x', ...) -> what it says."""
    caplog.set_level(logging.INFO)

    def call(*words: str) -> str:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["src.export", *words])
        export.work()
        return caplog.text

    return call


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The images that exports were compared on; the comparison itself is left out."""
    seen: list[np.ndarray] = []

    def look(form: Format, folder: Path, images: np.ndarray, expected: np.ndarray) -> float:
        seen.append(images)
        return 0.0

    monkeypatch.setattr(export_run, "verify", look)
    return seen


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_networks_outputs(work, run, tmp_path, monkeypatch, name):
    form = FORMATS[name]
    said = work(f"run={run}", f"format={name}", f"out={tmp_path}/new/out")
    out = tmp_path / "new" / "out"
    assert {path.name for path in out.iterdir()} == {form.file, "model.json"}
    assert (out / "model.json").read_bytes() == (run / "model" / "model.json").read_bytes()
    for part in (
        str(out / form.file),
        " MiB",
        "on 16 images",
        "largest difference",
        "1e-04",
        form.load + form.call.rstrip(),
    ):
        assert part in said, part
    assert ("not for sharing" in said) == (name == "whole")

    monkeypatch.chdir(out)
    network = TrainedModel.load(run / "model", rebuild).network
    for count in (1, 3):
        scope = {"images": noise(count)}
        exec(form.load + form.call, scope)
        with torch.inference_mode():
            expected = network(torch.from_numpy(noise(count))).numpy()
        np.testing.assert_allclose(scope["logits"], expected, rtol=0, atol=rounding(layers=57))
    assert expected.std() > 0.01  # outputs that are all alike would be equal to anything


def test_a_whole_network_is_loaded_without_the_code_of_others(run, tmp_path):
    """A file with the network's own classes and one of somebody else, such as print, is refused before anything runs."""
    model = TrainedModel.load(run / "model", rebuild)
    model.network.head.extra = print
    WRITERS["whole"](model, tmp_path / "model_whole.pt")
    with pytest.raises(UserError, match="holds code") as error:
        load_whole(model.card, tmp_path / "model_whole.pt")
    assert "print" in error.value.why
    assert error.value.__cause__ is None, "torch's text advises to load everything"


def test_nothing_advises_to_load_code():
    root = Path(export.__file__).parents[1]
    texts = [*(root / "src").rglob("*.py"), *(root / "docs").glob("*.md"), root / "README.md"]
    assert not [file.name for file in texts if "weights_only=False" in file.read_text(encoding="utf-8")]


def test_channels_last_survives_torch_export(run, tmp_path):
    WRITERS["torch_export"](TrainedModel.load(run / "model", rebuild), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").state_dict
    weights = [tensor for tensor in loaded.values() if tensor.dim() == 4]
    assert len(weights) == 56
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in weights)


def test_a_changed_weight_is_noticed_and_the_file_is_not_kept(work, run, tmp_path, monkeypatch):
    def spoil(model: TrainedModel, path: Path) -> None:
        state = model.network.state_dict()
        state["head.bias"] = state["head.bias"] + torch.tensor([0.0, 0.001, 0.0])
        torch.save(state, path)

    (tmp_path / "model_state_dict.pt").write_text("of an earlier export")
    monkeypatch.setitem(WRITERS, "state_dict", spoil)
    with pytest.raises(UserError) as error:
        work(f"run={run}", "format=state_dict", f"out={tmp_path}")
    assert error.value.code == ExitCode.BUG
    assert "differ by" in error.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["model_state_dict.pt"]
    assert (tmp_path / "model_state_dict.pt").read_text() == "of an earlier export"


TOY = Format(  # one logit: the first byte of each image
    name="toy",
    file="toy.bin",
    about="",
    load="import numpy\n",
    call="logits = images[:, 0, 0, :1].astype(numpy.float32)\n",
    needs_project=False,
)


def toy_outputs(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0, :1].astype(np.float32)


def test_what_a_fresh_process_finds(tmp_path):
    images = noise(3)
    right = toy_outputs(images)
    assert verify(TOY, tmp_path, images, right) == 0.0

    def refused(form: Format, expected: np.ndarray = right) -> str:
        with pytest.raises(UserError) as error:
            verify(form, tmp_path, images, expected)
        assert error.value.code == ExitCode.BUG
        return error.value.why

    assert "No module named 'src.run'" in refused(replace(TOY, load="import numpy\nimport src.run\n"))
    assert "(4, 1) instead of (4, 2)" in refused(
        TOY, np.repeat(right, 2, axis=1)
    )  # three images, and one of them alone
    assert "differ by nan" in refused(replace(TOY, call="logits = images[:, 0, 0, :1] * numpy.float32('nan')\n"))
    assert "3 at a time" in refused(replace(TOY, call=f"assert len(images) == 3, '3 at a time'\n{TOY.call}"))
    assert "toy.bin" in refused(replace(TOY, load="import numpy\nopen('toy.bin')\n"))
    (tmp_path / "toy.bin").touch()
    assert verify(replace(TOY, load="import numpy\nopen('toy.bin')\n"), tmp_path, images, right) == 0.0


def test_the_fresh_process_has_this_project_where_the_format_needs_it(tmp_path, monkeypatch):
    """Also where it is not installed: the project is the checkout that exports."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").touch()
    (tmp_path / "src" / "here.py").touch()
    monkeypatch.setattr(verification, "PROJECT", tmp_path)
    form = replace(TOY, load="import numpy\nimport src.here\n", needs_project=True)
    assert verify(form, tmp_path / "src", noise(2), toy_outputs(noise(2))) == 0.0


@pytest.mark.parametrize(("largest", "allowed"), [(200.0, 200 * TOLERANCE), (0.01, TOLERANCE)])
def test_the_difference_is_relative_to_the_largest_output_or_to_one(tmp_path, largest, allowed):
    images = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    expected = np.array([[largest], [0.0]], dtype=np.float32)
    shifted = replace(TOY, call="logits = numpy.array([[{0}], [0.0]], dtype=numpy.float32)[:len(images)]\n")
    verify(replace(shifted, call=shifted.call.format(largest + 0.9 * allowed)), tmp_path, images, expected)
    with pytest.raises(UserError, match="does not give"):
        verify(replace(shifted, call=shifted.call.format(largest + 1.2 * allowed)), tmp_path, images, expected)


def test_a_format_that_does_not_exist_is_answered_without_torch(command):
    names = [f"{name}: " for name in FORMATS]
    done = command("export", "run=runs/x", "format=onx")
    check_error(done, 64, "format=onx is not a format", *names, "fix     python -m src.export run=runs/x format=onnx")

    words = [sys.executable, "-X", "importtime", "-m", "src.export", "run=x", "format=onx"]
    done = subprocess.run(words, capture_output=True, text=True, env=command_environment())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "src.engine.export.formats" in imported
    assert not imported & {"torch", "torchvision", "numpy", "onnx", "onnxruntime"}


@pytest.mark.parametrize(
    ("words", "found", "code"),
    [
        (["run=runs/x"], "format= is missing", ExitCode.CONFIG),
        (["format=onnx"], "run= is missing", ExitCode.CONFIG),
        (["run=runs/x", "format=onnx", "data.root=y"], "data.root is not a setting of src.export", ExitCode.CONFIG),
        (["run=runs/x", "fromat=onnx"], "did you mean format?", ExitCode.CONFIG),
        (["run=runs/x", "format=onnx"], "run=runs/x is not the folder of a run", ExitCode.NO_INPUT),
    ],
)
def test_words_that_are_wrong(work, words, found, code):
    with pytest.raises(UserError) as error:
        work(*words)
    assert (found in error.value.found, error.value.code) == (True, code)


def test_onnx_without_its_packages_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UserError, match="onnxscript, which is not installed") as error:
        choose_format("onnx")
    assert error.value.code == ExitCode.UNAVAILABLE
    assert error.value.fix[0] == 'pip install -e ".[onnx]"'
    assert choose_format("torch_export") is TORCH_EXPORT


def test_a_run_without_a_model_is_refused(work, run, tmp_path):
    shutil.copytree(run, tmp_path / "fruit", ignore=shutil.ignore_patterns("model", "export", "checkpoints"))
    with pytest.raises(UserError, match=r"model\.json is missing") as error:
        work(f"run={tmp_path / 'fruit'}", "format=state_dict")
    assert error.value.code == ExitCode.NO_INPUT
    assert not (tmp_path / "fruit" / "export").exists()


def test_the_images_are_held_out_ones_of_every_class(work, run, compared, monkeypatch):
    """Without out= the file goes to the run's own export/."""
    opened = []
    read = TrainedModel.read
    monkeypatch.setattr(TrainedModel, "read", lambda self, path: opened.append(path) or read(self, path))
    work(f"run={run}", "format=state_dict")
    assert (run / "export" / "model_state_dict.pt").is_file()
    assert compared[0].shape == (16, 3, 32, 32)
    with (run / "split.csv").open(newline="") as file:
        split = {row["path"]: row["split"] for row in csv.DictReader(file)}
    names = [f"{path.parent.name}/{path.name}" for path in opened]
    assert len(set(names)) == 16
    assert {split[name] for name in names} == {"test"}
    assert {path.parent.name for path in opened} == {"apple", "pear", "plum"}


def copy_of(run: Path, target: Path, **data) -> Path:
    """The run, with other data. settings in its config.yaml."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("export", "checkpoints"))
    config = yaml.safe_load((target / "config.yaml").read_text())
    config["data"] |= data
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    return target


def test_images_in_memory_and_a_run_without_a_test_split(work, run, compared, tmp_path):
    copy = copy_of(run, tmp_path / "drawn", source="synthetic", root=None, num_images=60, test_fraction=0.0)
    rows = "".join(f"synthetic/{number:05d},class0,{'val' if number > 56 else 'train'}\n" for number in range(60))
    (copy / "split.csv").write_text("path,label,split\n" + rows)
    work(f"run={copy}", "format=state_dict")
    assert compared[0].shape == (3, 3, 32, 32)
    assert len({image.tobytes() for image in compared[0]}) == 3


@pytest.mark.parametrize("moved", ["photos", "photos/plum"])
def test_images_that_were_moved(work, run, compared, tmp_path, moved):
    write_images(tmp_path / "photos", {"apple": 20, "pear": 20, "plum": 14})
    copy = copy_of(run, tmp_path / "fruit", root=str(tmp_path / "photos"))
    (tmp_path / moved).rename(tmp_path / "moved")
    with pytest.raises(UserError, match="the run's images cannot be read any more") as error:
        work(f"run={copy}", "format=state_dict")
    assert error.value.code == ExitCode.NO_INPUT
    assert error.value.fix[0].endswith("images=photos/")
    assert not (copy / "export").exists()

    work(f"run={copy}", "format=state_dict", f"images={tmp_path / 'moved'}")
    work(f"run={copy}", "format=state_dict", f"images={next((tmp_path / 'moved').rglob('000.png'))}")
    assert [len(images) for images in compared] == [14 if moved == "photos/plum" else 16, 1]


@pytest.mark.parametrize(
    ("images", "found", "code"),
    [
        ("nowhere", "does not exist", ExitCode.NO_INPUT),
        ("empty", "no image was found", ExitCode.NO_INPUT),
        ("damaged", r"x\.jpg: not an image", ExitCode.DATA),
    ],
)
def test_images_that_cannot_be_used(work, run, tmp_path, images, found, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "x.jpg").write_text("text")
    with pytest.raises(UserError, match=found) as error:
        work(f"run={run}", "format=state_dict", f"images={tmp_path / images}", f"out={tmp_path / 'out'}")
    assert error.value.code == code
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(work, run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made") as error:
        work(f"run={run}", "format=state_dict", f"out={tmp_path / 'file'}")
    assert error.value.code == ExitCode.CANNOT_WRITE
