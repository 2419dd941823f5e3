"""Running out of memory: which errors mean it, freeing memory, the messages, and forward passes in parts.

src/engine/steps/out_of_memory.py repeats a training step in parts; `InParts` is for validation, evaluate and predict.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from src.engine.commands.user_command import corrected, typed_words
from src.engine.memory.memory import MIB
from src.engine.memory.ram import available_ram
from src.engine.runs.errors import ExitCode, UserError

log = logging.getLogger(__name__)

SMALLEST = "shufflenet_v2_x0_5"  # of the backbones

# Texts of a RuntimeError, where its type does not tell. cuBLAS and cuDNN fail to start without room for their workspace,
# and cuDNN finds no algorithm that is small enough.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, ROCm, Apple's MPS
    "can't allocate memory",  # the CPU on Linux and macOS
    "not enough memory",  # the CPU on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "Unable to find a valid cuDNN algorithm",
)
# After these errors the process cannot use its GPU any more.
GPU_FAULT = ("device-side assert", "illegal memory access", "misaligned address", "unspecified launch failure")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had too little memory, so that a smaller batch may work.

    Unlike Lightning's own test it includes cuBLAS, cuDNN's start, MPS and Python's MemoryError (numpy raises it). NCCL
    errors are excluded: no process can repeat an exchange alone.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return _says(error, _OUT_OF_MEMORY) and not _says(error, (*GPU_FAULT, "NCCL"))


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def gpu_fault_explained(error: BaseException) -> UserError:
    """The UserError for a fault of the GPU."""
    return UserError(
        f"the GPU stopped while it computed: {_first_line(error)}",
        why="usually a label that is not in 0..num_classes-1; a GPU reports it late and not where it happened",
        fix=[
            corrected("trainer.accelerator=cpu") + "  # a CPU names the place",
            f"CUDA_LAUNCH_BLOCKING=1 {corrected()}  # if it works on a CPU: slow, but names the place",
        ],
        code=ExitCode.GPU_FAULT,
    )


def free() -> None:
    """Gives unreferenced memory back to the device. Call it outside of the except block: inside, the traceback still refers
    to the tensors of the failed step."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@dataclass(frozen=True)
class Exhausted:
    """An out-of-memory error without its traceback, which would keep the tensors of the failed step alive."""

    message: str
    memory: str  # the numbers of that moment
    device: torch.device

    @classmethod
    def of(cls, error: BaseException, device: torch.device) -> Exhausted:
        return cls(_first_line(error), memory_state(device), device)

    @classmethod
    def elsewhere(cls, device: torch.device) -> Exhausted:
        """The failure of another process."""
        return cls("another process ran out of memory", memory_state(device), device)

    def with_one_image(self) -> UserError:
        """The UserError when the batch cannot be divided any further."""
        fix = smaller()
        if self.device.type == "cuda":
            fix += [corrected("precision=bf16") + "  # or fp16", "nvidia-smi  # other processes on the GPU"]
        return self._error("out of memory with a single image at a time", self.message, fix)

    def told_to_stop(self, step: int, images: int, processes: int) -> UserError:
        """The UserError at the first failure under oom.policy=stop."""
        fix = [corrected("oom.policy=split"), corrected(f"data.batch_size={max(1, images * processes // 2)}")]
        why = f"oom.policy=stop looks for no size that fits; {self.message}"
        return self._error(f"out of memory in step {step} with {images} images at a time", why, fix)

    def in_optimizer(self, step: int) -> UserError:
        """The UserError when the gradients fitted, but not the optimizer's step."""
        why = (
            "some weights may have moved already, and fewer images at a time would not help: AdamW keeps two "
            f"numbers for every weight that is trained; {self.message}"
        )
        fix = [
            corrected("optimizer=sgd"),
            corrected("freeze.preset=head_only", remove=["freeze.phases"]) + "  # or a smaller freeze.last_n",
            *smaller()[-1:],
        ]
        return self._error(f"out of memory in the optimizer, in step {step}, which cannot be repeated", why, fix)

    def _error(self, found: str, why: str, fix: list[str]) -> UserError:
        return UserError(found, where=self.memory, why=why, fix=fix, code=ExitCode.OUT_OF_MEMORY)


