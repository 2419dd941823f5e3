"""trainer.compile: the backbone's training passes go through torch.compile, and nothing else is different."""

from __future__ import annotations

import functools
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src.callbacks.freezing import FreezingSchedule
from src.engine.steps import compiling
from src.engine.weights.preprocessing import Preprocessing
from src.models.freezing import FreezePlan
from src.models.network import Architecture, TransferNetwork, build_network
from tests.callbacks.test_freezing import Untrained
from tests.conftest import SMALL, check_error
from tests.readme.test_readme import files_of
from tests.running import check_kill
from tests.warm import ROOT

STEPS = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def passes(monkeypatch):
    """How often a graph was run, with a compiler that compiles nothing."""
    ran = []

    def backend(graph: torch.fx.GraphModule, _):
        def forward(*inputs):
            ran.append(len(inputs))
            return graph.forward(*inputs)

        return forward

    compiled = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(compiling, "compiled_pass", functools.cache(lambda: compiled(compiling._pass)))
    monkeypatch.setattr("src.models.network.compiled_pass", compiling.compiled_pass)
    yield ran
    torch.compiler.reset()


def network() -> TransferNetwork:
    torch.manual_seed(0)
    return build_network(Architecture("squeezenet1_1", "linear", 3), STEPS)


def test_training_passes_are_compiled_and_others_are_not(passes):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    compiled, plain = network().train(), network().train()
    compiled.compiled = True
    for one in (compiled, plain):
        torch.manual_seed(1)  # dropout
        one(images).square().mean().backward()
    assert len(passes) == 1
    for (name, weights), same in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weights.grad, same.grad, msg=name)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert compiled.eval()(images).equal(plain.eval()(images))
    compiled.train()(torch.zeros(4, 512))  # features of the bank
    assert len(passes) == 1


def test_without_a_compiler_the_run_is_refused_before_it_reads_images(command, tmp_path):
    done = command(
        "train", *SMALL, "trainer.compile=true", CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c")
    )
    check_error(done, 69, "torch.compile does not work on this machine", "trainer.compile=false")
    assert "images " not in done.out


def test_a_run_is_still_the_same_with_it(command):
    words = (*SMALL, "trainer.max_epochs=1", "name=one")
    assert command("train", *words).code == 0
    done = command("train", *words, "trainer.compile=true")
    assert done.code == 0, done.text
    assert "runs/one is finished already" in done.out


def test_every_phase_is_compiled_anew(passes):
    """torch compiles a pass for eight sets of trained weights at most, and goes on without a graph."""
    blocks = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)))
    model = Untrained(TransferNetwork(blocks, nn.Linear(3, 2), STEPS).train())
    model.network.compiled = True
    schedule = FreezingSchedule(FreezePlan({epoch: ["head", f"backbone.{epoch}"] for epoch in range(9)}, 9))
    for epoch in range(9):
        trainer = SimpleNamespace(current_epoch=epoch, is_global_zero=True, strategy=None)
        schedule.on_train_epoch_start(trainer, model)
        model.network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).mean().backward()
        assert len(passes) == epoch + 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    """The last batch of an epoch is smaller than the others, for which torch compiles again."""
    for part in ("src", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/my_nets.py").write_text(files_of(ROOT / "docs/your_own.md")["src/my_nets.py"])
    check_kill(*SMALL, "model.backbone=src.my_nets.Tiny", "freeze.preset=full", "trainer.compile=true", tree=tmp_path)
