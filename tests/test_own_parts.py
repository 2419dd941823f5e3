"""Parts of the owner's own, those of docs/your_own.md, in every way of running: no file of the project is edited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, check_error, write_images
from tests.readme.test_readme import files_of

OWN = (
    *("model.backbone=src.my_nets.Tiny", "model.backbone_options.width=8"),
    *("model.head=src.my_heads.Cosine", "model.head_options.scale=20", "model.loss=src.my_heads.focal"),
    *("data=own", "data.source=src.my_data.by_prefix", "data.root=flat", "data.augment=src.my_training.gentle"),
    *("optimizer.name=src.my_optim.rmsprop", "optimizer.options.alpha=0.9"),
    *("optimizer.schedule=src.my_optim.halving", "logger.extra=[{_target_: src.my_loggers.JsonLines}]"),
    *("callbacks.extra=[{_target_: src.my_training.Say, text: my own words}]", "freeze.preset=full"),
    *(
        "model.module=src.my_module.Mixup",
        "model.module_options.alpha=0.3",
        "task=own",
        "task.name=src.my_tasks.Ordered",
    ),
    *("metrics=[src.my_metrics.Kappa,src.my_metrics.TopTwo]", "checkpoint.monitor=val/kappa"),
    *("data.batch_size=8", "trainer.max_epochs=2", "trainer.threads=1", "logger=csv"),
)
STRATEGY = ("strategy=own", "strategy.name=src.my_strategies.fewer_messages", "strategy.options.mebibytes=50")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project with the page's files, and files whose names begin with their class."""
    for part in ("src", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in files_of(ROOT / "docs/your_own.md").items():
        (tmp_path / path).write_text(text)
    write_images(tmp_path / "photos", {"cat": 12, "dog": 12})
    (tmp_path / "flat").mkdir()
    for path in (tmp_path / "photos").glob("*/*.png"):
        path.rename(tmp_path / "flat" / f"{path.parent.name}_{path.name}")
    return tmp_path


@pytest.mark.needs("export")
def test_all_own_parts_train_and_are_evaluated_predicted_and_exported(command, project):
    done = command("train", *OWN, "name=own")
    assert done.code == 0, done.text
    assert "my own words" in done.out
    assert len((project / "runs/own/metrics.jsonl").read_text().splitlines()) >= 2
    assert done.err == ""
    accuracy = json.loads((project / "runs/own/result.json").read_text())["metrics"]["test/acc"]
    assert "val/kappa," in (project / "runs/own/metrics.csv").read_text().splitlines()[0] + ","
    done = command("evaluate", "run=runs/own")
    assert done.code == 0, done.text
    assert f"{accuracy:.4f}" in done.text
    assert "top_two" in done.text
    assert "off_by" in done.text
    shutil.copytree(project / "runs/own", project / "copy")
    shutil.rmtree(project / "runs")
    done = command("predict", "model=copy/model", "images=flat", "out=p.csv")
    assert done.code == 0, done.text
    assert len((project / "p.csv").read_text().splitlines()) == 25
    done = command("export", "run=copy", "images=flat", "format=torch_export", "out=own.pt2")
    assert done.code == 0, done.text
    (project / "src/my_heads.py").unlink()
    done = command("predict", "model=copy/model", "images=flat", "out=p2.csv")
    check_error(done, 69, "src.my_heads.Cosine", "my_heads.py")


@pytest.mark.slow
def test_own_parts_go_with_several_processes_and_sweeps(command, project):
    done = command("train", *OWN, *STRATEGY, "trainer.devices=2", "trainer.accelerator=cpu", "name=ddp", cold=True)
    assert done.code == 0, done.text
    words = ("-m", "hydra/launcher=ray_tune", "seed=0,1", "name=sweep")
    done = command("train", *OWN, *words, cold=True)
    assert done.code == 0, done.text
    results = [json.loads(path.read_text()) for path in (project / "runs/sweep").glob("*/result.json")]
    assert [result["state"] for result in results] == ["finished"] * 2


def test_the_examples_are_short():
    lengths = {path: len(text.strip().splitlines()) for path, text in files_of(ROOT / "docs/your_own.md").items()}
    assert {path: length for path, length in lengths.items() if length > 25} == {}
    assert len(lengths) >= 12


def test_an_option_of_a_built_in_part_is_refused(command):
    check_error(
        command("train", "model.backbone_options.width=8"), 64, "model.backbone_options", "only a backbone of your own"
    )
    check_error(command("train", "model.head_options.scale=8"), 64, "linear takes no scale")
