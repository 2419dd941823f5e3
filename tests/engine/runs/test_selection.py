"""checkpoint.select: the best epoch, the last step, or an average of weights that is taken only if it is better."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from src.config import Checkpoint, Config
from src.engine.processes.ranks import Ranks
from src.engine.runs import selection
from src.engine.runs.checkpoint_selection import BestCheckpoint, Score, WeightAverage
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.runs.selection import choose_weights, recompute_batchnorm
from src.engine.runs.writing import DurableCheckpointIO
from src.task import Task
from src.tasks.multiclass import Multiclass
from tests.engine.runs.small_training import SQUARE, classifier, data, fit, freezing, images, plan
from tests.engine.runs.test_model_folder import CARD

CPU = torch.device("cpu")


def trained(folder, epochs=5, top_k=3):
    best, mean = BestCheckpoint(folder, "val/loss", top_k), WeightAverage(0.9)
    model = classifier()
    trainer = fit(model, epochs, freezing(epochs, preset="full"), best, mean, plugins=[DurableCheckpointIO()])
    return trainer, model, best, mean


def choose(trainer, folder, select, monkeypatch=None, values=None):
    """choose_weights with the measure on val replaced by the values given, average first, where there are any."""
    config = Config()
    config.checkpoint = Checkpoint(select=select, monitor="val/loss")
    config.precision = SimpleNamespace(name="fp32")
    if values:
        answers = iter([({"loss": value, "acc": 0.0}, None) for value in values])
        monkeypatch.setattr(selection, "measure_split", lambda *_: next(answers))
    job = Job(config, SimpleNamespace(checkpoints=folder), Ranks(), (CPU,))
    task = Task(
        images(),
        Multiclass(),
        replace(CARD, preprocessing=SQUARE, classes=("a", "b", "c")),
        trainer.lightning_module.network,
        plan(5, preset="full"),
        origin="",
    )
    return choose_weights(job, task, trainer)


def file_weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_best_and_last(tmp_path):
    trainer, model, best, _ = trained(tmp_path)
    last = {key: value.clone() for key, value in model.network.state_dict().items()}
    number = best.kept[0].epoch + 1
    assert choose(trainer, tmp_path, "last") == (number, "the last step")
    assert equal(model.network.state_dict(), last)
    assert choose(trainer, tmp_path, "best") == (number, f"epoch {number}")
    assert equal(model.network.state_dict(), file_weights(tmp_path / "best.ckpt"))


def test_the_average_of_the_best_epochs(tmp_path, monkeypatch):
    trainer, model, best, _ = trained(tmp_path)
    kept = [file_weights(tmp_path / f"epoch-{score.epoch + 1:04d}.ckpt") for score in best.kept]
    assert len(kept) == 3
    epochs = ", ".join(str(number) for number in sorted(score.epoch + 1 for score in best.kept))
    number, name = choose(trainer, tmp_path, "average_top_k", monkeypatch, [0.1, 0.2])
    assert (number, name) == (best.kept[0].epoch + 1, f"the average of epochs {epochs}")
    for key, tensor in model.network.state_dict().items():
        mean = sum(state[key].double() for state in kept) / 3
        if tensor.is_floating_point() and "running" not in key:
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_the_moving_average(tmp_path, monkeypatch):
    trainer, model, _, mean = trained(tmp_path)
    assert choose(trainer, tmp_path, "ema", monkeypatch, [0.1, 0.2])[1] == "the moving average"
    state, own = model.network.state_dict(), mean.weights()
    assert all(state[key].equal(own[key]) for key in state if "running" not in key and "batches" not in key)
    assert not equal(state, file_weights(tmp_path / "best.ckpt"))


def test_the_moving_average_follows_quickly_at_first():
    """min(decay, (1 + t) / (10 + t)), as in timm: the first weights are nearly gone after a few steps."""
    mean, module = WeightAverage(0.25), SimpleNamespace(network=torch.nn.Linear(1, 1), device=CPU)
    mean.setup(None, module, "fit")
    expected = None
    for step, value in enumerate([1.0, 2.0, 4.0, 8.0]):
        torch.nn.init.constant_(module.network.weight, value)
        mean.on_train_batch_end(None, module)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert mean.weights()["weight"].item() == pytest.approx(expected)


def test_a_greedy_soup_takes_an_epoch_only_where_it_does_no_harm(tmp_path, monkeypatch):
    """val/loss of the best epoch, with the second, with the third instead; then of the soup, and of the best epoch."""
    trainer, model, best, _ = trained(tmp_path)
    first, _, third = (score.epoch + 1 for score in best.kept)
    number, name = choose(trainer, tmp_path, "greedy_soup", monkeypatch, [0.5, 0.6, 0.4, 0.4, 0.5])
    epochs = ", ".join(map(str, sorted((first, third))))
    assert (number, name) == (first, f"the average of epochs {epochs}")
    kept = [file_weights(tmp_path / f"epoch-{epoch:04d}.ckpt")["head.weight"] for epoch in (first, third)]
    torch.testing.assert_close(model.network.state_dict()["head.weight"], sum(kept) / 2)


def test_a_soup_of_the_best_epoch_alone_is_that_epoch(tmp_path, monkeypatch):
    trainer, model, best, _ = trained(tmp_path)
    number = best.kept[0].epoch + 1
    assert choose(trainer, tmp_path, "greedy_soup", monkeypatch, [0.5, 0.6, 0.6]) == (number, f"epoch {number}")
    assert equal(model.network.state_dict(), file_weights(tmp_path / "best.ckpt"))


@pytest.mark.parametrize("select", ["average_top_k", "ema"])
def test_an_average_that_is_not_better_is_not_taken(tmp_path, monkeypatch, select):
    trainer, model, best, _ = trained(tmp_path)
    number = best.kept[0].epoch + 1
    assert choose(trainer, tmp_path, select, monkeypatch, [0.2, 0.2]) == (number, f"epoch {number}")
    assert equal(model.network.state_dict(), file_weights(tmp_path / "best.ckpt"))


def test_what_is_compared_is_measured_on_val(tmp_path):
    """No replaced measure: the one that is taken has the lower loss of the two."""
    trainer, model, _, _ = trained(tmp_path)
    losses = {}
    for select in ("best", "average_top_k"):
        choose(trainer, tmp_path, select)
        batches = list(data().val_dataloader())
        model.network.eval()
        with torch.no_grad():
            losses[select] = sum(float(model.loss.eval()(model.network(x), y)) * len(y) for x, y in batches)
    assert losses["average_top_k"] <= losses["best"]


def test_batchnorm_statistics_are_those_of_the_images():
    """Of the layers that learn; a frozen one keeps its own. The reference: one batch of everything, by hand."""
    network = classifier().network
    network.eval()
    network.backbone.layer1[1].train()
    images = torch.cat([images for images, _ in data().statistics_loader()])
    frozen = {key: value.clone() for key, value in network.state_dict().items()}
    recompute_batchnorm(network, [(images, None)], CPU, "fp32")
    with torch.no_grad():
        before = network.backbone.layer1[0](network.backbone.stem(network.normalise(images)))
    layer = network.backbone.layer1[1]
    torch.testing.assert_close(layer.running_mean, before.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, before.var((0, 2, 3)))
    assert layer.momentum == 0.1
    assert not any(module.training for module in network.modules())
    assert all(value.equal(frozen[key]) for key, value in network.state_dict().items() if "layer1.1" not in key)


def test_damaged_epochs_are_said_and_the_next_best_is_taken(tmp_path, caplog):
    trainer, model, best, _ = trained(tmp_path)
    first, second = (tmp_path / f"epoch-{score.epoch + 1:04d}.ckpt" for score in best.kept[:2])
    for path in (tmp_path / "best.ckpt", first):
        path.write_bytes(path.read_bytes()[:-1])
    number = best.kept[1].epoch + 1
    assert choose(trainer, tmp_path, "best") == (number, f"epoch {number}")
    assert f"The best epoch, {best.kept[0].epoch + 1}, is lost" in caplog.text
    assert equal(model.network.state_dict(), file_weights(second))
    choose(trainer, tmp_path, "average_top_k")
    assert "1 of 3 epochs to average cannot be read" in caplog.text
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"")
    last = {key: value.clone() for key, value in model.network.state_dict().items()}
    caplog.clear()
    assert choose(trainer, tmp_path, "best") == (5, "the last step")  # what is there is measured
    assert "are lost" in caplog.text
    assert "those of the last step take their place" in caplog.text
    assert equal(model.network.state_dict(), last)
    best.kept.clear()
    choose(trainer, tmp_path, "best")
    assert "No epoch had a finite val/" in caplog.text


def test_best_weights_that_the_disk_did_not_take_end_with_73_and_the_same_command_goes_on(tmp_path):
    """A real limit on the size of a file, in whose way nothing else is."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    multiprocessing.RawArray("q", 10_000)  # freed at once: the loaders' arrays lie in its file, and need no new one
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        trainer, *_ = trained(tmp_path, top_k=1)
        with pytest.raises(UserError) as caught:
            choose(trainer, tmp_path, "best")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert "best.ckpt" in caught.value.found
    assert "make room, then repeat" in caught.value.fix[1]


@pytest.mark.parametrize(("monitor", "shown"), [("val/r2", "val/r2 -0.2500"), ("val/mae", "val/mae 0.2500")])
def test_a_negative_metric_is_shown_with_its_sign(monitor, shown):
    job = SimpleNamespace(config=SimpleNamespace(checkpoint=Checkpoint(monitor=monitor)))
    assert selection._shown(job, Score(-0.25, 1.0, 0)) == f"{shown}, val/loss 1.0000"