def smaller() -> list[str]:
    """The user's command with smaller images and with a smaller backbone, unless those of the command are small already."""
    typed = {key: value for key, _, value in (word.partition("=") for word in typed_words())}
    drawn = typed and typed.get("data", "digits") in ("digits", "synthetic")  # which are small already
    size, fixes = typed.get("data.image_size", "" if drawn else "224"), []
    if size.isdigit() and int(size) >= 64:
        fixes.append(corrected(f"data.image_size={int(size) // 2}"))
    if typed.get("model.backbone") != SMALLEST:
        fixes.append(corrected(f"model.backbone={SMALLEST}"))
    return fixes


def memory_state(device: torch.device) -> str:
    """How full the memory is, in words; for a CPU the available memory, on Linux."""
    if device.type == "cuda":
        unused, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"{device}: {allocated // MIB} MiB allocated and {reserved // MIB} MiB reserved by this process; "
            f"{(total - unused) // MIB} of {total // MIB} MiB in use by all"
        )
    if device.type == "mps":
        allocated, most = torch.mps.current_allocated_memory(), torch.mps.recommended_max_memory()
        return f"{device}: {allocated // MIB} MiB allocated, {most // MIB} MiB recommended at most"
    with suppress(OSError):  # not Linux
        return f"{device}: {available_ram() // MIB} MiB of memory available"
    return f"{device}"


def _first_line(error: BaseException) -> str:
    """The error's text without the advice that torch adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def part_sizes(total: int, most: int) -> list[int]:
    """The images in each part of a batch: at most `most`, as even as possible, the largest part first."""
    parts = -(-total // most)
    smallest, larger = divmod(total, parts)
    return [smallest + 1] * larger + [smallest] * (parts - larger)


@dataclass
class PartSize:
    """Images that a training step takes at a time: half after each failure, twice as many after `grow_after` clean steps. If
    a larger size fails, the next try waits twice as long."""

    grow_after: int
    size: int | None = None  # images at a time; None: the whole batch
    whole: int = 0  # the largest batch that did not fit
    clean: int = 0  # steps since the size changed
    grown: bool = False  # whether that change was an increase

    def shrink(self, failed: int) -> None:
        """After a failure with parts of `failed` images."""
        if self.grown:
            self.grow_after *= 2
        self.size, self.whole = (failed + 1) // 2, max(failed, self.whole)
        self.clean, self.grown = 0, False

    def grow(self) -> bool:
        """After a step that fitted; returns whether the next step takes more."""
        if self.size is None:
            return False
        self.clean += 1
        if self.clean < self.grow_after:
            return False
        self.size = 2 * self.size if 2 * self.size < self.whole else None
        self.clean, self.grown = 0, True
        return True


class InParts:
    """Calls forward with whole batches as long as they fit, then with ever smaller parts.

    forward: images (B, ...) -> (B, outputs), in eval mode, where an image's result does not depend on the others. A part
    size that fits is kept for later batches. Raises UserError if a single image does not fit.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward
        self.size: int | None = None  # images at a time; None: all of the batch

    def __call__(self, images: Tensor) -> Tensor:
        while True:
            sizes = part_sizes(len(images), self.size or len(images))
            outcome = self._attempt(images, sizes)
            if isinstance(outcome, Tensor):
                return outcome
            free()
            if sizes[0] == 1:
                raise outcome.with_one_image()
            self.size = (sizes[0] + 1) // 2
            log.warning(f"out of memory with {sizes[0]} images at a time: going on with {self.size}")

    def _attempt(self, images: Tensor, sizes: list[int]) -> Tensor | Exhausted:
        try:
            return torch.cat([self.forward(part) for part in images.split(sizes)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Exhausted.of(error, images.device)
