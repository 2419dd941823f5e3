"""Model folders that somebody else changed: every hostile value ends in a UserError, and our own files notice every flip."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.files import sha256
from src.engine.runs.model_folder import ModelCard, load_model, save_model
from src.engine.weights.preprocessing import Preprocessing
from src.models.building import rebuild
from src.models.network import Architecture, build_network

NAN, INF = float("nan"), float("inf")
ARCHITECTURE = Architecture("shufflenet_v2_x0_5", "linear", 3)
STEPS = Preprocessing(32, 0.875, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
CARD = ModelCard(
    ARCHITECTURE.to_dict(), STEPS, ("a", "b", "c"), "multiclass", (1, 2, 3), 10.0, True, "fp32", {"val/acc": 0.5}
)


@pytest.fixture(scope="module")
def state():
    return {key: value.contiguous() for key, value in build_network(ARCHITECTURE, STEPS).state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(folder, state, CARD)
    return folder


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "model")


def use(folder):
    """All that evaluate, predict and export do with a model folder before the first image."""
    card, state = load_model(folder)
    return rebuild(card, state, folder)


def rewrite(folder, without_checksum=True, **changes):
    """Key a__b stands for ["a"]["b"]; ... takes the key away."""
    values = json.loads((folder / "model.json").read_text())
    if without_checksum:  # as in a folder of an older run, or one of somebody who knows what he does
        del values["checksum"]
    for key, value in changes.items():
        *way, last = key.split("__")
        inner = values
        for part in way:
            inner = inner[part]
        inner.pop(last) if value is ... else inner.update({last: value})
    (folder / "model.json").write_text(json.dumps(values))


def refused(folder):
    with pytest.raises(UserError) as caught:
        use(folder)
    assert caught.value.code == ExitCode.DATA
    assert str(folder) in caught.value.found
    assert len(caught.value.render().splitlines()) <= 15
    return caught.value


HOSTILE = [
    *({"classes": value} for value in ([], "abc", {"a": 1}, ["a", "b"], ["a", "a", "b"], [1, 2, 3], [["a"], "b", "c"])),
    *({"classes": value} for value in (None, 3, ["a", "b", "c", "d"], ["a"] * 10**6, ..., ["a", None, "c"])),
    *({"preprocessing__mean": value} for value in ([NAN] * 3, [0.5] * 2, "abc", [[0.5]] * 3, [1e30] * 3, None, 5)),
    *({"preprocessing__std": value} for value in ([0.0] * 3, [INF] * 3, [-1.0] * 3, [1e-30] * 3, ["1"] * 3, ...)),
    *({"preprocessing__image_size": value} for value in (0, -1, 10**9, 32.5, "32", None, True, [32], 1e400)),
    *({"preprocessing__crop_ratio": value} for value in (0, -1.0, 1e9, NAN, "1")),
    *({"preprocessing__interpolation": "lanczos9"}, {"preprocessing__rounding": 3}, {"preprocessing__crop_mode": []}),
    *({"preprocessing__more": 1}, {"preprocessing": None}, {"preprocessing": []}, {"preprocessing": ...}),
    *({"background": value} for value in ([999, -5, 10**9], [1, 2], "abc", [1.5, 2, 3], None, [True] * 3)),
    *({"max_megapixels": value} for value in (-1.0, 0, INF, NAN, 1e12, "10", None)),
    *({"bits": value} for value in (-1, 17, 10**9, "16", None, 1.5)),
    *({"channels_last": value} for value in ("yes", 2, None)),
    *({"precision": value} for value in ("fp8", 16, None, [])),
    *({"task": value} for value in ("regressions", "binary", None, {}, "os.system", "")),
    *({"metrics": value} for value in ({"a": "x"}, [], None, {"a": [1]}, {"a": 1e301})),
    *({"architecture__backbone": value} for value in ("resnet18", "os.system", "timm/hf-hub:a/b", 3, None, "", ...)),
    *({"architecture__outputs": value} for value in (2, 0, -1, 10**12, "3", None, 3.5, True)),
    *({"architecture__head": value} for value in ("mlp", "append", "eval", None, 1)),
    *({"architecture__hidden": value} for value in (0, -3, 10**12, "512", NAN)),
    *({"architecture__dropout": value} for value in (-1.0, 7.0, NAN, "0")),
    *({"architecture__more": 1}, {"architecture": None}, {"architecture": []}, {"architecture": ...}, {"more": 1}),
    *({"format": value} for value in (2, "1", None, ...)),
    *({"sha256": value} for value in ("0" * 64, None, 5, ...)),
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: str(change)[:60])
def test_a_hostile_value_is_refused(folder, change):
    rewrite(folder, **change)
    refused(folder)


def test_a_change_without_a_new_checksum_is_noticed_and_a_folder_without_one_is_still_read(folder):
    rewrite(folder, without_checksum=False, classes=["b", "a", "c"])
    assert "checksum" in refused(folder).why
    rewrite(folder)
    use(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "3", "{" * 10, "[" * 100_000, '{"a":' * 100_000, "{} {}", "\0", "\ufffe", "NaN"),
        *('{"format": 1, "format": 1}', '{"format": 1e999}', '{"format": ' + "9" * 10_000 + "}"),
    ],
    ids=range(14),
)
def test_text_that_is_no_model_is_refused(folder, text):
    (folder / "model.json").write_text(text, errors="surrogatepass")
    refused(folder)


def test_a_huge_file_is_refused_without_reading_it(folder):
    with (folder / "model.json").open("r+b") as file:
        file.truncate(2**40)  # a hole: nothing is on the disk
    assert "larger" in refused(folder).why


def of_weights(folder, content):
    """Weights of somebody else, with the SHA-256 that fits them."""
    if isinstance(content, bytes):
        (folder / "model.safetensors").write_bytes(content)
    else:
        save_file(content, folder / "model.safetensors")
    rewrite(folder, sha256=sha256(folder / "model.safetensors"))


def test_weights_that_are_none_or_another_networks_are_refused(folder, state, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    first = next(iter(state))
    contents = [pickle.dumps(Payload()), b"", b"x" * 100, (2**60).to_bytes(8, "little") + b"{}"]
    contents += [{}, {"a": torch.ones(1)}, state | {first: torch.ones(1)}, state | {"more": torch.ones(1)}]
    contents += [{name: value for name, value in state.items() if name != first}]
    contents += [state | {first: torch.full_like(state[first], bad)} for bad in (NAN, INF)]
    contents += [state | {"head.weight": torch.ones(10, 1024), "head.bias": torch.ones(10)}]
    for number, content in enumerate(contents):
        original = (folder / "model.json").read_text()
        of_weights(folder, content)
        refused(folder), number
        (folder / "model.json").write_text(original)
    assert not (tmp_path / "ran").exists()
    of_weights(folder, state)  # the negative control
    use(folder)


def test_a_header_of_a_million_tensors_is_refused_at_once(folder):
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(100_000)) + "}").encode()
    of_weights(folder, len(header).to_bytes(8, "little") + header)
    assert "header" in refused(folder).why


NUMBERS = {"mean": [1.0, -2.0, 1e30], "std": [1.0, 3, 1e-30]}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"mean": value}
            for value in ([0.0] * 2, [0.0] * 4, [], [NAN, 0, 0], [1e38, 0, 0], ["0"] * 3, "000", 5, None, ...)
        ),
        *(
            {"std": value}
            for value in ([1.0] * 2, [0.0, 1, 1], [-1.0, 1, 1], [INF, 1, 1], [[1.0], 1, 1], {"a": 1.0}, ...)
        ),
    ],
    ids=lambda change: str(change)[:40],
)
def test_hostile_numbers_of_a_regression_are_refused(folder, change):
    rewrite(folder, task="regression", task_values=NUMBERS)
    use(folder)
    rewrite(folder, without_checksum=False, **{f"task_values__{key}": value for key, value in change.items()})


THRESHOLDS = [
    *({"thresholds": value} for value in ([0.5] * 2, [0.5] * 4, [0.5, 1.5, 0.5], [0.5, -0.1, 0.5], [NAN, 0.5, 0.5])),
    *({"thresholds": value} for value in (["0.5"] * 3, "0.5", 0.5, None, {"a": 0.5}, [[0.5]] * 3)),
    *({"threshold": value} for value in ([], [0.3, 0.4], [2.0], [INF], 0.3)),
]


@pytest.mark.parametrize("values", THRESHOLDS, ids=lambda values: str(values)[:40])
def test_hostile_thresholds_are_refused(folder, values):
    rewrite(folder, task="multilabel", task_values={"thresholds": [0.1, 0.2, 0.3]})
    use(folder)
    rewrite(folder, without_checksum=False, task_values=values)
    refused(folder)
