"""Times a sweep of the default job's head: the backbone is frozen and the images are not augmented.

    python scripts/benchmarks/head_sweep.py [--trials 20] [KEY=VALUE ...]       from the project's folder

KEY=VALUE are settings of src.train. Uses all cores and stops no trial early. The trials share their features;
feature_bank.views=0 has each compute them in every epoch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from asha import read_outcome, run_sweep

FROZEN = (
    "freeze.preset=head_only",
    "data.augment=none",
    "report.page=false",  # as experiment=tune_head has it (room: reports)
)
SPACE = (
    "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "model.head=choice(linear,mlp)",
    "model.dropout=interval(0,0.5)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "head"
        seconds = run_sweep(sweep, options.trials, *FROZEN, *SPACE, *options.words)
        outcome = read_outcome(sweep)
    print(
        f"\n{options.trials} trials: {seconds:.1f} s from command to prompt, {seconds / options.trials:.2f} s per trial; "
        f"best val/acc {outcome.best_val:.4f}, its test/acc {outcome.test:.4f}"
    )


if __name__ == "__main__":
    main()
