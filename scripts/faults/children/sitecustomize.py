"""Python imports this at its start in the processes that a victim starts: see scripts/faults/injecting.py."""

from scripts.faults.injecting import arm

arm()
