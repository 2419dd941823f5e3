"""The names of backbones, efficientnet_lite0, torchvision's classification models and timm/NAME, and their preprocessing."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torchvision

from src.engine.commands.user_command import corrected
from src.engine.own import check_own, is_own, own_object
from src.engine.runs.errors import ExitCode, UserError
from src.engine.weights import efficientnet_lite
from src.engine.weights.preprocessing import INTERPOLATIONS, Preprocessing

TIMM_PREFIX = "timm/"
# Of an own backbone without an attribute `preprocessing`: that of most ImageNet weights.
USUAL = Preprocessing(224, 0.875, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def backbone_names() -> list[str]:
    """All names except timm's more than a thousand, which timm.list_models() lists."""
    return [efficientnet_lite.NAME, *torchvision.models.list_models(module=torchvision.models)]


def is_timm(name: str) -> bool:
    return name.startswith(TIMM_PREFIX)


def check_backbone_name(name: str) -> None:
    """Raises UserError unless there is such a backbone and its package is installed."""
    if is_own(name):
        check_own("model.backbone", name)
    elif is_timm(name):
        _check_timm_name(name)
    elif name not in backbone_names():
        why = "the names are efficientnet_lite0, those of torchvision.models, timm/NAME, and your own, as src.my_nets.tiny"
        if importlib.util.find_spec("timm") and timm_package().is_model(name):
            raise _unknown(name, [TIMM_PREFIX + name], "timm has a model of that name; " + why)
        family = [each for each in backbone_names() if name and each.startswith(name.lower())][:5]
        raise _unknown(name, _close(name, backbone_names()) or family, why)


def _check_timm_name(name: str) -> None:
    timm, wanted = timm_package(), name.removeprefix(TIMM_PREFIX)
    architecture, _, tag = wanted.partition(".")
    if not timm.is_model(architecture):
        raise _unknown(name, _close(architecture, timm.list_models(), TIMM_PREFIX), "timm has no model of that name")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and wanted not in tagged:
        close = _close(wanted, tagged, TIMM_PREFIX) or [TIMM_PREFIX + architecture]
        raise _unknown(name, close, f"timm has no weights '{tag}' for {architecture}")


def _close(name: str, names: Sequence[str], prefix: str = "") -> list[str]:
    return [prefix + match for match in difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.6)]


def _unknown(name: str, close: list[str], why: str) -> UserError:
    return UserError(
        f"there is no backbone {name!r}" + (f"; close to it: {', '.join(close)}" if close else ""),
        where=f"model.backbone={name}",
        why=why,
        fix=corrected(f"model.backbone={close[0] if close else 'resnet18'}"),
    )


def timm_package() -> ModuleType:
    """timm, imported only when it is asked for: it takes seconds, and is an extra."""
    if importlib.util.find_spec("timm") is None:
        found = "backbones named timm/NAME need the package timm, which is not installed"
        why = "timm is an extra of this project"
        raise UserError(
            found, where="model.backbone", why=why, fix='pip install -e ".[timm]"', code=ExitCode.UNAVAILABLE
        )
    import timm

    return timm


def pretrained_preprocessing(name: str) -> Preprocessing:
    """The preprocessing that belongs to the backbone's default weights; of an own backbone, its attribute `preprocessing`.
    Raises UserError for an unknown name."""
    check_backbone_name(name)
    if is_own(name):
        return getattr(own_object("model.backbone", name), "preprocessing", USUAL)
    if name == efficientnet_lite.NAME:
        return efficientnet_lite.PREPROCESSING
    if is_timm(name):
        timm = timm_package()
        cfg = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).to_dict()
        data = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
        _, height, size = data["input_size"]
        if height != size:
            raise UserError(
                f"{name} was trained on images of {height} x {size} pixels, which are no squares",
                why="images are resized and cut to squares here, and its position embeddings would not fit them",
                fix=corrected("model.backbone=timm/vit_base_patch16_224"),
            )
        ratio, interpolation, mean, std = (data[key] for key in ("crop_pct", "interpolation", "mean", "std"))
        how = {"crop_mode": data["crop_mode"] or "center", "rounding": "floor"}
    else:
        steps = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        size, interpolation = steps.crop_size[0], steps.interpolation.value
        ratio = size / steps.resize_size[0]
        mean, std, how = steps.mean, steps.std, {}
    if interpolation not in INTERPOLATIONS:
        interpolation = "bicubic"
    return Preprocessing(size, ratio, interpolation, tuple(mean), tuple(std), **how)
