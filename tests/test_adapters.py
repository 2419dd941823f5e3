"""freeze.lora_rank from the command line: what a run leaves, that it continues exactly, and what is refused."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from src.engine.runs.reading import read_checkpoint
from tests.conftest import SMALL, check_error
from tests.running import check_kill, result

# A small transformer that takes small images.
WORDS = [
    *(word for word in SMALL if not word.startswith("model.backbone")),
    *("model.backbone=timm/vit_tiny_patch16_224", "data.image_size=32", "freeze.lora_rank=4"),
]
RESNET = (*SMALL, "model.backbone=resnet18", "freeze.lora_rank=4")


@pytest.mark.parametrize(
    "select", ["average_top_k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("best", "ema"))]
)
def test_a_run_leaves_a_plain_network(command, tmp_path, select):
    done = command("train", *WORDS, f"checkpoint.select={select}", "name=one")
    assert done.code == 0, done.text
    assert "adapters  rank 4, 55,296 parameters beside 24 weights of the attention" in done.text
    assert "epoch 0 (the first): head and adapters" in done.text
    assert "computing features" not in done.text
    folder = tmp_path / "runs/one"
    model = load_file(folder / "model/model.safetensors")
    best = read_checkpoint(folder / "checkpoints/best.ckpt")["state_dict"]
    assert any("lora" in name for name in best)
    assert not any("lora" in name for name in model)
    frozen = "backbone.blocks.0.mlp.fc1.weight"
    assert model[frozen].equal(best[f"network.{frozen}"])
    changed = "backbone.blocks.0.attn.qkv"
    assert not model[f"{changed}.weight"].equal(best[f"network.{changed}.lora.weight"])

    assert command("evaluate", "run=runs/one").code == 0
    measured = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert measured.items() <= result(folder)["metrics"].items()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (RESNET, 64, ["the backbone has no attention", "model.backbone=vit_b_16"]),
        ([*WORDS, "freeze.phases={0:[head]}"], 64, ["does not go with freeze.lora_rank=4", "that names lora"]),
        ([*SMALL, "freeze.phases={0:[head],1:[lora]}"], 64, ["does not go with freeze.lora_rank=0"]),
        ([*WORDS[:-1], "baseline=only", "freeze.lora_rank=4"], 64, ["has no effect with baseline=only"]),
        (
            [*WORDS, "freeze.preset=gradual", "debug=true", "data.batch_size=4"],
            0,
            ["freeze.preset=gradual has no effect with", "training  1 epoch"],
        ),
    ],
)
def test_what_does_not_go_together(command, words, code, said):
    words = [word for word in words if not ("baseline=only" in words and word == "baseline=none")]
    done = command("train", *words)
    if code:
        check_error(done, code, *said)
    else:
        assert done.code == 0, done.text
        assert all(text in done.text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["{0:[head,lora]}", "{0:[head],1:[lora]}"])
def test_a_killed_run_ends_with_the_same_bits(phases):
    """Where only the head learns at first, that epoch reads features."""
    more = ["checkpoint.select=ema", "model.dropout=0.2", "memory.checkpoint_gradients=true", f"freeze.phases={phases}"]
    check_kill(*WORDS, *more)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("dp", marks=pytest.mark.needs("dp")), "ddp", "fp16", "batch_size"])
def test_devices_and_precisions(command, tmp_path, strategy):
    words = [f"strategy={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"]
    if strategy == "fp16":
        words = ["precision=fp16"]
    if strategy == "batch_size":
        words = ["data.batch_size=auto"]
    single = command("train", *WORDS, "data.augment=none", "name=single")
    other = command("train", *WORDS, "data.augment=none", *words, "name=other")
    assert (single.code, other.code) == (0, 0), single.text + other.text
    one, two = (load_file(tmp_path / f"runs/{name}/model/model.safetensors") for name in ("single", "other"))
    assert one.keys() == two.keys()
    if strategy in ("dp", "ddp"):
        assert all(one[name].allclose(two[name], atol=1e-4) for name in one)
