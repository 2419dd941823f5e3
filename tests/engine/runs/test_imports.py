from __future__ import annotations

import gc
import subprocess
import sys

from src.engine.runs.imports import importing
from tests.conftest import command_environment


def test_python_looks_for_no_garbage_while_modules_are_imported():
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)
    gc.unfreeze()


def test_nor_as_a_command_ends():
    """Only in a process that runs nothing else: a notebook goes on."""
    code = "import gc; from src.engine.runs import errors, signals; {}; errors.run_and_report(list); "
    code += "print(gc.get_freeze_count())"
    counts = [
        int(subprocess.check_output([sys.executable, "-c", code.format(line)], env=command_environment(), text=True))
        for line in ("signals.end_at_once()", "pass")
    ]
    assert counts[0] > 1000
    assert counts[1] == 0
