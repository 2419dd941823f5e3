"""The runner of the benchmarks: a section that is measured again takes the place of the old one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.benchmarks import performance
from scripts.benchmarks.performance import BENCHMARKS, PAGE, ROOT, section, with_section


def test_a_section_takes_the_place_of_its_older_self():
    page = "# Speed\n\nBy hand.\n"
    for text in ("start 1", "loader 1", "start 2"):
        page = with_section(page, text.split()[0], f"### {text.split()[0]}\n\n{text}\n")
    assert page == "# Speed\n\nBy hand.\n\n### start\n\nstart 2\n\n### loader\n\nloader 1\n"


def test_what_a_benchmark_prints_is_on_the_page_and_one_that_fails_changes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("# Speed\n")
    (tmp_path / "good.py").write_text("print('1.25 times')")
    (tmp_path / "bad.py").write_text("print('half a table'); raise SystemExit(3)")
    monkeypatch.setattr(performance, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    monkeypatch.setattr(performance, "BENCHMARKS", {"good": "good.py", "bad": "bad.py"})
    monkeypatch.setattr(sys, "argv", ["performance.py"])
    assert performance.main() == 1
    page = (tmp_path / "page.md").read_text()
    assert "`python good.py`" in page
    assert "1.25 times" in page
    assert "half a table" not in page
    assert "Failed: bad" in capsys.readouterr().out


def test_the_benchmarks_are_there_and_a_wrong_name_is_refused():
    for words in BENCHMARKS.values():
        assert (ROOT / words.split()[0]).exists()
    assert "scripts/benchmarks/performance.py" in PAGE.read_text()
    assert section("start", "x").startswith("### start\n\n`python scripts/benchmarks/start.py")
    words = [sys.executable, str(Path("scripts/benchmarks/performance.py")), "begin"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no benchmark begin; there are start, " in done.stderr
