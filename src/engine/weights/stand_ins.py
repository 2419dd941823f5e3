"""The plain objects that training programs keep beside their weights, and what torch.load makes of them instead.

weight_files.py reads files with weights_only=True, under which torch refuses every class that it does not know. Those
listed here are common and not needed: each becomes an inert stand-in, so that nothing of the file is ever run.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch


class Inert:
    """Stands for an object that is not needed: takes what it is given and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty_dict(*_: object) -> dict:
    return {}


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OF_ARRAYS = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
_PLAIN_OBJECTS = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"{module}.{name}" for module in ("numpy.core", "numpy._core") for name in _OF_ARRAYS),  # numpy 1 and 2
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple", "object")),
    *("decimal.Decimal", "fractions.Fraction", "types.SimpleNamespace", "typing.Any", "uuid.UUID"),
    *("functools.partial", "torch.torch_version.TorchVersion"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
)
_DICTIONARIES = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
)


_OPTIMIZERS_AND_LOSSES = [
    f"{kind.__module__}.{kind.__name__}"
    for module in (torch.optim, torch.optim.lr_scheduler, torch.nn.modules.loss)
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__.startswith(("torch.optim", "torch.nn.modules.loss"))
]


def stand_ins() -> list[tuple[Any, str]]:
    """(stand-in, name of the class it stands for) of every class that torch.load may meet beside tensors."""
    return [
        *((Inert, name) for name in (*_PLAIN_OBJECTS, *_OPTIMIZERS_AND_LOSSES)),
        *((OrderedDict, name) for name in _DICTIONARIES),
        (_empty_dict, "collections.defaultdict"),
    ]
