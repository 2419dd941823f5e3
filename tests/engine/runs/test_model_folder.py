"""The model folder is whole or refused."""

from __future__ import annotations

import json

import pytest
import torch

from src.engine.runs.errors import UserError
from src.engine.runs.model_folder import ModelCard, load_model, save_model
from src.engine.weights.preprocessing import Preprocessing

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


def test_a_layer_under_two_names_is_saved_under_both(tmp_path):
    weight = torch.arange(3.0)
    save_model(tmp_path, {"a": weight, "b": weight, "c": weight[1:]}, CARD)
    state = load_model(tmp_path)[1]
    assert state["a"].equal(weight)
    assert state["b"].equal(weight)
    assert state["c"].equal(weight[1:])


def test_what_was_saved_is_loaded(folder):
    card, state = load_model(folder)
    assert card == CARD
    assert state["x"].equal(torch.arange(6.0).reshape(2, 3).t())
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.safetensors"}
    assert {"torch", "torchvision", "python"} <= json.loads((folder / "model.json").read_text())["versions"].keys()


def test_the_folder_of_an_older_run_reads_images_as_that_run_did(folder):
    values = json.loads((folder / "model.json").read_text())
    del values["bits"], values["checksum"]
    (folder / "model.json").write_text(json.dumps(values))
    assert load_model(folder)[0] == CARD
    assert load_model(folder)[0].read_options.bits == 16


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
