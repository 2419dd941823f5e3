"""What the loggers beside metrics.csv get of a run: the config, the result, the baseline, the plots."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import yaml
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from PIL import Image

from src.engine.runs import loggers
from src.engine.runs.loggers import build_loggers, log_result
from tests.conftest import WITH_PAGE
from tests.running import result

WORDS = [word for word in WITH_PAGE if not word.startswith(("logger=", "baseline="))]
RESULT = {
    "metrics": {"test/acc": 0.5, "test/loss": float("nan")},
    "baseline": {"metrics": {"test/acc": 0.25}},
    "steps": 7,
}
FINAL = {"final/test/acc": 0.5, "baseline/test/acc": 0.25}


@pytest.mark.needs("reports")
def test_tensorboard_has_the_config_the_result_the_baseline_and_the_plots(command):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert command("train", *WORDS, "optimizer.lr=0.002", "name=tb").code == 0
    events = EventAccumulator("runs/tb/tensorboard")
    events.Reload()
    tags, stored = events.Tags(), result(Path("runs/tb"))
    for split in ("val", "test"):
        for kind, metrics in (("final", stored["metrics"]), ("baseline", stored["baseline"]["metrics"])):
            (logged,) = events.Scalars(f"{kind}/{split}/acc")
            assert logged.value == pytest.approx(metrics[f"{split}/acc"])
    assert {"report/confusion matrix", "report/accuracy of train and val over the epochs"} <= {*tags["images"]}
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    parsed = HParamsPluginData.FromString(content).session_start_info.hparams
    assert parsed["optimizer/lr"].number_value == 0.002
    with Path("runs/tb/metrics.csv").open() as file:
        assert not [name for name in next(csv.reader(file)) if name.startswith(("final", "baseline"))]
    hparams = yaml.safe_load(Path("runs/tb/tensorboard/hparams.yaml").read_text())
    assert hparams == yaml.safe_load(Path("runs/tb/config.yaml").read_text())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "confusion.csv").write_text("true,a,'=b\na,1,0\n'=b,0,2\n")
    (tmp_path / "report.html").write_text("<html>")
    return SimpleNamespace(path=tmp_path, config={"seed": 1})


def plot() -> bytes:
    import io

    Image.new("RGB", (3, 2)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_wandb_gets_them_and_ends_its_run(folder):
    logger = create_autospec(WandbLogger, instance=True)
    log_result([logger], folder, RESULT, {"curve": plot})
    logger.log_hyperparams.assert_called_once_with({"seed": 1})
    logger.log_metrics.assert_called_once_with(FINAL, 7)
    assert logger.log_image.call_args.args[0] == "report/curve"
    logger.log_table.assert_called_once_with("confusion", ["true", "a", "=b"], [["a", "1", "0"], ["=b", "0", "2"]])
    logger.experiment.finish.assert_called_once_with()


def test_mlflow_gets_them_and_one_that_fails_is_a_warning(folder, caplog):
    broken, logger = (create_autospec(MLFlowLogger, instance=True) for _ in range(2))
    broken.log_metrics.side_effect = ConnectionError("the server is away")
    with caplog.at_level(logging.WARNING):
        log_result([broken, logger], folder, RESULT, {"curve": plot})
    assert "the server is away" in caplog.text
    logger.log_metrics.assert_called_once_with(FINAL, 7)
    sent = [Path(call.args[1]).name for call in logger.experiment.log_artifact.call_args_list]
    assert sent == ["confusion.csv", "report.html"]
    assert logger.experiment.log_image.call_args.args[2] == "report/curve.png"


@pytest.fixture
def made(monkeypatch):
    """The arguments of each logger that is made, of doubles in the place of both libraries; MLflow's next run is new-1."""
    arguments: list[dict] = []
    runs: dict[str, SimpleNamespace] = {}

    def init(self, experiment_name, run_name=None, tracking_uri=None, run_id=None):
        arguments.append({"uri": tracking_uri, "run_id": run_id})
        self.given = run_id

    def run_id(self):
        self.given = self.given or f"new-{len(runs) + 1}"
        runs.setdefault(self.given, SimpleNamespace(data=SimpleNamespace(params={})))
        return self.given

    class Client:
        @staticmethod
        def get_run(run):
            return runs[run]

        @staticmethod
        def update_run(run, status):
            runs[run].status = status

    monkeypatch.setattr(loggers, "check_loggers", lambda config: None)
    monkeypatch.setattr(MLFlowLogger, "__init__", init)
    monkeypatch.setattr(MLFlowLogger, "run_id", property(run_id))
    monkeypatch.setattr(MLFlowLogger, "experiment", Client)
    monkeypatch.setattr(
        MLFlowLogger, "log_hyperparams", lambda self, params: runs[self.run_id].data.params.update(params)
    )
    monkeypatch.setattr(WandbLogger, "__init__", lambda self, *args, **words: arguments.append(words))
    return SimpleNamespace(arguments=arguments, runs=runs)


