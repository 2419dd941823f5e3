"""The peers: what they need, and the command that trains with them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.peers.programs.job import BATCH, SEED, WEIGHT_DECAY, Job

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Peer:
    title: str
    libraries: tuple[str, ...] = ()  # beside torch and torchvision; the first one's version is shown
    requirements: tuple[str, ...] = ()  # of pip, where this project does not bring the libraries
    note: str = ""  # where it cannot do the same as the others


PEERS = {
    "ideal": Peer("the ideal: features or decoded images once, a tensor loop", note="no evaluation, no logs"),
    "project": Peer("this project", note="with its checks, baseline and report"),
    "hand_written": Peer("hand-written PyTorch loop"),
    "lightning_docs": Peer("Lightning, as in its docs", ("lightning",)),
    "timm_factories": Peer("timm's factories, a loop", ("timm",), ("timm",), "drops the last short batch"),
    "hugging_face": Peer(
        "Hugging Face Trainer",
        ("transformers", "accelerate"),
        ("transformers", "accelerate"),
        "trains in its own order",
    ),
    "fastai_learner": Peer("fastai's Learner", ("fastai",), ("fastai",), "crops training images at a random place"),
}


@dataclass(frozen=True)
class Run:
    """One training: what it is given, and where it leaves its model."""

    peer: str
    job: Job
    data: Path  # with train/CLASS/ and val/CLASS/
    weights: Path
    folder: Path  # new for each run

    def command(self, python: str) -> list[str]:
        if self.peer == "project":
            return [python, "-m", "src.train", *self._words()]
        words = (self.data, self.weights, self.model_file, self.job.name)
        return [python, str(PROGRAMS / f"{self.peer}.py"), *map(str, words)]

    @property
    def model_file(self) -> Path:
        return self.folder / ("run/model/model.safetensors" if self.peer == "project" else "model.pt")

    def _words(self) -> list[str]:
        """The project's settings that differ from its defaults, so that it trains as the others do."""
        return [
            "data=image_folder",
            f"data.root={self.data}",
            f"data.image_size={self.job.size}",
            "data.crop_ratio=1.0",
            "data.augment=none",
            f"data.batch_size={BATCH}",
            "data.num_workers=1",
            "model.backbone=resnet18",
            f"model.weights={self.weights}",
            "model.label_smoothing=0",
            f"freeze.preset={'head_only' if self.job.head_only else 'full'}",
            f"optimizer.lr={self.job.lr}",
            "optimizer.backbone_lr_scale=1",
            f"optimizer.weight_decay={WEIGHT_DECAY}",
            "optimizer.schedule=constant",
            "optimizer.warmup_fraction=0",
            "checkpoint.select=last",
            f"trainer.max_epochs={self.job.epochs}",
            "trainer.accelerator=cpu",
            f"seed={SEED}",
            f"runs_dir={self.folder}",
            "name=run",
        ]


def environment(threads: int) -> dict[str, str]:
    """No GPU, nothing from a hub, and the same number of threads for all."""
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def find_python(peer: str, chosen: str | None, venvs: Path | None) -> tuple[str, str]:
    """The Python that runs a peer, and its library's name and version. Raises LookupError with the reason if there is none.

    chosen: the user's choice; None: this Python. venvs: where a venv may be made for what is missing; None: nowhere.
    """
    python = chosen or sys.executable
    try:
        return python, _version(peer, python)
    except LookupError:
        if chosen or venvs is None or not PEERS[peer].requirements:
            raise
    python = _install(peer, venvs / peer)
    return python, _version(peer, python)


def _version(peer: str, python: str) -> str:
    libraries = PEERS[peer].libraries or ("torch",)
    code = f"import {', '.join(libraries)}; print({libraries[0]}.__version__)"
    try:
        done = subprocess.run([python, "-c", code], env=environment(1), capture_output=True, text=True)
    except OSError as error:
        raise LookupError(str(error)) from None
    if done.returncode:
        raise LookupError(last_line(done.stderr))
    return f"{libraries[0]} {done.stdout.split()[-1]}"


def _install(peer: str, venv: Path) -> str:
    """The Python of a new venv that has the peer's requirements, and sees this Python's packages: torch is large."""
    python = str(venv / "bin/python")
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    existing = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    print(f"{peer}: pip install {' '.join(PEERS[peer].requirements)}", flush=True)
    try:
        _call(sys.executable, "-m", "venv", str(venv))
        Path(_call(python, "-c", purelib), "existing.pth").write_text("\n".join(existing), encoding="utf-8")
        _call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS[peer].requirements)
    except subprocess.CalledProcessError as error:
        raise LookupError(f"not installed: {last_line(error.stderr or error.stdout)}") from None
    return python


def _call(*command: str) -> str:
    """Its output. Raises CalledProcessError."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
