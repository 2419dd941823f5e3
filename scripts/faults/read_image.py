"""Row 36: reads an image file as Project or Plain does, and prints by how many MiB the process grew."""

from __future__ import annotations

import json
import resource
import sys

from scripts.faults.plain import Plain
from scripts.faults.project import Project

if __name__ == "__main__":
    kind, file = sys.argv[1:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = {"Project": Project, "Plain": Plain}[kind].read(file)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"read": pixels is not None, "mib": growth / 1024}))
