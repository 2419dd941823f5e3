"""Loss, metrics, optimizer and schedule against references computed in another way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn

from src.config import Config, Optimizer
from src.engine.steps.metrics import SplitMetrics
from src.models.classifier import build_classifier
from src.models.freezing import FreezePlan
from src.models.losses import ClassificationLoss
from src.models.optimizers import build_optimizer, build_plateau, build_schedule, parameter_groups
from src.task import Task
from src.tasks.binary import Binary
from src.tasks.multiclass import Multiclass
from tests.engine.runs.small_training import classifier, fit, freezing, images, network
from tests.engine.runs.test_model_readme import CARD


def test_metrics_are_those_of_scikit_learn():
    torch.manual_seed(0)
    labels = torch.cat([torch.zeros(40), torch.ones(8), torch.full((3,), 2)]).long()
    predicted = torch.where(torch.rand(51) < 0.6, labels, torch.randint(0, 3, (51,)))
    metrics = SplitMetrics(Multiclass(), "abc")
    for part in torch.arange(51).split(20):
        metrics.update(torch.tensor(float(len(part))), F.one_hot(predicted[part], 3).float(), labels[part], len(part))
    values = metrics.compute()
    assert values["acc"] == pytest.approx((labels == predicted).float().mean().item())
    assert values["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert values["loss"] == pytest.approx((20 * 20 + 20 * 20 + 11 * 11) / 51)


def test_a_class_without_images_counts_in_no_mean():
    metrics = SplitMetrics(Multiclass(), "abcd")
    metrics.update(torch.tensor(1.0), torch.eye(4)[[0, 1, 1]], torch.tensor([0, 1, 1]), 3)
    assert metrics.compute()["balanced_acc"] == metrics.compute()["macro_f1"] == 1.0


def test_the_binary_loss_is_torchs_own():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 1), torch.randint(0, 2, (9,))
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    torch.testing.assert_close(ClassificationLoss()(logits, labels), expected)
    factors = torch.tensor([0.7, 2.0])[labels]
    each = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), factors, reduction="none")
    torch.testing.assert_close(ClassificationLoss([0.7, 2.0])(logits, labels), each.sum() / factors.sum())
    both = torch.cat([torch.zeros(9, 1), logits], 1)
    torch.testing.assert_close(Binary().probabilities(logits), both.softmax(1))
    assert Binary().predicted(logits).tolist() == both.argmax(1).tolist()


def test_label_smoothing_is_for_training_only():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    weights = torch.tensor([1.0, 2.0, 3.0])
    loss = ClassificationLoss(weights.tolist(), label_smoothing=0.1)
    smoothed = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    expected = (smoothed * weights[labels]).sum() / weights[labels].sum()
    torch.testing.assert_close(loss.train()(logits, labels), expected)
    torch.testing.assert_close(loss.eval()(logits, labels), F.cross_entropy(logits, labels, weights))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def test_every_parameter_is_in_one_group_from_the_start_frozen_or_not():
    network = Network()
    network.backbone.requires_grad_(False)
    config = Optimizer(name="adamw", lr=0.01, backbone_lr_scale=0.1, weight_decay=0.05)
    groups = build_optimizer(network, config).param_groups
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "backbone": (0.001, 0.05, 1),
        "backbone/no_decay": (0.001, 0.0, 3),
        "head": (0.01, 0.05, 1),
        "head/no_decay": (0.01, 0.0, 1),
    }


def test_a_backbone_without_batchnorm_learns_with_smaller_steps():
    def rate(backbone: nn.Module, **settings: float) -> float:
        network = Network()
        network.backbone = backbone
        groups = parameter_groups(network, Optimizer(name="adamw", lr=0.01, **settings))
        return next(group["lr"] for group in groups if group["name"] == "backbone")

    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert rate(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))) == pytest.approx(0.003)
    assert rate(plain) == pytest.approx(0.0003)
    assert rate(plain, backbone_lr_scale=1.0) == 0.01


def test_with_lr_decay_every_block_has_groups_of_its_own():
    network = Network()
    network.backbone.token = nn.Parameter(torch.zeros(1, 1, 4))  # bare, such as a ViT's class_token: not decayed
    config = Optimizer(name="adamw", lr=0.01, backbone_lr_scale=0.1, weight_decay=0.05)
    groups = parameter_groups(network, config, lr_decay=0.5)
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "backbone.token/no_decay": (0.00025, 0.0, 1),
        "backbone.0": (0.0005, 0.05, 1),
        "backbone.0/no_decay": (0.0005, 0.0, 1),
        "backbone.1/no_decay": (0.001, 0.0, 2),
        "head": (0.01, 0.05, 1),
        "head/no_decay": (0.01, 0.0, 1),
    }
    alike = parameter_groups(network, config, lr_decay=1.0)
    assert {group["lr"] for group in alike} == {0.001, 0.01}


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("vit_b_16", {"class_token", "encoder.pos_embedding"}),
        ("swin_t", {"features.1.0.attn.relative_position_bias_table"}),
        ("swin_v2_t", {"features.1.0.attn.logit_scale", "features.1.0.attn.cpb_mlp.0.weight"}),
        ("convnext_tiny", {"features.1.0.layer_scale"}),
        ("timm/vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("timm/levit_128s", {"stages.0.blocks.0.attn.attention_biases"}),
        ("timm/twins_svt_small", {"pos_block.0.proj.0.weight"}),  # which only timm's no_weight_decay() names
    ],
)
def test_tokens_and_positions_are_not_decayed(name, free):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        if name.startswith("timm/"):
            backbone = pytest.importorskip("timm").create_model(name.removeprefix("timm/"), num_classes=0)
        else:
            backbone = torchvision.models.get_model(name, weights=None)
        network = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(4, 2)})
    groups = parameter_groups(network, Optimizer(name="adamw", lr=0.01, weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in backbone.named_parameters()}
    assert {key: found[key] for key in free} == dict.fromkeys(free, 0.0)
    layers = {f"{key}.weight" for key, layer in backbone.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    kept = {key for key in layers - free if "cpb_mlp" not in key and "pos_block" not in key}
    assert {found[key] for key in kept} == {0.05}, "a layer's weights are not decayed"


def test_a_run_that_began_with_other_groups_goes_on_with_them():
    """Before tokens were left out of weight decay, the optimizer had one parameter less in backbone/no_decay."""
    began, goes_on, new = classifier(1), classifier(1), classifier(1)
    for model in (began, goes_on, new):
        model.network.backbone.token = nn.Parameter(torch.zeros(1, 1, 8))
    old = torch.optim.AdamW(parameter_groups(began.network, began.optimizer_config, by_shape=True))
    for parameter in began.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    goes_on.saved_group_sizes = [len(group["params"]) for group in old.param_groups]
    (optimizer,), _ = goes_on.configure_optimizers()
    optimizer.load_state_dict(old.state_dict())
    assert optimizer.state[goes_on.network.backbone.token]["step"] == 1
    (optimizer,), _ = new.configure_optimizers()
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(old.state_dict())


def test_blocks_whose_names_begin_alike_are_kept_apart():
    network = nn.Module()
    network.backbone, network.head = nn.Module(), nn.Linear(2, 2)
    network.backbone.layer1, network.backbone.layer10 = nn.Linear(2, 2, bias=False), nn.Linear(3, 3, bias=False)
    groups = parameter_groups(network, Optimizer(name="adamw", lr=0.01), lr_decay=0.5)
    found = {group["name"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found["backbone.layer1"] == [(2, 2)]
    assert found["backbone.layer10"] == [(3, 3)]


@pytest.mark.parametrize(
    ("lr_decay", "rates"),
    [
        (None, {"head": 0.01, "backbone": 0.003}),
        (0.5, {"head": 0.01, "backbone.stem": 0.00075, "backbone.layer2": 0.003}),
    ],
)
def test_the_learning_rates_of_both_ends_are_logged(lr_decay, rates):
    model = classifier(1, lr_decay=lr_decay, schedule="constant", warmup_fraction=0.0)
    logged = fit(model, 1, freezing(1, preset="full")).callback_metrics
    found = {name: float(value) for name, value in logged.items() if name.startswith("lr/")}
    assert found == pytest.approx({f"lr/{name}": lr for name, lr in rates.items()})


def test_the_config_decides_on_lr_decay_and_on_what_the_plateau_waits_for():
    config = Config(optimizer=Optimizer(name="adamw", lr=0.01, schedule="plateau"))
    config.freeze.lr_decay, config.checkpoint.monitor = 0.5, "val/loss"
    task = Task(images(), Multiclass(), CARD, network(), FreezePlan({}, 1), "")
    model = build_classifier(config, task, total_steps=10, hparams={})
    (optimizer,), (_, plateau) = model.configure_optimizers()
    assert "backbone.layer1" in {group["name"] for group in optimizer.param_groups}
    assert (model.training_settings.monitor, plateau.mode) == ("val/loss", "min")


@pytest.mark.parametrize("name", ["cosine", "onecycle", "constant", "plateau"])
def test_schedules(name):
    config = Optimizer(name="adamw", lr=1.0, backbone_lr_scale=0.1, schedule=name, warmup_fraction=0.2)
    optimizer = build_optimizer(Network(), config)
    schedule = build_schedule(optimizer, config, total_steps=50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[-1]["lr"])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * rates[-1])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[0] > 0
    assert rates[-1] == pytest.approx({"cosine": 0.0, "onecycle": 0.0}.get(name, 1.0), abs=0.01)
    if name == "cosine":
        assert rates[30] == pytest.approx((1 + math.cos(math.pi * 20 / 40)) / 2)


@pytest.mark.parametrize(("metric", "better"), [("val/acc", 1), ("val/loss", -1)])
def test_the_plateau_lowers_every_rate_after_three_epochs_that_are_not_better(metric, better):
    config = Optimizer(
        name="adamw", lr=1e-3, backbone_lr_scale=1e-6
    )  # rates as small as those of the first of many blocks
    optimizer = build_optimizer(Network(), config)
    plateau = build_plateau(optimizer, metric)
    factors = []
    for value in (1, 2, 3, 3, 3, 4, 2, 3, 4, 4, 3, 3):  # three epochs after the 4, and three more
        plateau.step(10 + better * value)
        factors.append(optimizer.param_groups[-1]["lr"] / 1e-3)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(factors[-1] * 1e-9)
    assert factors == pytest.approx([1.0] * 8 + [0.3] * 3 + [0.09])


def test_the_plateau_and_its_warm_up_multiply():
    config = Optimizer(name="adamw", lr=1.0, schedule="plateau", warmup_fraction=0.5)
    optimizer = build_optimizer(Network(), config)
    warm_up, plateau = build_schedule(optimizer, config, total_steps=8), build_plateau(optimizer, "val/acc")
    rates = []
    for step in range(8):
        rates.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        warm_up.step()
        if step in (0, 1, 2, 3):
            plateau.step(0.5)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.3, 0.3, 0.3, 0.3])


@pytest.mark.parametrize(("monitor", "lr"), [("val/acc", 0.01 * 0.3**2), ("val/macro_f1", 0.01), ("val/loss", 0.01)])
def test_the_plateau_waits_for_the_monitored_metric(monitor, lr, monkeypatch):
    """Seven epochs: the loss falls, the accuracy stays."""
    model = classifier(7, schedule="plateau", monitor=monitor, warmup_fraction=0.0)
    numbers = iter(range(100))
    monkeypatch.setattr(
        model.val_metrics, "compute", lambda: {"loss": 9 - (n := next(numbers)), "acc": 0.5, "macro_f1": n}
    )
    trainer = fit(model, 7, freezing(7, preset="gradual", last_n=2))
    assert trainer.optimizers[0].param_groups[-1]["lr"] == pytest.approx(lr)
