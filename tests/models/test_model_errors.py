"""Weights and heads that do not fit: the real command says what is wrong, by name."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torchvision

from tests import conftest
from tests.conftest import ROOT, check_error

SMALL = (*conftest.SMALL, "model.backbone=resnet18")
RESNET = (*SMALL, "model.weights=default")


def test_weights_that_cannot_be_used(command, tmp_path):
    other = torchvision.models.mobilenet_v3_small().state_dict()
    torch.save(other, tmp_path / "other.pth")
    check_error(
        command("train", *SMALL, "model.weights=other.pth"), 65, "other.pth does not fit resnet18", "conv1.weight"
    )
    check_error(command("train", *SMALL, "model.weights=nowhere.pth"), 66, "nowhere.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    check_error(command("train", *SMALL, "model.weights=cut.pth"), 65, "cut.pth")


def test_weights_that_hold_code_are_not_run(command, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"conv1.weight": Payload()}, tmp_path / "evil.pth")
    check_error(command("train", *SMALL, "model.weights=evil.pth"), 65, "holds code", "refused")
    assert not (tmp_path / "ran").exists()


def test_a_cached_file_with_another_hash_is_refused(command, tmp_path):
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), cache / "resnet18-f37072fd.pth")
    done = command("train", *RESNET, TORCH_HOME=str(tmp_path / "torch"))
    check_error(done, 65, "resnet18-f37072fd.pth is not the published one", "f37072fd")


def test_without_a_network_it_says_what_to_do(command, tmp_path):
    done = command("train", *RESNET, TORCH_HOME=str(tmp_path / "torch"), https_proxy="http://127.0.0.1:9")
    check_error(done, 69, "cannot download resnet18-f37072fd.pth", "efficientnet_lite0", "model.weights=none")


def test_a_run_can_start_from_the_model_of_another(command, tmp_path):
    assert command("train", *SMALL, "name=first").code == 0
    done = command("train", *SMALL, "name=second", "model.weights=runs/first/model", "seed=1")
    assert done.code == 0, done.text
    assert "model.safetensors, key backbone: 100 of 100 tensors matched" in done.out


def test_a_head_that_was_changed_and_does_not_fit_is_explained(command, tmp_path):
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / "mine" / folder)
    heads = tmp_path / "mine" / "src" / "models" / "heads.py"
    changed = heads.read_text().replace("layer = nn.Linear(in_features, outputs)", "layer = nn.Linear(1234, outputs)")
    assert "1234" in changed
    heads.write_text(changed)
    (tmp_path / "src").symlink_to(tmp_path / "mine" / "src")  # the current folder comes first for python -m
    done = command("train", *SMALL)
    check_error(done, 64, "head", "512", "1234")


def test_a_logger_that_is_not_installed(command):
    try:
        import wandb  # noqa: F401
    except ImportError:
        check_error(command("train", *SMALL, "logger=wandb"), 69, "wandb", 'pip install -e ".[wandb]"')
    else:
        pytest.skip("wandb is installed")
