"""Which errors mean too little memory, what is said about them, and forward passes in parts."""

from __future__ import annotations

import gc
import shlex
import weakref

import pytest
import torch
from torch import Tensor, nn

from src.engine.memory.out_of_memory import (
    GPU_FAULT,
    Exhausted,
    InParts,
    PartSize,
    free,
    gpu_fault_explained,
    is_out_of_memory,
    memory_state,
    part_sizes,
    smaller,
)
from src.engine.runs.errors import ExitCode, UserError
from tests.conftest import parses

# As PyTorch, cuDNN, cuBLAS and the drivers print them.
TOO_LITTLE = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "CUDA error: out of memory",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB, max allowed: 6.00 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000000 bytes. Error code 12 (Cannot allocate memory)",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 40 bytes.",
]
FAULTS = [
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: misaligned address",
    "CUDA error: unspecified launch failure",
]
OTHERS = [
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
]


@pytest.mark.parametrize("message", TOO_LITTLE + FAULTS + OTHERS)
def test_errors_are_told_apart_by_their_messages(message):
    error = RuntimeError(message)
    assert is_out_of_memory(error) == (message in TOO_LITTLE)
    assert any(text in message for text in GPU_FAULT) == (message in FAULTS)


def test_errors_are_told_apart_by_their_types():
    assert is_out_of_memory(torch.OutOfMemoryError("whatever it says"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory of what I said"))
    assert not is_out_of_memory(UserError("out of memory"))
    assert not is_out_of_memory(RuntimeError("device-side assert: out of memory"))


def test_a_real_error_of_the_cpu():
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert is_out_of_memory(error.value)


def test_a_fault_of_the_gpu_is_explained():
    error = gpu_fault_explained(RuntimeError(FAULTS[0]))
    assert error.code == ExitCode.GPU_FAULT
    text = error.render()
    assert "CUDA error: device-side assert triggered  (exit code 72)" in text
    for part in ("0..num_classes-1", "trainer.accelerator=cpu", "CUDA_LAUNCH_BLOCKING=1 python -m src.train"):
        assert part in text


def test_free_finds_what_refers_to_itself():
    ring: list[object] = [nn.Linear(1, 1)]
    layer = weakref.ref(ring[0])
    ring.append(ring)
    gc.disable()
    del ring
    assert layer() is not None
    free()
    gc.enable()
    assert layer() is None


def test_the_memory_in_words():
    text = memory_state(torch.device("cpu"))
    assert text.startswith("cpu")
    if "available" in text:  # Linux
        assert int(text.split()[1]) > 0


def test_advice_for_a_gpu_names_what_a_cpu_does_not_have():
    def advice(kind: str) -> str:
        return Exhausted("CUDA out of memory", "full", torch.device(kind)).with_one_image().render()

    for part in ("precision=bf16", "nvidia-smi"):
        assert part in advice("cuda")
        assert part not in advice("cpu")
    for part in ("CUDA out of memory", "full", "data.image_size=", "model.backbone=", "exit code 71"):
        assert part in advice("cuda")


def test_every_command_that_is_suggested_exists():
    failure = Exhausted("CUDA out of memory", "full", torch.device("cuda"))
    errors = [failure.with_one_image(), failure.told_to_stop(1, 16, 2), failure.in_optimizer(1)]
    commands = [fix for error in [*errors, gpu_fault_explained(RuntimeError(FAULTS[0]))] for fix in error.fix]
    assert "python -m src.train data.batch_size=16" in commands
    for command in commands:
        words = shlex.split(command.partition("python -m src.train")[2], comments=True)
        assert parses(words), command


@pytest.mark.parametrize(
    ("total", "most", "sizes"),
    [(16, 16, [16]), (6, 16, [6]), (16, 8, [8, 8]), (9, 4, [3, 3, 3]), (7, 4, [4, 3]), (3, 1, [1, 1, 1])],
)
def test_the_sizes_of_parts(total, most, sizes):
    assert part_sizes(total, most) == sizes


def steps(part: PartSize, number: int) -> list[int]:
    """The steps, of so many that fit, after which the size changed."""
    return [step for step in range(1, number + 1) if part.grow()]


def test_parts_are_halved_and_doubled():
    part = PartSize(grow_after=3)
    assert (steps(part, 10), part.size) == ([], None)
    part.shrink(16)
    part.shrink(8)
    assert part.size == 4
    assert (steps(part, 3), part.size) == ([3], 8)
    assert (steps(part, 3), part.size) == ([3], None)
    assert steps(part, 10) == []
    part.shrink(9)
    assert part.size == 5


def test_each_try_that_fails_doubles_the_wait():
    part = PartSize(grow_after=2)
    part.shrink(16)  # the first failure: nothing was tried
    for wait in (2, 4, 8):
        assert steps(part, wait) == [wait]
        part.shrink(16)
        part.shrink(8)  # in the same step, and of the same try
        part.size = 8
    assert part.grow_after == 16


class Head(nn.Module):
    """Forward passes of at most `limit` images."""

    def __init__(self, limit: int, error: Exception) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.limit, self.error = nn.Linear(3, 2), limit, error
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise self.error
        return self.linear(images)


def test_forward_passes_in_parts(caplog):
    head = Head(3, torch.OutOfMemoryError("CUDA out of memory"))
    images = torch.rand(10, 3)
    in_parts = InParts(head)
    torch.testing.assert_close(in_parts(images), head.linear(images))
    assert head.sizes == [10, 5, 3, 3, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 10 images at a time: going on with 5",
        "out of memory with 5 images at a time: going on with 3",
    ]
    head.sizes.clear()
    torch.testing.assert_close(in_parts(images[:7]), head.linear(images[:7]))
    assert head.sizes == [3, 2, 2], "the size that fitted is not kept"


def test_what_a_failed_attempt_held_is_freed_before_the_next():
    alive: list[bool] = []
    activations: list[weakref.ref[Tensor]] = []

    def forward(images: Tensor) -> Tensor:
        alive.extend(activation() is not None for activation in activations)
        activation = images * 2
        activations.append(weakref.ref(activation))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return activation

    gc.disable()
    InParts(forward)(torch.rand(2 + 1, 3))
    gc.enable()
    assert alive[0] is False


def test_a_image_that_does_not_fit():
    with pytest.raises(UserError) as error:
        InParts(Head(0, MemoryError()))(torch.rand(3, 3))
    assert error.value.code == ExitCode.OUT_OF_MEMORY


def test_other_errors_pass_through():
    head = Head(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        InParts(head)(torch.rand(3, 3))
    assert head.sizes == [3]


@pytest.mark.parametrize(
    ("words", "fixes"),
    [
        ("data=image_folder", ["data.image_size=112", "model.backbone=shufflenet_v2_x0_5"]),
        ("data.image_size=32 model.backbone=resnet50", ["model.backbone=shufflenet_v2_x0_5"]),
        ("data.image_size=448 model.backbone=shufflenet_v2_x0_5", ["data.image_size=224"]),
        ("data.image_size=32 model.backbone=shufflenet_v2_x0_5", []),
        ("data=digits", ["model.backbone=shufflenet_v2_x0_5"]),  # whose images are small
    ],
)
def test_what_is_suggested_is_smaller_than_what_was_used(monkeypatch, words, fixes):
    monkeypatch.setenv("TRAIN_COMMAND", f"python -m src.train {words}")
    assert len(smaller()) == len(fixes)
    assert all(fix in words for fix, words in zip(fixes, map(str.split, smaller()), strict=True))
