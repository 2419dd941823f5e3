"""Damages checkpoints and model folders at random, and counts how readers react.

    python scripts/fuzz_checkpoints.py [--count 300] [--seed 0]

noticed: refused with a UserError. harmless: the same values are read. silent: wrong values are read without a message.
crash: any other exception. No damage of the first four kinds of file may be silent; weights files without a checksum (the
last two) may have silent bit flips, see docs/checkpoints.md. Exits with 1 on a crash or forbidden silence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.engine.runs import seeding
from src.engine.runs.checksum import save_with_checksum
from src.engine.runs.errors import ExitCode, UserError
from src.engine.runs.model_folder import ModelCard, load_model, save_model
from src.engine.runs.reading import FOREIGN, flaw, read_checkpoint
from src.engine.weights.preprocessing import Preprocessing
from src.engine.weights.weight_files import read_tensors
from src.models.building import rebuild
from src.models.network import Architecture, build_network

COLUMNS = ("noticed", "harmless", "silent", "crash")
STEPS = Preprocessing(32, 0.875, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
ARCHITECTURE = Architecture("shufflenet_v2_x0_5", "linear", 3)


def read_ours(path: Path) -> Any:
    if (what := flaw(path)) is not None:
        raise UserError(f"{path.name} {what}", why=FOREIGN, code=ExitCode.DAMAGED)
    return read_checkpoint(path)["state_dict"]


def read_folder(path: Path) -> Any:
    card, state = load_model(path.parent)
    rebuild(card, state, path.parent)
    return {"card": card, **state}


def files(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """An intact file of each kind with its reader."""
    state = {key: value.contiguous() for key, value in build_network(ARCHITECTURE, STEPS).state_dict().items()}
    card = ModelCard(
        ARCHITECTURE.to_dict(), STEPS, ("a", "b", "c"), "multiclass", (1, 2, 3), 10.0, True, "fp32", {"val/acc": 0.5}
    )
    for name in ("one", "other"):
        save_model(folder / name, state, card)
    with (folder / "best.ckpt").open("wb") as file:
        save_with_checksum({"epoch": 1, "global_step": 5, "state_dict": state}, file)
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "alone.safetensors")
    return {
        "checkpoint": (folder / "best.ckpt", read_ours),
        "model.json": (folder / "one" / "model.json", read_folder),
        "model.safetensors": (folder / "other" / "model.safetensors", read_folder),
        "weights of torch.save": (folder / "zip.pth", read_tensors),
        "weights, legacy": (folder / "legacy.pth", read_tensors),
        "weights, safetensors": (folder / "alone.safetensors", read_tensors),
    }


def damaged(content: bytes, generator: torch.Generator) -> bytes:
    """A bit flipped (8 of 10 times), the end cut off, or up to 64 bytes zeroed."""
    kind, place, bit = (int(torch.randint(high, (), generator=generator)) for high in (10, len(content), 8))
    if kind == 8:
        return content[:place]
    if kind == 9:
        return content[:place] + b"\0" * min(64, len(content) - place) + content[place + 64 :]
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def fuzz(path: Path, read: Callable[[Path], Any], count: int, generator: torch.Generator) -> Counter[str]:
    content, whole, seen = path.read_bytes(), read(path), Counter[str]()
    whole = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in whole.items()}
    for _ in range(count):
        broken = damaged(content, generator)
        path.unlink()  # a file that is mapped into memory keeps its bytes
        path.write_bytes(broken)
        try:
            seen["harmless" if same(read(path), whole) else "silent"] += 1
        except UserError as error:
            seen["noticed" if len(error.render().splitlines()) <= 15 else "crash"] += 1
        except Exception as error:  # the defect that fuzzing looks for
            print(f"{path.name}: {type(error).__name__}: {error}")
            seen["crash"] += 1
    path.write_bytes(content)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="damaged copies of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator, failed = seeding.generator(options.seed, "fuzz"), False
    print(f"{'':24}" + "".join(f"{column:>10}" for column in COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, read) in files(Path(folder)).items():
            seen = fuzz(path, read, options.count, generator)
            print(f"{name:24}" + "".join(f"{seen[column]:10}" for column in COLUMNS))
            failed |= seen["crash"] > 0 or (
                seen["silent"] > 0 and name not in ("weights, legacy", "weights, safetensors")
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
