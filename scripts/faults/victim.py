"""`python -m scripts.faults.victim MODULE words...` is `python -m MODULE words...` with the faults of the environment."""

from __future__ import annotations

import runpy
import sys

from scripts.faults.injecting import arm

if __name__ == "__main__":
    arm()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
