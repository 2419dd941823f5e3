"""fp32, fp16 and bf16: where they are refused, how Lightning trains in them, and how others compute in them."""

from __future__ import annotations

import logging
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from src.engine.commands.user_command import corrected, is_training
from src.engine.runs.errors import ExitCode, UserError

if TYPE_CHECKING:
    from lightning.pytorch.plugins.precision import Precision

log = logging.getLogger(__name__)

LIGHTNING_NAMES: dict[str, Literal["16-mixed", "bf16-mixed"]] = {"fp16": "16-mixed", "bf16": "bf16-mixed"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN, which computes torch's layers on x86, emulates bfloat16 on every CPU:
# 75 times slower than fp32. uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
ONEDNN_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def precision_plugin(name: str, device: torch.device) -> Precision:
    """What Lightning's Trainer needs for this precision, in its plugins.

    fp16 comes with a GradScaler, on a CPU too, where precision="16-mixed" of the Trainer would become bf16.
    """
    from lightning.pytorch.plugins.precision import MixedPrecision, Precision  # takes seconds; predict does without it

    return Precision() if name == "fp32" else MixedPrecision(LIGHTNING_NAMES[name], device.type)


def check_precision(name: str, device: torch.device) -> None:
    """Raises UserError where the device cannot compute in this precision, or only by emulating it; fp16 on a CPU, which
    emulates it, is for learning and tests, and a warning."""
    if name == "fp16" and device.type == "cpu":
        log.warning(
            "precision=fp16 on a CPU shows how loss scaling works, but most CPUs emulate it: a training step can take "
            "15 times as long as with fp32 or more. Meant for speed it is on GPUs only."
        )
    if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        limit = _onednn_limit()
        why = f"ONEDNN_MAX_CPU_ISA={limit} rules out" if limit in ONEDNN_WITHOUT_BF16 else "this CPU does not have"
        raise _refused(name, device, f"{why} AVX512-BF16 and AMX, so bf16 would be slower than fp32", "fp32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        kind = torch.cuda.get_device_name(device)
        raise _refused(name, device, f"bfloat16 needs compute capability 8.0 (Ampere, 2020); this is a {kind}", "fp16")
    if name == "fp16" and device.type == "mps":
        raise _refused(name, device, "loss scaling is not available on mps", "bf16")


def usable_precision(name: str, device: torch.device) -> str:
    """The precision a model was trained in, or fp32 where this device does not have it, or only by emulating it: to
    predict, either will do."""
    if name == "fp16" and device.type == "cpu":
        return "fp32"
    try:
        check_precision(name, device)
        return name
    except UserError:
        return "fp32"


def _refused(name: str, device: torch.device, why: str, instead: str) -> UserError:
    return UserError(
        f"precision={name} does not work on {device.type}",
        why=why,
        fix=corrected(f"precision={instead}" if is_training() else "accelerator=auto"),
        code=ExitCode.UNAVAILABLE,
    )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware and oneDNN may use that; where the CPU cannot be asked (not Linux),
    bf16 is not refused."""
    if _onednn_limit() in ONEDNN_WITHOUT_BF16:
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return platform.system() != "Linux"
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "avx_ne_convert"})


def _onednn_limit() -> str:
    """The newest instructions that oneDNN is allowed to use, as the user set them; empty for all."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """The arithmetic of a forward pass outside of Lightning: evaluate and predict."""
    return nullcontext() if name == "fp32" else torch.autocast(device.type, dtype=DTYPES[name])
