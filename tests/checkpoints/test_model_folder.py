"""The model folder is whole or refused, and holds no code; checkpoints are written beside themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.checkpoints.model_folder import ModelCard, load_model, save_model
from src.checkpoints.writing import DurableCheckpointIO, read_checkpoint
from src.errors import UserError
from src.preprocessing import Preprocessing
from tests.conftest import command_environment

CARD = ModelCard(
    architecture={"backbone": "resnet18", "head": "linear", "outputs": 2, "hidden": 512, "dropout": 0.0},
    preprocessing=Preprocessing(32, 0.875, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    classes=("b", "a"),
    task="multiclass",
    background=(1, 2, 3),
    max_megapixels=10.0,
    channels_last=True,
    precision="fp32",
    metrics={"val/acc": 0.5},
)


@pytest.fixture
def folder(tmp_path):
    weights = {"x": torch.arange(6.0).reshape(2, 3).t(), "n": torch.tensor(3)}
    save_model(tmp_path / "model", weights, CARD)
    return tmp_path / "model"


def test_what_was_saved_is_loaded(folder):
    card, state = load_model(folder)
    assert card == CARD
    assert state["x"].equal(torch.arange(6.0).reshape(2, 3).t())
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.safetensors"}
    assert {"torch", "torchvision", "python"} <= json.loads((folder / "model.json").read_text())["versions"].keys()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "model.json").unlink(), "model.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.json").write_text("{"), "JSONDecodeError"),
        (lambda folder: (folder / "model.json").write_text("{}"), "KeyError"),
        (lambda folder: flip_last_bit(folder / "model.safetensors"), "SHA-256"),
    ],
)
def test_a_damaged_folder_is_refused(folder, spoil, named):
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert named in error.value.found + error.value.why


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": Payload()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_kill_in_the_middle_of_writing_leaves_the_old_checkpoint(tmp_path):
    """Killed while it writes, with the temp folder on another file system where there is one: the old file is whole."""
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    code = (
        "import os, signal, torch\n"
        "from src.checkpoints.writing import DurableCheckpointIO\n"
        "class Kill:\n"
        "    def __reduce__(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"DurableCheckpointIO().save_checkpoint({{'w': torch.zeros(10**6), 'kill': Kill()}}, {str(path)!r})\n"
    )
    environment = command_environment() | {"TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert list(tmp_path.glob("*.tmp")), "it was not killed while it wrote"
    assert read_checkpoint(path) == {"step": 1}


def test_a_failed_write_leaves_the_old_checkpoint_and_no_leftovers(tmp_path):
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local object"):
        DurableCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
