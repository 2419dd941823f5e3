"""How the tensors of a weights file and those of a backbone belong together: by name and shape.

weights.py calls `match`; which file the tensors come from does not matter here.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from src.engine.weights.position_size import resampled

# Parts of names that wrappers put in: DataParallel and DDP, torch.compile, activation checkpointing, FSDP, Fabric.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}

# Names that torchvision's files still have and its modules no longer do: densenet.py (_load_state_dict) and
# vision_transformer.py (MLPBlock._load_from_state_dict) rename them on their way in.
_OLD_NAMES = [
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
]


CHANNELS = {
    1: "1 input channel (a third of it for each colour)",
    4: "4 input channels (the first three as red, green and blue, times 4/3)",
}


@dataclass
class Match:
    """How a file's tensors and a backbone's fit. num_batches_tracked is loaded where it is found, but never counted.

    Names are the backbone's, except for those in the file only.
    """

    key: str  # where in the file the tensors are: "" (at its top), "state_dict", "module.encoder_q", ...
    alternatives: list[str]  # other such places that fit about as well
    counted: int = 0  # tensors of the backbone
    values: dict[str, Tensor] = field(default_factory=dict)  # what will be copied: same name and shape
    adapted: dict[str, str] = field(default_factory=dict)  # values made from tensors of another shape, and from what
    missing: dict[str, str] = field(default_factory=dict)  # what the file lacks, and "", or in what its tensor differs
    unusable: dict[str, str] = field(default_factory=dict)  # what the file has in a form that is not copied, and which
    unused: list[str] = field(default_factory=list)  # tensors of the file that the backbone lacks

    @property
    def matched(self) -> int:
        return self.counted - len(self.missing)

    @property
    def share(self) -> float:
        return self.matched / max(self.counted, 1)

    def missing_names(self) -> list[str]:
        return [f"{name} ({why})" if why else name for name, why in self.missing.items()]


def match(backbone: dict[str, Tensor], file: dict[str, Tensor], ignored: tuple[str, ...] = ()) -> Match:
    """backbone: its state_dict. file: the tensors of a weights file. ignored: prefixes of names that the file may have
    although the backbone lacks them."""
    plain_names = {plain_name(key): key for key in backbone}
    prefix, others = _prefixes(backbone, plain_names, file)
    inside = {plain_name(key.removeprefix(prefix)): key for key in file if key.startswith(prefix)}
    result = Match(prefix.rstrip("."), [other.rstrip(".") or "its top" for other in others])
    for plain, key in plain_names.items():
        target, tensor = backbone[key], file[inside[plain]] if plain in inside else None
        counts = not key.endswith("num_batches_tracked")
        if counts:
            result.counted += 1
        if tensor is None:
            if counts:
                result.missing[key] = ""
        elif form := _form(tensor, target):
            result.unusable[key] = form
        elif tensor.shape == target.shape:
            result.values[key] = tensor
        elif (adapted := _for_three_channels(tensor, target)) is not None:
            result.values[key] = adapted
            result.adapted[key] = CHANNELS[tensor.shape[1]]
        elif "pos_emb" in key and (embeddings := resampled(tensor, target)) is not None:
            result.values[key] = embeddings
            result.adapted[key] = f"{tensor.shape[1]} positions, resampled to {target.shape[1]}"
        elif _is_input_convolution(tensor, target):
            result.unusable[key] = f"for images with {tensor.shape[1]} channels"
        elif counts:
            result.missing[key] = f"the file's is {list(tensor.shape)}"
    loaded = {backbone[key].data_ptr() for key in result.values if backbone[key].numel()}
    for key in [key for key in result.missing if backbone[key].data_ptr() in loaded and not backbone[key].is_meta]:
        del result.missing[key]  # a layer under two names, of which the file has the other
    unused = [key for plain, key in inside.items() if plain not in plain_names and not plain.startswith(ignored)]
    result.unused = [key.removeprefix(prefix) for key in unused if not key.endswith("num_batches_tracked")]
    return result


def plain_name(key: str) -> str:
    """A tensor's name without what wrappers put in, and as today's torchvision calls it."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for pattern, new in _OLD_NAMES:
        key = pattern.sub(new, key)
    return key


def _prefixes(
    backbone: dict[str, Tensor], plain_names: dict[str, str], file: dict[str, Tensor]
) -> tuple[str, list[str]]:
    """What stands before the backbone's names in the file ('', 'module.', 'state_dict.net.', ...): the prefix with which
    most of them fit, and other prefixes with which about as many fit, such as the one of a moving average."""
    fits, named = Counter({"": 0}), Counter()
    for key, tensor in file.items():
        parts = key.split(".")
        for start in range(len(parts)):
            inner = plain_name(".".join(parts[start:]))
            if parts[start] not in _WRAPPERS and inner in plain_names:
                prefix = ".".join([*parts[:start], ""]) if start else ""
                named[prefix] += 1
                fits[prefix] += _fits(tensor, backbone[plain_names[inner]])
    order = sorted({**fits, **named}, key=lambda prefix: (-fits[prefix], -named[prefix], len(prefix)))
    return order[0], [prefix for prefix in order[1:] if fits[prefix] > 0.9 * fits[order[0]]]


def _fits(value: Tensor, own: Tensor) -> bool:
    return not _form(value, own) and value.shape == own.shape


def _form(value: Tensor, own: Tensor) -> str:
    """Why a file's tensor cannot be copied, apart from its shape; "" for a plain tensor of numbers."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}, which is sharded or of a special kind"
    if value.is_quantized or (own.is_floating_point() and (not value.is_floating_point() or value.itemsize == 1)):
        return f"quantised, or no real numbers ({value.dtype})"
    if value.is_nested or value.layout != torch.strided:
        return "sparse or nested"
    return "without values (on the meta device)" if value.is_meta else ""


def _for_three_channels(value: Tensor, own: Tensor) -> Tensor | None:
    """The weight of a first convolution for 1 or 4 channels, as timm's adapt_input_conv makes it fit RGB; else None.

    One channel: a third of it for each of R, G and B, which gives the same on grey images. Four: the first three, 4/3 of
    each.
    """
    if not _is_input_convolution(value, own) or value.shape[1] not in (1, 4):
        return None
    channels = value.shape[1]
    return value.float().repeat(1, 3 if channels == 1 else 1, 1, 1)[:, :3] * (channels / 3)


def _is_input_convolution(value: Tensor, own: Tensor) -> bool:
    """Whether the file's tensor differs from the backbone's first convolution only in the number of input channels."""
    sizes, own_sizes = list(value.shape), list(own.shape)
    return len(sizes) == 4 and own_sizes[1:2] == [3] and sizes[:1] + sizes[2:] == own_sizes[:1] + own_sizes[2:]
