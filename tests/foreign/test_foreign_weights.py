"""model.weights=FILE whose bits were flipped: a zip notices all of them, a model folder too, the others the absurd numbers."""

from __future__ import annotations

import shutil

import pytest
import torch

from src.engine.runs import seeding
from src.engine.runs.checksum import save_with_checksum
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.model_folder import save_model
from src.engine.weights.weight_files import read_tensors
from src.engine.weights.weights import load_pretrained
from src.models.network import build_network
from tests.foreign.outcome import outcome
from tests.foreign.test_foreign_models import ARCHITECTURE, CARD, STEPS


@pytest.fixture(scope="module")
def network():
    return build_network(ARCHITECTURE, STEPS)


@pytest.fixture(scope="module")
def state(network):
    return {key: value.contiguous() for key, value in network.state_dict().items()}


def flips(content: bytes, count: int) -> list[bytes]:
    generator = seeding.generator(0, "flips")
    places = torch.randint(len(content), (count,), generator=generator).tolist()
    return [content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :] for place in places]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("ours", [False, True])
def test_no_flipped_bit_of_a_zip_loads_as_other_weights(tmp_path, state, ours):
    path = tmp_path / "a.ckpt"
    with path.open("wb") as file:
        save_with_checksum(state, file) if ours else torch.save(state, file)
    noticed = 0
    for content in flips(path.read_bytes(), 40):
        path.write_bytes(content)
        read = outcome(lambda: read_tensors(path))
        noticed += isinstance(read, UserError) and read.code == ExitCode.DATA
        assert isinstance(read, UserError) or same(read, state)  # in the padding between the members
    assert noticed > 30


def test_a_model_folder_whose_weights_are_not_those_of_its_card_is_refused(tmp_path, network, state):
    save_model(tmp_path / "model", state, CARD)
    file = tmp_path / "model" / "model.safetensors"

    def load(weights):
        load_pretrained(network.backbone, ARCHITECTURE.backbone, str(weights), keep_classifier=False, min_match=0.9)

    load(file.parent)  # the negative control
    file.write_bytes(flips(file.read_bytes(), 1)[0])
    for weights in (file.parent, file):
        with pytest.raises(UserError) as caught:
            load(weights)
        assert caught.value.code == ExitCode.DATA
        assert "SHA-256" in caught.value.why
    (file.parent / "model.json").write_text("[")
    with pytest.raises(UserError):
        load(file)
    shutil.move(file, tmp_path / "alone.safetensors")  # nothing says what it should be
    load(tmp_path / "alone.safetensors")


def test_numbers_that_no_training_gives_are_refused(tmp_path, network, state):
    name = next(key for key in state if key.startswith("backbone.") and state[key].ndim == 4)
    changed = state | {name: state[name].clone()}
    changed[name].view(-1)[0] = 1e30  # the highest bit of the exponent
    torch.save({key.removeprefix("backbone."): value for key, value in changed.items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="numbers above"):
        load_pretrained(
            network.backbone, ARCHITECTURE.backbone, str(tmp_path / "a.pth"), keep_classifier=False, min_match=0.9
        )
