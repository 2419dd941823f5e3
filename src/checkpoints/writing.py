"""How Lightning's checkpoints reach the disk: whole or not at all, and read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from src.run_dir import write_atomically


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own writing goes through the temp folder, and a kill on another file system destroys the old file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(checkpoint, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU: tensors and plain values, never code."""
    return torch.load(path, map_location="cpu", weights_only=True)
