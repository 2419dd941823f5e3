"""The report of a real run: its images, and python -m src.report, which makes it again."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import warm
from tests.conftest import WITH_PAGE, Done, check_error
from tests.engine.reports.test_report import Page
from tests.warm import command_environment

RUN = (
    *(word for word in WITH_PAGE if word != "baseline=none"),
    "report.explain=true",
    "data.image_size=64",
    "name=one",
    "trainer.max_epochs=1",
)


def go(folder: Path, name: str, *words: str) -> Done:
    done = warm.run(f"src.{name}", words, folder, command_environment(), 300)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run in runs/one."""
    folder = tmp_path_factory.mktemp("report")
    done = go(folder, "train", *RUN)
    assert done.code == 0, done.text
    return folder


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(folder / "runs/one", tmp_path / "runs/one"))


def test_the_page_begins_with_a_judgement_and_has_images(folder):
    page = Page(folder / "runs/one/report.html")
    assert "The run reaches a test accuracy of" in page.text
    assert "The baseline, a linear model" in page.text
    assert page.text.index("The run reaches") < page.text.index("Next:") < page.text.index("Result")
    assert {"Labels in doubt", "Data", "Classes", "Most confident mistakes", "Least certain", "Calibration"} <= {
        *page.headings
    }
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    sizes = {Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in sources}
    assert all(max(size) <= 144 for size in sizes)
    assert (64, 64) in sizes  # as the network sees them
    assert "Grad-CAM, a map of 2 x 2 places" in page.text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    header, *rows = csv.reader((folder / "runs/one/predictions.csv").open())
    assert header[:3] == ["path", "true", "predicted"]
    metrics = json.loads((folder / "runs/one/result.json").read_text())["metrics"]
    assert sum(row[1] == row[2] for row in rows) / len(rows) == pytest.approx(metrics["test/acc"])


def test_it_is_made_again_from_the_folder_to_the_byte(folder, run):
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    done = go(run.parents[1], "report", "run=runs/one")
    assert done.code == 0, done.text
    assert "look at   runs/one/report.html" in done.out
    assert (run / "report.html").read_bytes() == before
    assert go(run.parents[1], "report", "run=runs/one", "explain=false").code == 0
    assert "Grad-CAM" not in (run / "report.html").read_text()


def test_an_old_run_and_an_interrupted_one_have_a_page_of_what_is_there(run):
    for file in ("predictions.csv", "doubts.csv", "memory.csv", "confusion.csv"):
        (run / file).unlink()
    shutil.rmtree(run / "model")
    (run / "result.json").write_text(json.dumps({"state": "interrupted", "name": "one"}))
    done = go(run.parents[1], "report", "run=runs/one")
    assert done.code == 0, done.text
    assert "explain=true has no effect" in done.text
    page = Page(run / "report.html")
    assert page.headings == ["Data", "Learning curves", "Learning rates", "Settings"]
    assert "This run is not finished: interrupted" in page.text
    assert "img" in {tag for tag, _ in page.tags}


def test_images_that_have_moved_are_no_error_and_other_mistakes_are(run):
    config = run / "config.yaml"
    moved = re.sub(r"num_(images|classes): \d+", r"num_\1: null", config.read_text())
    config.write_text(moved.replace("source: synthetic", "source: image_folder").replace("root: null", "root: gone"))
    done = go(run.parents[1], "report", "run=runs/one")
    assert done.code == 0, done.text
    assert "The page has no images: data.root=gone does not exist" in done.text
    page = Page(run / "report.html")
    assert "This page has no images" in page.text
    assert "Labels in doubt" in page.headings
    check_error(go(run.parents[1], "report", "run=runs/two"), 66, "runs/two", "run=runs/one")
    check_error(go(run.parents[1], "report", "run=runs/one", "explain=maybe"), 64, "explain=maybe", "explain=true")
    check_error(go(run.parents[1], "report", "explain=true"), 64, "run=")


def test_grad_cam_finds_what_the_answer_is_made_of():
    from src.engine.reports.grad_cam import overlaid
    from src.engine.steps.network import Network

    class Brightness(Network):
        """The second output is the brightness, the first its negative."""

        def __init__(self, backbone):
            super().__init__()
            self.backbone, self.channels_last = backbone, False

        def forward(self, images):
            bright = self.backbone(images / 255)
            bright = bright.mean((2, 3)) if bright.ndim == 4 else bright.mean(1)
            return torch.cat([-bright, bright], 1)

    class Model:
        device, precision = torch.device("cpu"), "fp32"

        def __init__(self, backbone):
            self.network = Brightness(backbone)

    pool = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.ReLU(inplace=True))
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1, bias=False), pool)
    torch.nn.init.constant_(layer[0].weight, 1 / 3)
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, 40:56, 8:24] = 200
    shown, side = overlaid(Model(layer.requires_grad_(False)), image, [1], [1.0])
    red = shown[0, 0].float() - image[0, 0].float()
    assert side == 8
    assert red[44:52, 12:20].min() > 20 > 5 > red[:24].max()
    assert (overlaid(Model(layer), image, [0], [1.0])[0] == image).all()  # what is dark speaks for the first
    assert (overlaid(Model(layer), image, [0], [-1.0])[0] != image).any()
    tokens = torch.nn.Sequential(layer, torch.nn.Flatten(2), torch.nn.Linear(64, 64))
    assert overlaid(Model(tokens), image, [1], [1.0]) is None
