"""Proof that a change of the code changes no result: small real runs, whose weights and metrics are compared to the bit.

    python scripts/reference_runs.py record before.json                  # on the old commit, or with --tree OLD_CHECKOUT
    python scripts/reference_runs.py compare before.json                 # on the new one; exit code 1 on a difference
    python scripts/reference_runs.py compare before.json --only ddp      # one run; --only may be repeated

A record holds for each run the SHA-256 of every tensor in model/model.safetensors and the values of metrics.csv, without
the columns that a clock or the machine decides. The order of sums depends on the CPU and on the version of torch, so a
record is worth something on the machine that made it, and is not committed. All runs take about three minutes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EQUAL, NOT_COMPARED = "equal", "refused by both: nothing was compared"
OF_THE_MACHINE = ("images_per_second", "memory/")  # columns of metrics.csv that differ between equal runs

# Keys that have not been renamed, so that older commits take them. Nine steps: three epochs of three.
SMALL = [
    "data=synthetic",
    "data.batch_size=16",
    "data.num_workers=0",
    "model.backbone=shufflenet_v2_x0_5",
    "model.weights=none",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.max_epochs=3",
    "trainer.limit_batches=3",
    "checkpoint.select=last",
    "logger=csv",
]
DIGITS = [
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.limit_batches=3",
    "trainer.max_epochs=2",
    "logger=csv",
]
STAGES = [
    "data=synthetic",
    "data.batch_size=8",
    "data.num_workers=0",
    "model=model_parallel_resnet50",
    "model.weights=none",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.threads=2",
    "trainer.max_epochs=1",
    "trainer.limit_batches=3",
    "strategy.micro_batches=2",
    "freeze.preset=full",
    "freeze.batchnorm=keep",
    "logger=csv",
]
POSITIONS = ["checkpoint.every_n_steps=1", "checkpoint.background=false"]
TWO = ["trainer.devices=2", "trainer.threads=2"]
SWEEP = ["-m", "hydra/launcher=ray_tune", "optimizer.lr=1e-3,3e-3"]  # room: sweeps


Train = Callable[[list[str], Path, dict[str, str]], subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Reference:
    """Commands, one after another in one folder, and the run folders they leave. disturbed: what happens to the first."""

    commands: list[list[str]]
    runs: tuple[str, ...] = ("run",)
    disturbed: str | None = None


def reference(*words: str, runs: tuple[str, ...] = ("run",)) -> Reference:
    return Reference([[*words, "name=run"]], runs)


REFERENCES = {
    "single": reference(*SMALL),
    "pretrained": reference(*DIGITS),
    "gradual": reference(
        *SMALL, "freeze.preset=gradual", "freeze.unfreeze_epoch=0", "freeze.lr_decay=0.8", "optimizer.schedule=plateau"
    ),
    "head": reference(*SMALL, "freeze.preset=head_only", "model.head=mlp", "data.augment=strong", "data.num_workers=2"),
    "ema": reference(*SMALL, "checkpoint.select=ema", "optimizer=sgd", "trainer.gradient_clip=0.5"),
    "top_k": reference(*SMALL, "checkpoint.select=average_top_k", "freeze.preset=full", "data.class_weights=balanced"),
    "bf16": reference(*SMALL, "precision=bf16"),
    "parts": Reference([[*SMALL, "name=run"]], disturbed="out of memory"),
    "continued": Reference([[*SMALL, *POSITIONS, "name=run"]] * 2, disturbed="killed"),
    "dp": reference(*SMALL, *TWO, "strategy=dp"),  # room: dp
    "ddp": reference(*SMALL, *TWO, "strategy=ddp"),
    "model_parallel": reference(*STAGES, "strategy=model_parallel"),  # room: pipeline
    "pipeline": reference(*STAGES, "strategy=pipeline"),  # room: pipeline
    "sweep": reference(*SMALL, *SWEEP, runs=("run/0", "run/1")),  # room: sweeps
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON file: written by record, read by compare")
    parser.add_argument("--only", action="append", choices=REFERENCES, metavar="NAME", help=", ".join(REFERENCES))
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose src/ is run; default: this one")
    arguments = parser.parse_args()
    names = arguments.only or list(REFERENCES)
    before: dict[str, Any] = json.loads(arguments.file.read_text()) if arguments.file.exists() else {}
    if arguments.what == "compare":
        for key, value in versions().items():
            if before["versions"][key] != value:
                print(f"{key} is {value}; the record was made with {before['versions'][key]}: differences mean nothing")
    table, after = [], {}
    for name in names:
        print(f"{name} ...", end=" ", flush=True)
        began = time.monotonic()
        after[name] = run(REFERENCES[name], arguments.tree.resolve())
        said = f"{len(after[name]['weights'])} tensors, {len(after[name]['metrics'])} columns"
        if arguments.what == "compare":
            said = difference(before[name], after[name]) or (EQUAL if after[name]["weights"] else NOT_COMPARED)
        table.append((name, said, time.monotonic() - began))
        print(f"{said} ({table[-1][2]:.0f} s)", flush=True)
    print(f"\n{'run':<16}{'seconds':>8}  {arguments.what}")
    for name, said, seconds in table:
        print(f"{name:<16}{seconds:8.1f}  {said}")
    if arguments.what == "record":
        arguments.file.write_text(json.dumps(before | after | {"versions": versions()}, indent=1) + "\n")
        return 0
    return int(any(said not in (EQUAL, NOT_COMPARED) for _, said, _ in table))


def versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__, "CPU capability": torch.backends.cpu.get_cpu_capability()}


def train(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return _python(["-m", "src.train", *words], folder, environment)


def _python(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def run(reference: Reference, tree: Path, train: Train = train) -> dict[str, Any]:
    """Exit codes of the commands, hash of each tensor, values of each column of metrics.csv. train: how src.train is run."""
    found: dict[str, Any] = {"codes": [], "weights": {}, "metrics": {}}
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("TRAIN_COMMAND", None)
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        for index, words in enumerate(reference.commands):
            if reference.disturbed and index == 0:
                program = [str(Path(__file__).resolve()), "disturbed", reference.disturbed, *words]
                done = _python(program, Path(folder), environment)
            else:
                done = train(words, Path(folder), environment)
            found["codes"].append(done.returncode)
            if done.returncode not in (0, -9):
                print(f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
        for name in reference.runs:
            path = Path(folder, "runs", name)
            if (path / "model/model.safetensors").exists():
                found["weights"] |= {f"{name}: {key}": value for key, value in hashes(path).items()}
            if (path / "metrics.csv").exists():
                found["metrics"] |= {f"{name}: {key}": value for key, value in columns(path).items()}
    return found


def hashes(path: Path) -> dict[str, str]:
    from safetensors.numpy import load_file

    tensors = load_file(path / "model/model.safetensors")
    return {
        name: f"{hashlib.sha256(tensor.tobytes()).hexdigest()} {tensor.dtype} {tensor.shape}"
        for name, tensor in sorted(tensors.items())
    }


def columns(path: Path) -> dict[str, list[str]]:
    with (path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0] if not name.startswith(OF_THE_MACHINE)}


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What is not equal, in one line; empty where all is."""
    parts = []
    if before["codes"] != after["codes"]:
        parts.append(f"exit codes {before['codes']}, now {after['codes']}")
    for kind in ("weights", "metrics"):
        old, new = before[kind], after[kind]
        names = [name for name in [*old, *(new.keys() - old.keys())] if old.get(name) != new.get(name)]
        if names:
            example = "" if kind == "weights" else f" ({old.get(names[0])}, now {new.get(names[0])})"
            parts.append(f"{len(names)} of {len(old)} {kind} differ, first {names[0]}{example}")
    return "; ".join(parts)


def disturbed(kind: str, words: list[str]) -> None:
    """This process becomes `python -m src.train words...`, with memory for 6 images in training, or killed in the fifth
    step. Only torch's own classes are touched, so that it works with every commit."""
    import torch

    if kind == "out of memory":
        forward = torch.nn.Conv2d.forward

        def with_little_memory(self: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
            if len(images) > 6 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, images)

        torch.nn.Conv2d.forward = with_little_memory
    else:
        step, steps = torch.optim.AdamW.step, iter(range(1, 1000))

        def killed_in_the_fifth(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
            if next(steps) == 5:
                os.kill(os.getpid(), 9)
            return step(self, *arguments, **keywords)

        torch.optim.AdamW.step = killed_in_the_fifth
    sys.path[0] = str(Path.cwd())
    sys.argv = ["-m", *words]
    runpy._run_module_as_main("src.train")


if __name__ == "__main__":
    if sys.argv[1:2] == ["disturbed"]:
        disturbed(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
