"""The layer that does not fit its input is named, and looking for it changes nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from src.engine.runs.errors import UserError
from src.engine.weights.shape_errors import attempt, explain_shape_mismatch

torch.set_num_threads(1)


class Net(nn.Module):
    """A small backbone with a head to be broken: (B, 3, 8, 8) -> (B, 8, 4, 4) -> head."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def fail(network: nn.Module, images: torch.Tensor) -> UserError | None:
    with pytest.raises(RuntimeError) as caught:
        network(images)
    return explain_shape_mismatch(caught.value, network, images)


@pytest.mark.parametrize(
    ("head", "name", "expected", "got", "fix"),
    [
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(25088, 3)),
            "head.2", "(..., 25088)", "(B, 8)", "nn.Linear(8, 3)",
        ),
        (nn.Linear(5, 3), "head", "(..., 5)", "(B, 8, 4, 4)", "Flatten() before it and build it as nn.Linear(128, 3)"),
        (nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU()), "head.0", "(B, 16, H, W)", "(B, 8, 4, 4)", "for 8 channels"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(16)), "head.1", "(B, 16, H, W)", "(B, 8, 4, 4)", "for 8 channels"),
        (nn.LayerNorm(16), "head", "(..., 16)", "(B, 8, 4, 4)", "for 4 channels"),
        (
            nn.Sequential(nn.Flatten(), nn.Unflatten(1, (8, 16)), nn.BatchNorm1d(4)),
            "head.2", "(B, 4, ...)", "(B, 8, 16)", "for 8 channels",
        ),
    ],
)  # fmt: skip
def test_the_layer_that_does_not_fit_is_named(head, name, expected, got, fix):
    error = fail(Net(head), torch.randn(4, 3, 8, 8))
    assert error is not None
    kind = type(Net(head).get_submodule(name)).__name__
    assert error.found == f"layer '{name}' ({kind}) expects an input of shape {expected} and got {got}"
    assert fix in error.fix[0]
    assert len(error.render().splitlines()) <= 15


class Raises(nn.Module):
    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    "head",
    [
        Raises(RuntimeError("CUDA out of memory")),
        nn.Sequential(nn.Linear(4, 4), Raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))),
        nn.Conv2d(8, 4, 9),  # fits by its channels; the map is too small, which another size of image mends
    ],
)
def test_other_errors_are_left_alone(head):
    assert fail(Net(head), torch.randn(4, 3, 8, 8)) is None


def test_an_error_outside_the_network_is_left_alone():
    network = Net(nn.Flatten())
    assert explain_shape_mismatch(RuntimeError("shapes"), network, torch.randn(4, 3, 8, 8)) is None


def test_an_error_between_layers_is_not_blamed_on_the_last_one():
    def forward() -> torch.Tensor:
        return network(torch.randn(4, 3, 8, 8)) + torch.ones(7)

    network = Net(nn.Flatten())
    failed = attempt(network, forward)
    assert isinstance(failed.error, RuntimeError)
    assert (failed.name, failed.layer) == ("", None)


def test_looking_for_the_layer_leaves_the_network_as_it_was():
    network = Net(nn.Linear(5, 3)).train()
    network.backbone[1].eval()  # frozen, as freezing leaves it
    state = {key: value.clone() for key, value in network.state_dict().items()}
    failed = attempt(network, lambda: network(torch.randn(4, 3, 8, 8)))
    assert failed.name == "head"
    assert network.training
    assert network.backbone[0].training
    assert not network.backbone[1].training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.is_grad_enabled()


def test_no_hook_is_left():
    def look() -> weakref.ref[nn.Module]:
        network = Net(nn.Linear(5, 3))
        attempt(network, lambda: network(torch.randn(4, 3, 8, 8)))
        return weakref.ref(network.head)

    head = look()
    gc.collect()
    assert head() is None
