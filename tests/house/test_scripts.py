"""What scripts/ imports of src/ exists: no test runs the benchmarks and the figures."""

from __future__ import annotations

import ast
import functools
import importlib
import re

import pytest

from scripts import house

SCRIPTS = [str(path.relative_to(house.ROOT)) for path in sorted((house.ROOT / "scripts").rglob("*.py"))]


@pytest.mark.parametrize("file", SCRIPTS)
def test_what_a_script_imports_of_src_exists(file):
    for node in ast.walk(ast.parse((house.ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "src":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")  # a module, or an error with its name


@pytest.mark.parametrize("file", [file for file in SCRIPTS if file.startswith("scripts/faults/")])
def test_what_a_fault_is_injected_at_exists(file):
    """A fault at a function that was renamed would never happen."""
    for node in ast.walk(ast.parse((house.ROOT / file).read_text())):
        if isinstance(node, ast.Constant) and re.fullmatch(r"(src|lightning|torch|PIL)[\w.]*:[\w.]+", str(node.value)):
            module, _, attributes = node.value.partition(":")
            functools.reduce(getattr, attributes.split("."), importlib.import_module(module))
