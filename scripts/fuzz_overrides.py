"""Composes random settings, sensible and absurd, and trains some: each must be accepted or refused with a message.

    python scripts/fuzz_overrides.py [--count 500] [--run 50] [--seed 0]

count: combinations to compose and check; run: how many of the accepted ones are trained, with tiny settings. Exits with 1
on an exception other than UserError, exit code 1 or 70, a traceback, or a run longer than 3 minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src import rules  # noqa: F401 (registers the settings)
from src.engine import features
from src.engine.commands import config_checks, word_checks
from src.engine.commands.command_line import translate
from src.engine.commands.hydra_words import for_hydra
from src.engine.commands.schema import KNOBS
from src.engine.runs import seeding
from src.engine.runs.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    *("data=synthetic", "debug=true", "data.num_images=40", "data.batch_size=8", "data.image_size=32"),
    *(
        "model.weights=none",
        "model.backbone=shufflenet_v2_x0_5",
        "trainer.threads=1",
        "logger=csv",
        "data.num_workers=0",
    ),
)
# Not varied: paths, and settings that take long or need several machines.
FIXED = {word.partition("=")[0] for word in TINY} | {"name", "runs_dir", "trainer.num_nodes", "trainer.max_time"}
SECONDS = 180
ABSURD = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e18",
    "1e400",
    "abc",
    "null",
    "[]",
    "{}",
    "true",
    "''",
    "[1,2]",
    "1.5",
    "9" * 40,
)
USUAL = {"int": ("1", "2", "3"), "float": ("0.1", "0.5", "1.0"), "bool": ("true", "false"), "str": ("null",)}


def knobs() -> dict[str, tuple[str, ...]]:
    """Sensible values of each setting, by its key."""
    found = {}
    for key, knob in KNOBS.items():
        kind = str(knob.type).partition(" ")[0]
        if key not in FIXED and (kind in USUAL or "options" in knob.metadata):
            found[key] = knob.metadata.get("options", USUAL.get(kind))
    return found


def words(generator: torch.Generator) -> list[str]:
    """One to four random settings, one of three of them absurd."""

    def pick(values: tuple[str, ...]) -> str:
        return values[int(torch.randint(len(values), (), generator=generator))]

    known = knobs()
    keys = {pick(tuple(known)) for _ in range(int(torch.randint(1, 5, (), generator=generator)))}
    return [f"{key}={pick(ABSURD if pick(('yes', 'no', 'no')) == 'yes' else known[key])}" for key in sorted(keys)]


def check(typed: list[str]) -> str:
    """ "taken", "refused", or the exception that a user would see as a crash."""
    try:
        word_checks.check_words(typed)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("train", overrides=for_hydra([*TINY, *typed], multirun=False))
        config_checks.read(composed)
        return "taken"
    except UserError as error:
        return "refused" if len(error.render().splitlines()) <= 15 else f"a long message: {error}"
    except (HydraException, OmegaConfBaseException) as error:
        translate(error)
        return "refused"
    except Exception as error:  # the defect that fuzzing looks for
        return f"{type(error).__name__}: {error}"


def train(typed: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", "src.train", *TINY, *typed, f"runs_dir={folder}/runs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    crashed = done.returncode in (1, 70) or done.returncode < 0 or "Traceback" in done.stdout + done.stderr
    return f"exit code {done.returncode}: {done.stderr[:500]}" if crashed else f"exit code {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--run", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    features.register()
    OmegaConf.register_new_resolver("sweep_name", lambda name: name or "sweep", replace=True)
    generator, seen, taken = seeding.generator(options.seed, "fuzz"), Counter[str](), []
    crashes, start = [], time.monotonic()
    for _ in range(options.count):
        typed = words(generator)
        result = check(typed)
        seen[result if result in ("taken", "refused") else "crash"] += 1
        crashes += [f"{' '.join(typed)}: {result}"] if result not in ("taken", "refused") else []
        taken += [typed] if result == "taken" else []
    print(f"composed  {dict(seen)} in {time.monotonic() - start:.0f} s")
    ended = Counter[str]()
    for typed in taken[: options.run]:
        with tempfile.TemporaryDirectory() as folder:
            result = train(typed, Path(folder))
        ended[result.partition(":")[0]] += 1
        if ":" in result or result.startswith("no end"):
            crashes.append(f"{' '.join(typed)}: {result}")
    print(f"trained   {dict(ended)}")
    print("\n".join(crashes) or "no crash")
    return int(bool(crashes))


if __name__ == "__main__":
    sys.exit(main())
