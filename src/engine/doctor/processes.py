"""Devices and processes: what src/engine/doctor/probe.py finds, in as many processes as the run would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from src.engine import features
from src.engine.commands.schema import Config
from src.engine.commands.user_command import corrected, shell_command
from src.engine.doctor.findings import Findings
from src.engine.memory.gpus import most_gpus
from src.engine.processes.launching import meeting_point
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.text import plural

GB = 10**9
SECONDS, SECONDS_EACH = 60.0, 10.0  # for importing torch, finding the devices and a round trip; more for each process
ADVICE = "https://pytorch.org/get-started/locally"


def check_processes(findings: Findings, config: Config) -> None:
    devices = config.trainer.devices
    count = max(2, len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 2)
    facts, errors = _probe(count, config.trainer.accelerator)
    if not facts:
        findings.fail("torch", _no_torch(errors))
        return
    _devices(findings, facts[0])
    needed = features.process_per_device(config.strategy.name)
    if len(facts) > 1:
        trip = facts[1]
        findings.ok("processes", f"{count} reach each other ({trip['backend']}, {trip['milliseconds']:.1f} ms)")
    elif needed:
        findings.fail("processes", _not_met(count, errors))
    else:
        findings.warn("processes", f"strategy=ddp would not work here: {_not_met(count, errors).why}")


def _probe(count: int, accelerator: str) -> tuple[list[dict[str, Any]], str]:
    """What rank 0 printed, a dictionary for each line, and the last line of an error, if any."""
    seconds = SECONDS + SECONDS_EACH * count
    deadline, printed, errors = time.monotonic() + seconds, "", ""
    with tempfile.TemporaryDirectory(prefix="ranks-") as private:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "src.engine.doctor.probe", str(rank), str(count), accelerator, str(seconds / 2)],
                env={**os.environ, **meeting_point(Path(private))},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for rank in range(count)
        ]
        try:
            for process in processes:
                output, said = _end(process, deadline)
                printed = printed or output
                if process.returncode:
                    hangs = process.returncode < 0 and time.monotonic() > deadline
                    errors = f"no answer within {seconds:g} seconds" if hangs else said
                    break  # the others would wait for it
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")], errors


def _end(process: subprocess.Popen[str], deadline: float) -> tuple[str, str]:
    """What it has printed when it ends, at the deadline at the latest, and the last line of its error."""
    try:
        output, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        output, said = process.communicate()
    return output, (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def _devices(findings: Findings, facts: dict[str, Any]) -> None:
    build = f"CUDA {facts['cuda_build']}" if facts["cuda_build"] else "no CUDA"
    in_dev = most_gpus()
    if in_dev and not facts["gpus"] and not facts["cuda_build"]:
        text = f"torch {facts['torch']} is a build without CUDA, and this machine has a GPU"
        findings.warn("GPU", text, f"pip install --force-reinstall torch torchvision  # for CUDA: {ADVICE}")
    elif in_dev and not facts["gpus"]:
        driver = facts["driver"] or "does not answer"
        text = f"torch {facts['torch']} ({build}) finds no GPU, though there is one; the driver: {driver}"
        findings.warn("GPU", text, f"nvidia-smi  # newer than the driver? another build: {ADVICE}")
    for number, gpu in enumerate(facts["gpus"]):
        text = f"cuda:{number}, {gpu['name']}, {gpu['free'] / GB:.1f} of {gpu['total'] / GB:.1f} GB free"
        text += f"; torch is built for {build}, the driver is {facts['driver']}" if number == 0 else ""
        if gpu["free"] < 0.5 * gpu["total"]:
            findings.warn("GPU", f"{text}: other programs use it", "nvidia-smi")
        else:
            findings.ok("GPU", text)
    threads = plural(facts["threads"], "thread") + (" (OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else "")
    bf16 = "bf16 native" if facts["bf16"] else "bf16 emulated, and refused"
    found = "" if facts["gpus"] else "an Apple GPU; " if facts["mps"] else "no GPU; "
    findings.ok("devices", f"{found}CPU: {threads}, {bf16}")


def _no_torch(errors: str) -> UserError:
    """Where torch or torchvision cannot be imported."""
    fix = [f"pip install --force-reinstall torch torchvision  # both from one place: {ADVICE}"]
    why = "it cannot be imported"
    if "torchvision::nms" in errors:
        why = "torchvision is built for another torch, such as one for GPUs beside a torch for CPUs"
    return UserError(f"torch or torchvision is broken: {errors}", why=why, fix=fix, code=ExitCode.BUG)


def _not_met(count: int, errors: str) -> UserError:
    return UserError(
        f"{count} processes do not reach each other",
        why=errors or "no answer",
        fix=[corrected("strategy=single", "trainer.devices=1"), f"GLOO_SOCKET_IFNAME=lo {shell_command()}"],
        code=ExitCode.PROCESS_LOST,
    )
