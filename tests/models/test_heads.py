from __future__ import annotations

import pytest
import torch
from torch import nn

from src.errors import ExitCode, UserError
from src.models.heads import HEADS, attempt, build_head, explain_shape_mismatch

torch.set_num_threads(1)


def layers(head: nn.Module) -> list[str]:
    return [str(layer) for layer in head.modules() if not any(layer.children())]


def test_heads_are_made_of_what_their_description_says():
    linear = "Linear(in_features=8, out_features=3, bias=True)"
    assert layers(build_head("linear", 8, 3, 16, 0.0)) == [linear]
    assert layers(build_head("linear", 8, 3, 16, 0.5)) == ["Dropout(p=0.5, inplace=False)", linear]
    assert layers(build_head("mlp", 8, 3, 16, 0.5)) == [
        "Linear(in_features=8, out_features=16, bias=True)",
        "ReLU()",
        "Dropout(p=0.5, inplace=False)",
        "Linear(in_features=16, out_features=3, bias=True)",
    ]
    assert layers(build_head("append", 1000, 3, 16, 0.5)) == ["Linear(in_features=1000, out_features=3, bias=True)"]


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_turns_features_into_logits(kind):
    assert build_head(kind, 8, 3, 16, 0.1)(torch.randn(4, 8)).shape == (4, 3)


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no head 'conv'") as caught:
        build_head("conv", 8, 3, 16, 0.0)
    assert "linear, mlp, append" in caught.value.why
    assert caught.value.code == ExitCode.CONFIG


# --- explain_shape_mismatch ------------------------------------------------------------------------------------------


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
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
    assert torch.is_grad_enabled()
