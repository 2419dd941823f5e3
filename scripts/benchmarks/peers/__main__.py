"""This project beside its alternatives, on two jobs: seconds, memory and accuracy of whole commands, from start to end.

    python scripts/benchmarks/peers                                             what is installed; others are skipped
    python scripts/benchmarks/peers --install                                   the others in a temporary venv, with pip
    python scripts/benchmarks/peers --python fastai_learner=PATH --python hugging_face=PATH     in a venv of yours
    python scripts/benchmarks/peers --jobs head --peers ideal project --rounds 1

head: the head alone on a frozen backbone, 224 pixels, 5 epochs. full: everything, 128 pixels, 2 epochs. Each trains a
resnet18 from the same file of random weights on drawn JPEGs of 500x375 in 8 classes, on the CPU. The peers alternate;
the table has medians. A saved model's accuracy is measured by the same code for all, after the time is taken. Run nothing else
meanwhile: a round takes about 20 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.benchmarks.peers.contestants import PEERS, Run, find_python, last_line
from scripts.benchmarks.peers.drawing import draw_images, write_weights
from scripts.benchmarks.peers.measuring import measure, val_accuracy
from scripts.benchmarks.peers.programs.job import JOBS, SEED
from scripts.benchmarks.peers.table import Results


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, nargs=2, default=[387, 98], metavar=("TRAIN", "VAL"))
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="the Python that runs a peer"
    )
    parser.add_argument("--install", action="store_true", help="what a peer lacks, in a temporary venv")
    options = parser.parse_args(words)
    options.pythons = dict(word.split("=", 1) for word in options.python if "=" in word)
    if len(options.pythons) < len(options.python) or not options.pythons.keys() <= PEERS.keys():
        parser.error(f"--python NAME=PATH: NAME is one of {', '.join(PEERS)}")
    return options


def find_pythons(options: argparse.Namespace, results: Results, folder: Path) -> dict[str, str]:
    """The Python of each peer that can run; for the others results gets the reason."""
    pythons = {}
    venvs = folder / "venvs" if options.install else None
    for peer in options.peers:
        try:
            pythons[peer], results.versions[peer] = find_python(peer, options.pythons.get(peer), venvs)
        except LookupError as reason:
            results.reasons[peer] = f"skipped: {reason}"
            print(f"{peer}: skipped: {reason}", flush=True)
    return pythons


def run_all(options: argparse.Namespace, results: Results, folder: Path) -> None:
    pythons = find_pythons(options, results, folder)
    if not pythons:
        return
    data, weights = folder / "photos", folder / "resnet18.pt"
    draw_images(data, dict(zip(("train", "val"), options.images, strict=True)), SEED)
    write_weights(weights, SEED)
    for number, job, peer in itertools.product(range(options.rounds), options.jobs, pythons):
        run = Run(peer, JOBS[job], data, weights, folder / "run")
        run.folder.mkdir()
        said = run_one(run, pythons[peer], options.threads, results)
        print(f"round {number + 1}  {job}  {peer:15} {said}", flush=True)
        shutil.rmtree(run.folder)


def run_one(run: Run, python: str, threads: int, results: Results) -> str:
    """Adds to the results; returns what the progress line says."""
    key = run.job.name, run.peer
    try:
        cost = measure(run.command(python), threads, run.folder / "log.txt")
        accuracy = val_accuracy(run.model_file, run.data, run.job)
    except (RuntimeError, OSError) as error:
        results.failures[key] = f"failed: {last_line(str(error))}"
        return results.failures[key]
    results.costs.setdefault(key, []).append(cost)
    results.accuracies.setdefault(key, []).append(accuracy)
    return f"{cost.seconds:6.1f} s  CPU {cost.cpu_seconds:6.1f} s  {cost.peak_mib:5.0f} MiB  val acc {accuracy:.3f}"


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the training ends too, the table is shown
    results = Results(options.jobs, options.peers)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        try:
            run_all(options, results, Path(folder))
        except KeyboardInterrupt:
            print("\ninterrupted: the table has what was measured until now")
    print(f"\n{options.images[0]} train and {options.images[1]} val images, {options.threads} threads\n")
    print(results.table())


if __name__ == "__main__":
    main()
