"""data.batch_size=auto: finds the largest batch that fits, by running real training steps before the run begins.

run.py calls `settle_batch_size`. The steps are done on copies, so that afterwards nothing
is different: not the weights, not the BatchNorm statistics, not the random state. How one size follows from another is
in src/engine/batch_size/batch_size_search.py, how memory is read in src/engine/memory/memory.py.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from dataclasses import replace

import torch

from src.engine.batch_size.batch_size_search import (
    Measured,
    chosen_batch_size,
    largest_fitting,
    remember,
    search,
    smallest_as_fast,
)
from src.engine.commands.user_command import corrected
from src.engine.memory.memory import MIB, DeviceMemory, make_states
from src.engine.memory.out_of_memory import free, is_out_of_memory, smaller
from src.engine.runs import seeding
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.job import Job
from src.engine.runs.task import RunTask
from src.engine.steps.precision import autocast

log = logging.getLogger(__name__)

MARGIN = 0.9  # share of the memory that may be used; the rest is for fragments, loader processes and other programs
STEPS_PER_EPOCH = 10  # at least: with fewer and larger ones, too few are left to learn by
TIMED_STEPS, TIMED_SECONDS = 3, 2.0  # after a first one; whichever is reached first ends the timing of a size


def settle_batch_size(job: Job, task: RunTask) -> Job:
    """The job with a number in the place of data.batch_size=auto: the one chosen when the run began, or found now."""
    if job.config.data.batch_size != "auto":
        return job
    size = job.ranks.told_by_first(lambda: chosen_batch_size(job.folder.path) or find_batch_size(job, task))
    return replace(job, config=replace(job.config, data=replace(job.config.data, batch_size=size)))


def find_batch_size(job: Job, task: RunTask) -> int:
    """The batch size over all devices. Prints what was tried, and keeps it in batch_size.json of the run's folder.

    It is the largest whose steps stay within 90 % of the memory that others leave, in the phase of the FreezePlan that
    trains most, and that leaves an epoch 10 steps. Each device takes an equal share of a batch; one is measured. Raises
    UserError if not even one image fits, or where memory cannot be measured.
    """
    memory, num_images = memory_of(job.device), len(task.images.splits["train"])

    def measure(size: int) -> Measured | None:
        measured = None
        try:
            measured = measure_steps(job, task, memory, size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free()  # not in the except block, where the traceback still holds the tensors
        return measured

    log.info(f"data.batch_size=auto looks for the largest batch that fits in {memory.name}")
    measure(2)  # libraries load and set up what they need: that must not pass for memory or time of the first images
    usable_mib = memory.usable() // MIB
    allowed_mib = int(MARGIN * usable_mib)
    largest = max(2, num_images // STEPS_PER_EPOCH // job.num_devices)
    attempts = search(measure, allowed_mib, largest, extrapolate=job.device.type == "cpu")
    memory.reset_peak()  # the peak that the run reports at its end shall be its own
    best = largest_fitting(attempts)
    if best is None:
        where = f"{memory.name}: {usable_mib} MiB are not used by other programs, {allowed_mib} of them are allowed"
        raise _nothing_fits(attempts[-1].peak_mib, where)
    batch_size = best.batch_size * job.num_devices
    remember(job.folder.path, batch_size, attempts)

    why = f"the largest that fits in {MARGIN * 100:.0f} % of {usable_mib} MiB"
    if all(attempt.fits for attempt in attempts):
        why = f"a tenth of {num_images} training images: an epoch keeps {STEPS_PER_EPOCH} steps; more would fit"
    share = f", {best.batch_size} on each device" if job.num_devices > 1 else ""
    log.info(f"data.batch_size=auto: {batch_size}{share} ({why})")
    log.info(f"optimizer.lr={job.config.optimizer.lr:g} stays as it is; a larger batch usually wants a larger one")
    if (enough := smallest_as_fast(attempts)) < best.batch_size:
        log.info(f"{enough} images at a time are about as fast")
    return batch_size


def measure_steps(job: Job, task: RunTask, memory: DeviceMemory, size: int) -> Measured:
    """A few training steps of `size` random images, as the run will do them, on copies of network and loss."""
    config, device, precision = job.config, job.device, job.config.precision.name
    network = copy.deepcopy(task.network).to(device)
    task.freezing.apply_last(network)
    loss = task.loss(config).to(device).train()
    optimizer = task.optimizer(config, network)
    # Scaling starts at 1, not at 65536: a first step that overflows would be passed over, and its memory not be seen.
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=precision == "fp16")
    shape = (size, 3, task.preprocessing.image_size, task.preprocessing.image_size)
    images = torch.randint(256, shape, generator=seeding.generator("batch size"), dtype=torch.uint8).to(device)
    labels = task.images.targets([0] * size).to(device)
    make_states(optimizer)  # a run holds them from its second step on
    memory.reset_peak()
    fixed = memory.held()

    def step() -> float:
        """One step; its seconds."""
        start = time.perf_counter()
        with autocast(precision, device):
            value = loss(network(images), labels)
        optimizer.zero_grad()  # after the forward pass, as in Lightning's loop: it holds the gradients of the last step
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        seconds = [step()]
        while len(seconds) <= TIMED_STEPS and sum(seconds) < TIMED_SECONDS:
            seconds.append(step())
    warm = seconds[1:] or seconds  # a step of seconds is not slower for being the first
    return Measured(fixed // MIB, memory.peak() // MIB, size / statistics.median(warm))


def memory_of(device: torch.device) -> DeviceMemory:
    """The memory of a device whose peak counts from here. Raises UserError on an Apple GPU, and on a CPU without /proc."""
    memory = DeviceMemory(device)
    try:
        memory.reset_peak()
    except OSError as error:
        raise UserError(
            f"data.batch_size=auto needs to measure memory, which is not possible on this {device.type}",
            why="it can be measured on CUDA GPUs, and on CPUs under Linux, where /proc/self/clear_refs can be written",
            fix=corrected("data.batch_size=32"),
            code=ExitCode.UNAVAILABLE,
        ) from error
    return memory


def _nothing_fits(peak_mib: int | None, where: str) -> UserError:
    """The error where a single image is too much. peak_mib: what it needs, None where memory ran out before."""
    needs = "a step with it runs out of memory" if peak_mib is None else f"a step with it needs about {peak_mib} MiB"
    return UserError(
        f"data.batch_size=auto: not even one image fits; {needs}",
        where=where,
        why="the network with its gradients and optimizer states, or the activations of one image, are too large",
        fix=[
            *smaller(),
            corrected("freeze.preset=head_only", remove=["freeze.phases"]),
        ],
        code=ExitCode.OUT_OF_MEMORY,
    )