def built(folder: Path, **config):
    chosen = {"tensorboard": False, "wandb": False, "mlflow": False, "extra": [], "offline": False, "project": "fruit"}
    return build_loggers(SimpleNamespace(**chosen | {"tracking_uri": None} | config), folder)


def test_a_continued_run_goes_on_in_the_same_run_of_wandb(tmp_path, made):
    for project in ("fruit", "fruit", "other", "other"):
        built(tmp_path, wandb=True, project=project)
    assert all(words["resume"] == "allow" for words in made.arguments)
    one, again, other, last = (words["id"] for words in made.arguments)
    assert one == again != other == last, "a run of another project is another one"
    (tmp_path / "tracking.json").write_text('{"wandb": {"id": "../x", "where": "fruit"}}')
    built(tmp_path, wandb=True)
    assert made.arguments[-1]["id"] not in (one, other, "../x")


def test_a_continued_run_goes_on_in_the_same_run_of_mlflow_with_its_first_settings(tmp_path, made, caplog):
    (first,) = built(tmp_path, mlflow=True)
    first.log_hyperparams({"seed": 1, "devices": 1})
    (again,) = built(tmp_path, mlflow=True)
    again.log_hyperparams({"seed": 1, "devices": 2})
    assert [words["run_id"] for words in made.arguments] == [None, "new-1"]
    assert vars(made.runs["new-1"])["status"] == "RUNNING"
    assert made.runs["new-1"].data.params == {"seed": 1, "devices": 1}, "which MLflow refuses to change"
    (elsewhere,) = built(tmp_path, mlflow=True, tracking_uri="http://other")
    assert elsewhere.run_id == "new-2"
    made.runs.pop("new-2")
    with caplog.at_level(logging.WARNING):
        built(tmp_path, mlflow=True, tracking_uri="http://other")
    assert "new-2 of MLflow cannot be continued" in caplog.text
    assert made.arguments[-1]["run_id"] is None


@pytest.mark.slow
def test_a_real_mlflow_keeps_them(command):
    tracking = pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
    assert command("train", *WORDS, "logger=mlflow", "name=ml").code == 0
    client = tracking.MlflowClient(f"sqlite:///{Path('runs').absolute()}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.data.metrics["final/test/acc"] == pytest.approx(result(Path("runs/ml"))["metrics"]["test/acc"])
    assert run.data.params["trainer/max_epochs"] == "2"
    assert "report.html" in {file.path for file in client.list_artifacts(run.info.run_id)}


@pytest.mark.slow
def test_a_real_wandb_keeps_them_offline(command):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    assert command("train", *WORDS, "logger=wandb", "logger.offline=true", "name=wb").code == 0
    (file,) = Path("runs/wb").rglob("*.wandb")
    content = file.read_bytes()
    for name in (b"final/test/acc", b"baseline/test/acc", b"max_epochs"):
        assert name in content
