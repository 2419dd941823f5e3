"""The fuzz scripts, with small counts; the full ones are run by hand."""

from __future__ import annotations

import sys

import pytest

from scripts import fuzz_checkpoints, fuzz_overrides
from src.engine.runs import checksum


def arguments(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", *words])


def test_damages_of_checkpoints_and_models(monkeypatch, capsys):
    arguments(monkeypatch, "--count", "6")
    assert fuzz_checkpoints.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_a_reader_that_looks_at_no_checksum_is_found_out(monkeypatch, capsys):
    monkeypatch.setattr(fuzz_checkpoints, "flaw", lambda path: None)
    monkeypatch.setattr(checksum, "damage", lambda path: None)
    arguments(monkeypatch, "--count", "4")
    assert fuzz_checkpoints.main() == 1


def test_random_settings(monkeypatch, capsys):
    arguments(monkeypatch, "--count", "8", "--run", "0")
    assert fuzz_overrides.main() == 0, capsys.readouterr().out


def test_a_crash_is_found_out(monkeypatch, capsys):
    monkeypatch.setattr(fuzz_overrides.config_checks, "read", lambda composed: 1 / 0)
    arguments(monkeypatch, "--count", "8", "--run", "0")
    assert fuzz_overrides.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_the_words_have_usual_and_absurd_values(seed):
    generator = fuzz_overrides.seeding.generator(seed, "words")
    words = {word for _ in range(100) for word in fuzz_overrides.words(generator)}
    assert len({word.partition("=")[0] for word in words}) > 40
    assert {word.partition("=")[2] for word in words} & {"nan", "1e18"}
