"""The model card says what the run knows, and its two ways of loading the model work as they stand there."""

from __future__ import annotations

import csv
import re
import shlex
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from src import predict
from src.config import Config, Data, Model, Optimizer, Precision, Trainer
from src.engine.runs.model_folder import ModelCard, save_model
from src.engine.runs.model_readme import Origin, model_readme
from src.engine.weights.preprocessing import Preprocessing
from src.models.network import Architecture, build_network
from src.tasks.building import task_kind_of
from tests.conftest import write_images

ARCHITECTURE = Architecture("resnet18", "linear", 3)
CARD = ModelCard(
    architecture=ARCHITECTURE.to_dict(),
    preprocessing=Preprocessing(32, 0.875, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    classes=("apple", "pear", "plum"),
    task="multiclass",
    background=(1, 2, 3),
    max_megapixels=10.0,
    channels_last=True,
    precision="fp32",
    metrics={"val/loss": 0.5, "val/acc": 0.9, "test/loss": 0.25, "test/acc": 1.0},
)
CONFIG = Config(
    data=Data(source="table", table="/home/somebody/fruit.csv"),
    model=Model(backbone="resnet18"),
    optimizer=Optimizer(name="sgd", lr=0.003),
    precision=Precision(name="bf16"),
)


def readme(card: ModelCard = CARD, config: Config = CONFIG) -> str:
    images = {"train": 700, "val": 150, "test": 9}
    origin = Origin("fruit_2", images, "ImageNet, 120 of 122 tensors", "epoch 7", epochs=10, day=date(2026, 1, 31))
    return model_readme(card, task_kind_of(card, Path()), config, origin)


def test_it_says_what_the_run_knows():
    text = readme()
    for line in (
        r"# fruit\_2",
        "Source: table, fruit.csv.",
        "| train | 700 |",
        "| test | 9 |",
        "Classes: apple, pear, plum.",
        "| split | loss | acc |",
        "| val | 0.5000 | 0.9000 |",
        "| test | 0.2500 | 1.0000 |",
        "| backbone | resnet18 |",
        "| started from | ImageNet, 120 of 122 tensors |",
        "| epochs | 10 |",
        "| weights | those of epoch 7 (checkpoint.select=best, by val/acc) |",
        "| precision | bf16 |",
    ):
        assert line in text.splitlines(), line
    for part in (
        "trained on 2026-01-31",
        "resized to 37 pixels (bicubic",
        "32 x 32",
        "mean 0.1, 0.2, 0.3, by std 0.4, 0.5, 0.6",
        "colour (1, 2, 3)",
        "a logit per class",
    ):
        assert part in text, part
    assert "somebody" not in text


def test_nine_right_of_nine_is_not_a_hundred_percent():
    """Wilson's interval for 9 of 9, from the formula in Brown, Cai and DasGupta (2001): n / (n + z^2) to 1."""
    assert "accuracy of 1.000 was counted on 9 test images; over many more" in readme()
    assert f"between {9 / (9 + 1.96**2):.3f} and 1.000" in readme()


def test_the_limits_are_those_of_this_model():
    assert "pretrained weights bring" in readme()
    assert "pretrained weights" not in readme(config=replace(CONFIG, model=Model(backbone="resnet18", weights="none")))
    untested = readme(replace(CARD, metrics={"val/loss": 0.5, "val/acc": 0.9}))
    assert "150 val images (which also chose the weights" in untested
    assert "which also chose" not in readme()
    trial = readme(config=replace(CONFIG, trainer=Trainer(limit_batches=3)))
    assert "| epochs | 10 of 3 batches each: a trial, not a training |" in trial
    assert "its sigmoid is the probability of pear" in readme(replace(CARD, task="binary", classes=("apple", "pear")))


def test_many_classes_are_cut_and_odd_names_do_no_harm():
    text = readme(replace(CARD, classes=tuple(f"c{number}" for number in range(1000))))
    assert "c18, c19 and 980 more, which are in `model.json`." in text
    assert "c20" not in text
    assert r"Classes: a\|b, \*\`c\`\*, \<i\> d." in readme(replace(CARD, classes=("a|b", "*`c`*", "<i>\nd")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model/ and image.jpg, where the commands of the page are given."""
    torch.manual_seed(0)
    save_model(tmp_path / "model", build_network(ARCHITECTURE, CARD.preprocessing).state_dict(), CARD)
    (tmp_path / "model" / "README.md").write_text(readme(), encoding="utf-8")
    write_images(tmp_path, {"": 1})
    (tmp_path / "000.png").rename(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(folder: Path, language: str) -> str:
    text = (folder / "model" / "README.md").read_text(encoding="utf-8")
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def test_both_ways_of_loading_work_and_agree(folder, monkeypatch, capsys):
    exec(code_of(folder, "python"), {})
    label, share = capsys.readouterr().out.split()

    command = shlex.split(code_of(folder, "bash").replace("FOLDER_OR_FILE", "image.jpg"))
    assert command[:3] == ["python", "-m", "src.predict"]
    monkeypatch.setattr(sys, "argv", command[2:])
    predict.work()
    with (folder / "predictions.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["class"], f"{float(row['probability']):.3f}") == (label, share)
