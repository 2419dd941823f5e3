"""Weights files as they are found in the wild: the usual forms load, and what is not weights is named."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import logging
import os
import pathlib
import pickle
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from src.engine.runs.errors import ExitCode, UserError
from src.engine.weights.preprocessing import Preprocessing
from src.engine.weights.weights import LoadResult, load_pretrained, refuse_frozen_random
from src.models.backbones import build_backbone
from src.models.freezing import FreezePlan
from src.models.network import Architecture, TransferNetwork, build_network

torch.set_num_threads(1)

NAME = "squeezenet1_1"  # 52 tensors in 5 MB
STEM = "features.0.weight"


def load(path: object, name: str = NAME) -> tuple[LoadResult, dict[str, Tensor]]:
    backbone = build_backbone(name, keep_classifier=False, image_size=64)[0]
    return load_pretrained(backbone, name, str(path), keep_classifier=False, min_match=0.9), backbone.state_dict()


def refused(path: object, name: str = NAME, code: ExitCode = ExitCode.DATA) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, name)
    text = caught.value.render(Path("error.log"))
    assert caught.value.code == code
    assert len(text.splitlines()) <= 15
    assert "        ..." not in text
    assert "weights_only" not in text
    assert "set to `False`" not in "".join(traceback.format_exception(caught.value))  # torch's advice, in error.log
    return caught.value


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1234)
    return get_model(NAME).state_dict()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


# --- forms that load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["net", "network", "weights", "params", "module", "model_ema", "state_dict_ema", "generator", "a.b"]
)
def test_any_mapping_of_tensors_is_found_and_named(key, state, tmp_path):
    torch.save({"acc": 93.0, key: state}, tmp_path / "mine.pth")
    loaded, values = load(tmp_path / "mine.pth")
    assert loaded.line.startswith(f"mine.pth, key {key}: 50 of 50 tensors matched, sha256 ")
    assert all(torch.equal(values[name], state[name]) for name in values)


@pytest.mark.parametrize(
    ("taken", "other"),
    [("model", "model_ema"), ("student", "teacher"), ("module.encoder_q", "module.encoder_k"), ("net", "ema.shadow")],
)
def test_another_set_of_weights_beside_is_named(taken, other, state, tmp_path):
    average = {key: value * 2 for key, value in state.items()}
    content = under(f"{taken}.", state) | under(f"{other}.", average) | {"module.queue": torch.ones(3)}
    torch.save({"state_dict": content}, tmp_path / "two.pth")
    loaded, values = load(tmp_path / "two.pth")
    assert f"key state_dict.{taken}: 50 of 50 tensors matched" in loaded.line
    assert f"not taken, but fits as well: state_dict.{other}," in loaded.line
    assert torch.equal(values[STEM], state[STEM])


def test_the_averages_of_an_optimizer_are_not_taken_for_weights(state, tmp_path):
    averages = {"exp_avg": {key: value * 0 for key, value in state.items()}}
    torch.save({"optimizer": averages, "model": state}, tmp_path / "mine.pth")
    loaded, _ = load(tmp_path / "mine.pth")
    assert "key model: 50 of 50" in loaded.line
    assert "as well" not in loaded.line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("features.", "features.module."),  # the ImageNet example wraps the features of AlexNet and VGG alone
        (".squeeze.", "._checkpoint_wrapped_module.squeeze."),
        ("features.3.", "_fsdp_wrapped_module.features.3._fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("features.", "_forward_module._orig_mod.module.features."),
    ],
)
def test_what_wrappers_put_into_names_does_not_matter(old, new, state, tmp_path):
    torch.save({key.replace(old, new): value for key, value in state.items()}, tmp_path / "mine.pth")
    loaded, values = load(tmp_path / "mine.pth")
    assert "50 of 50 tensors matched" in loaded.line
    assert torch.equal(values["features.3.squeeze.weight"], state["features.3.squeeze.weight"])


@pytest.mark.parametrize("new_format", [True, False])
def test_plain_objects_beside_the_weights_do_not_matter(new_format, state, tmp_path):
    args = argparse.Namespace(lr=0.1, data=pathlib.Path("/data"), day=datetime.date(2026, 1, 1), part=functools.partial)
    content = {
        "state_dict": state,
        "args": args,
        "numpy": [
            np.float64(76.1),
            np.float32(1),
            np.int64(3),
            np.bool_(True),
            np.str_("x"),
            np.dtype("f4"),
            np.ones(3),
        ],
        "numpy_rng": np.random.get_state(),
        "paths": [pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:/x")],
        "times": [datetime.datetime(2026, 1, 1), datetime.timedelta(seconds=1)],
        "hyper_parameters": AttributeDict(cfg=OmegaConf.create({"a": [1, {"b": None}]})),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "loss": torch.nn.CrossEntropyLoss(weight=torch.ones(3)) if new_format else None,  # else with its source code
        "optimizer_class": functools.partial(torch.optim.AdamW, lr=1e-3),
        "version": torch.__version__,
    }
    torch.save(content, tmp_path / "mine.tar", _use_new_zipfile_serialization=new_format)
    loaded, values = load(tmp_path / "mine.tar")
    assert "key state_dict: 50 of 50" in loaded.line
    assert torch.equal(values[STEM], state[STEM])


def test_numpy_of_either_major_version_is_known(state, tmp_path):
    """numpy 2 writes numpy._core where numpy 1 wrote numpy.core: the bytes in the file decide, not what is installed."""
    torch.save({"net": state, "acc": np.float64(1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    assert b"cnumpy._core.multiarray\n" in content
    (tmp_path / "b.pth").write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    for name in ("a.pth", "b.pth"):
        assert "50 of 50" in load(tmp_path / name)[0].line


class Runs:
    def __init__(self, name: str, *args: object) -> None:
        self.call = (name, args)

    def __reduce__(self):
        return {"eval": eval, "getattr": getattr, "exec": exec}[self.call[0]], self.call[1]


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("call", [("eval", "open('ran', 'w')"), ("exec", "open('ran', 'w')"), ("getattr", "", "join")])
def test_plain_objects_open_no_door_for_code(call, new_format, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"net": state, "args": argparse.Namespace(x=Runs(*call))}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    assert "holds code" in refused(tmp_path / "evil.pth").found
    assert not Path("ran").exists()


def test_the_suffix_does_not_decide_what_a_file_is(state, tmp_path):
    torch.save(state, tmp_path / "torch.safetensors")
    save_file(state, tmp_path / "safe.pth")
    for name in ("torch.safetensors", "safe.pth"):
        assert "50 of 50" in load(tmp_path / name)[0].line


def test_a_mapping_that_holds_itself(state, tmp_path):
    content = {"net": state}
    content["self"] = content
    torch.save(content, tmp_path / "mine.pth")
    assert "as well" not in load(tmp_path / "mine.pth")[0].line


def test_names_in_a_file_cannot_reach_the_terminal(state, tmp_path):
    torch.save({"\x1b[2J": state | {"\x1b[31m\n": torch.ones(1)}}, tmp_path / "mine.pth")
    assert load(tmp_path / "mine.pth")[0].line.isprintable()
    torch.save({"\x1b[31m": torch.ones(1)}, tmp_path / "other.pth")
    assert "\x1b" not in refused(tmp_path / "other.pth").render()


# --- what is not in the file stays random ----------------------------------------------------------------------------


def test_what_stays_random_is_named_in_a_warning(state, tmp_path, caplog):
    torch.save({key: value for key, value in state.items() if key != "features.3.squeeze.bias"}, tmp_path / "mine.pth")
    loaded, _ = load(tmp_path / "mine.pth")
    assert loaded.random == ["features.3.squeeze.bias"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("lacks 1 of the 50 tensors of squeezenet1_1. They begin with random values: "
                                        "features.3.squeeze.bias")  # fmt: skip


def test_a_file_that_has_everything_warns_of_nothing(state, tmp_path, caplog):
    torch.save(state, tmp_path / "mine.pth")
    assert load(tmp_path / "mine.pth")[0].random == []
    assert not caplog.records


@pytest.fixture
def network() -> TransferNetwork:
    preprocessing = Preprocessing(64, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return build_network(Architecture("resnet18", "linear", 3), preprocessing)


@pytest.mark.parametrize("missing", ["conv1.weight", "layer1.0.bn1.running_var", "layer1.0.bn1.bias"])
def test_what_is_random_and_frozen_is_an_error(missing, network, tmp_path):
    states = network.backbone.state_dict()
    torch.save({key: value for key, value in states.items() if key != missing}, tmp_path / "mine.pth")
    path = str(tmp_path / "mine.pth")
    loaded = load_pretrained(network.backbone, "resnet18", path, keep_classifier=False, min_match=0.9)
    everything = ["head", *(f"backbone.{name}" for name, _ in network.backbone.named_children())]
    FreezePlan({0: everything}, 2).apply(network, 0)
    refuse_frozen_random(network, loaded, path)
    FreezePlan({0: ["head"], 1: everything}, 2).apply(network, 0)
    with pytest.raises(UserError, match=f"not in the weights file, and frozen: {missing}") as caught:
        refuse_frozen_random(network, loaded, path)
    assert caught.value.code == ExitCode.DATA
    FreezePlan({0: everything}, 2, "keep").apply(network, 0)  # statistics that are kept are frozen too
    if "running" in missing:
        with pytest.raises(UserError):
            refuse_frozen_random(network, loaded, path)


def test_a_run_with_a_random_frozen_stem_is_refused(tmp_path, command, state):
    torch.save({key: value for key, value in state.items() if not key.startswith("features.0.")}, tmp_path / "a b.pth")
    words = ["debug=true", "data=synthetic", "data.image_size=64", f"model.backbone={NAME}", "trainer.threads=1"]
    done = command("train", *words, f"model.weights='{tmp_path}/a b.pth'", f"runs_dir={tmp_path}/runs", "name=a")
    assert done.code == ExitCode.DATA, done.text
    assert f"They begin with random values: {STEM}, features.0.bias" in done.out
    assert f"not in the weights file, and frozen: {STEM}, features.0.bias" in done.err


# --- input channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
def test_input_channels_are_adapted_as_timm_does(channels, state, tmp_path, caplog):
    timm = pytest.importorskip("timm", minversion="1.0.31")  # the first with base_chans
    stem = torch.randn(64, channels, 3, 3)
    torch.save(state | {STEM: stem}, tmp_path / "mine.pth")
    loaded, values = load(tmp_path / "mine.pth")
    expected = timm.models._manipulate.adapt_input_conv(3, stem, base_chans=channels)
    torch.testing.assert_close(values[STEM], expected)
    assert f"{STEM} adapted from {channels} input channel" in loaded.line
    assert not loaded.random
    assert not caplog.records
    if channels == 1:  # a grey image gives what it gave
        torch.testing.assert_close(values[STEM].sum(1, keepdim=True), stem)


@pytest.mark.parametrize("channels", [2, 6, 13])
def test_other_input_channels_are_refused(channels, state, tmp_path):
    torch.save(state | {STEM: torch.randn(64, channels, 3, 3)}, tmp_path / "mine.pth")
    assert f"images with {channels} channels" in refused(tmp_path / "mine.pth").found


# --- values that cannot be right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_none_are_refused(value, state, tmp_path):
    broken = state["features.3.squeeze.weight"].double()
    broken[0, 0] = value  # 1e300 is a number in float64 only
    torch.save(state | {"features.3.squeeze.weight": broken}, tmp_path / "mine.pth")
    assert "holds nan, inf or numbers above 1e+08: features.3.squeeze.weight" in refused(tmp_path / "mine.pth").found


def test_weights_without_content_are_refused_or_said(state, tmp_path, caplog):
    torch.save({key: value * 0 for key, value in state.items()}, tmp_path / "mine.pth")
    assert "the same number throughout" in refused(tmp_path / "mine.pth").found
    torch.save(state | {STEM: torch.ones(64, 3, 3, 3)}, tmp_path / "mine.pth")
    load(tmp_path / "mine.pth")
    assert f"every number is the same in {STEM}" in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor.to(torch.int8), "quantised"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantised"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "quantised"),
        (lambda tensor: tensor.to(torch.complex64), "no real numbers"),
        (lambda tensor: tensor.to_sparse(), "sparse"),
        (lambda tensor: tensor.to("meta"), "without values"),
    ],
)
def test_tensors_that_are_not_plain_numbers_are_refused(change, words, state, tmp_path):
    torch.save(state | {STEM: change(state[STEM])}, tmp_path / "mine.pth")
    error = refused(tmp_path / "mine.pth")
    assert f"tensors that cannot be used: {STEM}" in error.found
    assert words in error.found


# --- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b'{"weight_map": {}}', "several files"),
        (pickle.dumps({"conv1.weight": np.ones(9)}), "pickle"),
        (pickle.dumps({"conv1.weight": np.ones(9)}, protocol=2), "pickle"),
        (b"hello\n" * 100, "another kind"),
        (bytes(5000), "another kind"),
    ],
)
def test_what_is_not_weights_is_named(content, words, tmp_path):
    (tmp_path / "it's.pth").write_bytes(content)
    assert words in refused(tmp_path / "it's.pth").found


def test_zip_archives_of_other_things_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    assert "NumPy arrays with a.npy" in refused(tmp_path / "arrays.npz").found
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("a/b.txt", "x")
    assert "a zip archive with a/b.txt" in refused(tmp_path / "photos.pth").found


def test_a_zip_archive_with_a_damaged_list_of_members(state, tmp_path):
    torch.save(state, tmp_path / "mine.pth")
    content = bytearray((tmp_path / "mine.pth").read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place : place + 2] = b"XX"
    (tmp_path / "mine.pth").write_bytes(content)
    assert "damaged" in refused(tmp_path / "mine.pth").found


def test_the_file_of_another_backbone_is_recognised(tmp_path):
    torch.save({"net": get_model("resnet18", num_classes=7).state_dict()}, tmp_path / "mine.pth")
    error = refused(tmp_path / "mine.pth")
    assert "The file fits resnet18." in error.why
    assert error.fix[0] == f"python -m src.train model.backbone=resnet18 model.weights={tmp_path}/mine.pth"


# --- which file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with blanks.pth", "epoch=3-step=10.ckpt", "it's [1] #2 ü.pth"])
def test_paths_are_taken_as_they_are(name, state, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / name)
    assert "50 of 50" in load(f"~/{name}")[0].line


def test_the_folder_of_a_run_means_its_model(state, tmp_path):
    (tmp_path / "runs/a/model").mkdir(parents=True)
    save_file(state, tmp_path / "runs/a/model/model.safetensors")
    assert "50 of 50" in load(tmp_path / "runs/a")[0].line


def test_a_folder_without_a_model_offers_what_it_has(state, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "ls -lR" in refused(tmp_path, code=ExitCode.NO_INPUT).fix[0]
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    error = refused(tmp_path, code=ExitCode.NO_INPUT)
    assert error.fix == [f"python -m src.train model.weights={tmp_path}/checkpoints/best.ckpt"]
    (tmp_path / ".metadata").touch()
    assert "sharded" in refused(tmp_path, code=ExitCode.NO_INPUT).why


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("~nobody/x.pth", "does not exist"),
        ("https://host/a.pth?x=1", "an address"),
        ("imagenet", "does not exist"),
        ("x" * 300, "too long"),
        ("a\0b", "does not exist"),
    ],
)
def test_what_is_no_file(weights, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(weights, code=ExitCode.NO_INPUT).found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe", code=ExitCode.NO_INPUT).found


# --- layers under two names ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One convolution and its buffer under two names, as timm's CoaT has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.again = self.conv
        self.last = nn.Linear(3, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.again(self.conv(images)).mean((2, 3)))


def test_a_layer_under_two_names_is_built_and_loaded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: Tied())
    backbone, features = build_backbone("resnet18", keep_classifier=False, image_size=32)
    assert features == 3
    assert not any(value.is_meta for value in backbone.state_dict().values())
    torch.manual_seed(3)
    state = Tied().state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("again.")}, tmp_path / "once.pth")
    line = load_pretrained(backbone, "resnet18", str(tmp_path / "once.pth"), keep_classifier=False, min_match=1.0).line
    assert "12 of 12 tensors matched" in line
    assert not caplog.records
    assert torch.equal(backbone.again[0].weight, state["conv.0.weight"])


@pytest.mark.parametrize("name", ["timm/coat_tiny", "timm/coat_lite_tiny"])
def test_timms_layers_under_two_names(name):
    pytest.importorskip("timm")
    backbone, features = build_backbone(name, keep_classifier=False, image_size=224)
    assert features in (152, 320)
    assert not any(value.is_meta for value in backbone.state_dict().values())
