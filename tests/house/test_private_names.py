"""What src/ uses of other libraries without their promise: listed with a reason, still there, and never more of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from types import ModuleType

import pytest
import torch

from scripts import house

ALLOWED = house.allowed_private_names()
SILENT = [tuple(part.strip() for part in line.split("|")) for line in house.entries(house.SILENT_NAMES)]


def test_every_private_name_is_listed_and_every_listed_one_is_used():
    used, listed = house.private_names(), {entry.place for entry in ALLOWED}
    assert sorted(used - listed) == [], "find the library's public way; where there is none, add a line that says why"
    assert sorted(listed - used) == [], "gone from src/: python -m scripts.house --shrink"
    assert len(ALLOWED) == len(listed), "a place is listed twice"


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: f"{entry.file}-{entry.name}")
def test_a_private_name_exists_in_the_installed_library(entry):
    assert entry.why
    assert entry.public
    assert house.exists(entry.where, entry.name), f"{entry.where} has no {entry.name}: {entry.file} needs another way"


@pytest.mark.parametrize(("file", "text", "module"), SILENT)
def test_what_would_break_in_silence_is_still_there(file, text, module):
    """Environment variables, words of messages, names inside of public objects: nothing else would notice."""
    path = house.ROOT / file
    assert path.exists(), "gone from src/: python -m scripts.house --shrink"
    assert text in path.read_text(), "gone from src/: python -m scripts.house --shrink"
    assert text in inspect.getsource(importlib.import_module(module)), f"{module} has no {text}"


PROBE = """
import torch
from torch._other import name
from lightning.pytorch import _hidden

class Probe(torch.nn.Module):
    def __init__(self):
        self._own = 1
        self._buffers = {}

    def forward(self, x):
        x._foreign = self._own
        return getattr(x, "_by_text"), x._replace(a=1), x.__dict__, self._own

    def _apply(self, function):
        return self
"""


def test_the_walk_finds_imports_reads_writes_texts_and_overridden_methods(monkeypatch):
    class Probe(torch.nn.Module):
        pass

    probe = ModuleType("src.probe")
    probe.Probe = Probe
    monkeypatch.setitem(sys.modules, "src.probe", probe)
    monkeypatch.setattr(house, "trees", lambda: {"src/probe.py": ast.parse(PROBE)})
    names = {name for _, name in house.private_names()}
    assert names == {"_other", "_hidden", "_buffers", "_foreign", "_by_text", "_apply"}
