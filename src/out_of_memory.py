"""Running out of memory: how it is recognised, what can be freed, what is said, and forward passes in parts.

src/callbacks/out_of_memory.py repeats a training step in parts; `InParts` is for validation, evaluate and predict.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import ExitCode, UserError
from src.memory import MIB
from src.ram import available_ram
from src.user_command import corrected, typed_words

log = logging.getLogger(__name__)

SMALLEST = "shufflenet_v2_x0_5"  # of the backbones

# What a RuntimeError says where its type does not tell. cuBLAS and cuDNN fail to start when there is no room for what they
# work in, and cuDNN finds no algorithm that is small enough.
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
# After these the process cannot use its GPU any more.
GPU_FAULT = ("device-side assert", "illegal memory access", "misaligned address", "unspecified launch failure")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of a GPU or of the machine, so that less of the same may work.

    Knows more than Lightning's own test: cuBLAS, cuDNN's start, MPS and Python's MemoryError (numpy raises it). Not meant
    is a lack of memory in an exchange between processes, which none of them can repeat alone.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return _says(error, _OUT_OF_MEMORY) and not _says(error, (*GPU_FAULT, "NCCL"))


def is_gpu_fault(error: BaseException) -> bool:
    """Whether a GPU stopped in a way after which nothing can be repeated in this process."""
    return _says(error, GPU_FAULT)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def gpu_fault_explained(error: BaseException) -> UserError:
    """What a user reads after a fault of the GPU."""
    return UserError(
        f"the GPU stopped while it computed: {_first_line(error)}",
        why="usually a label that is not in 0..num_classes-1; a GPU reports it late and not where it happened",
        fix=[
            corrected("trainer.accelerator=cpu") + "  # a CPU names the place",
            f"CUDA_LAUNCH_BLOCKING=1 {corrected()}  # if it works on a CPU: slow, but names the place",
        ],
        code=ExitCode.GPU_FAULT,
    )


@contextmanager
def gpu_faults_explained() -> Iterator[None]:
    """Inside, a fault of the GPU becomes the UserError that explains it. Lightning's fit as a whole belongs inside: a GPU
    that has failed fails again when Lightning tidies up, and only that error comes out."""
    try:
        yield
    except RuntimeError as error:
        if is_gpu_fault(error):
            raise gpu_fault_explained(error) from error
        raise


def free() -> None:
    """Gives memory that nothing refers to back to the device. Call it after leaving the except block: inside, the
    traceback still refers to the tensors of the step that failed."""
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
        """What a user reads when the batch cannot be divided any further."""
        others = [corrected("precision=bf16") + "  # or fp16", "nvidia-smi  # other processes on the GPU"]
        return UserError(
            "out of memory with a single image at a time",
            where=self.memory,
            why=self.message,
            fix=[
                *smaller(),
                *(others if self.device.type == "cuda" else []),
            ],
            code=ExitCode.OUT_OF_MEMORY,
        )

    def told_to_stop(self, step: int, images: int, processes: int) -> UserError:
        """What a user reads at the first failure where nothing is repeated (oom.policy=stop)."""
        return UserError(
            f"out of memory in step {step} with {images} images at a time",
            where=self.memory,
            why=f"oom.policy=stop looks for no size that fits; {self.message}",
            fix=[
                corrected("oom.policy=split"),
                corrected(f"data.batch_size={max(1, images * processes // 2)}"),
            ],
            code=ExitCode.OUT_OF_MEMORY,
        )

    def in_optimizer(self, step: int) -> UserError:
        """What a user reads when the gradients fitted, but not what the optimizer makes of them."""
        return UserError(
            f"out of memory in the optimizer, in step {step}, which cannot be repeated",
            where=self.memory,
            why="some weights may have moved already, and fewer images at a time would not help: AdamW keeps two "
            f"numbers for every weight that is trained; {self.message}",
            fix=[
                corrected("optimizer=sgd"),
                corrected("freeze.preset=head_only", remove=["freeze.phases"]) + "  # or a smaller freeze.last_n",
                *smaller()[-1:],
            ],
            code=ExitCode.OUT_OF_MEMORY,
        )


def smaller() -> list[str]:
    """The user's command with smaller images and with a smaller backbone, where those of the command are not small already."""
    typed = dict(word.partition("=")[::2] for word in typed_words())
    drawn = typed and typed.get("data", "digits") in ("digits", "synthetic")  # which are small already
    size, fixes = typed.get("data.image_size", "" if drawn else "224"), []
    if size.isdigit() and int(size) >= 64:
        fixes.append(corrected(f"data.image_size={int(size) // 2}"))
    if typed.get("model.backbone") != SMALLEST:
        fixes.append(corrected(f"model.backbone={SMALLEST}"))
    return fixes


def memory_state(device: torch.device) -> str:
    """How full the memory is, in words; of a CPU what is available, where that can be known."""
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
    """What the error says, without the advice that torch adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def part_sizes(total: int, most: int) -> list[int]:
    """How many images each part of a batch has: at most `most`, as alike as possible, the largest first."""
    parts = -(-total // most)
    smallest, larger = divmod(total, parts)
    return [smallest + 1] * larger + [smallest] * (parts - larger)


@dataclass
class PartSize:
    """How many images a training step takes at a time: fewer after each failure, more after many clean steps.

    grow_after: clean steps after which parts twice as large are tried. If they fail, the next try waits twice as long.
    """

    grow_after: int
    size: int | None = None  # images at a time; None: the whole batch
    whole: int = 0  # the largest batch that did not fit
    clean: int = 0  # steps since the size was changed
    grown: bool = False  # whether that change made it larger

    def shrink(self, failed: int) -> None:
        """After a failure with parts of `failed` images."""
        if self.grown:
            self.grow_after *= 2
        self.size, self.whole = (failed + 1) // 2, max(failed, self.whole)
        self.clean, self.grown = 0, False

    def grow(self) -> bool:
        """After a step that fitted; whether the next one shall take more."""
        if self.size is None:
            return False
        self.clean += 1
        if self.clean < self.grow_after:
            return False
        self.size = 2 * self.size if 2 * self.size < self.whole else None
        self.clean, self.grown = 0, True
        return True


class InParts:
    """Calls forward with whole batches as long as they fit, then with fewer and fewer images at a time.

    forward: images (B, ...) -> (B, outputs), in eval mode, where an image's result does not depend on the others. The
    size that fitted is kept for the batches to come. Raises UserError if a single image does not fit.
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
