"""The reports in a real browser, on a phone and on a screen: nothing sticks out at the side, and the console stays empty.

Needs Chromium or Chrome: apt-get install chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from src.engine.reports.report import write_report
from src.engine.runs.files import write_json
from tests.engine.reports.test_folds_report import page_of, shown, write_folds
from tests.engine.reports.test_report import folder  # noqa: F401 (a fixture)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
PHONE, SCREEN, HEIGHT = 400, 1200, 2400
# A window is at least 500 pixels wide, a frame in it is not. From within, a page tells how wide it is and what it needs.
FRAMES = """<!DOCTYPE html><title></title><body style="margin: 0"><script>
onmessage = (event) => document.title += event.data + ";"
</script>""" + "".join(
    f'<iframe src="copy.html" width="{width}" height="{HEIGHT}" style="border: 0"></iframe>'
    for width in (PHONE, SCREEN)
)
MEASURE = "<script>parent.postMessage(innerWidth + ' ' + document.documentElement.scrollWidth, '*')</script>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser on the PATH: {', '.join(BROWSERS)}"),
]


def opened(page: Path, work: Path) -> tuple[dict[int, int], list[str], Image.Image]:
    """The width that a copy of the page needs on a phone and on a screen, what the console says, and a picture of both."""
    (work / "copy.html").write_text(page.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
    (work / "frames.html").write_text(FRAMES)
    line = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={work / 'profile'}", "--virtual-time-budget=3000"),
        *(f"--window-size={PHONE + SCREEN + 10},{HEIGHT}", f"--screenshot={work / 'picture.png'}", "--dump-dom"),
        (work / "frames.html").as_uri(),
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([\d ;]+)</title>", done.stdout)
    assert title, done.stdout[:2000] + done.stderr[-2000:]
    needed = dict(tuple(map(int, pair.split())) for pair in title[1].strip(";").split(";"))
    assert sorted(needed) == [PHONE, SCREEN]
    return needed, re.findall(r":CONSOLE.*", done.stderr), Image.open(work / "picture.png").convert("RGB")


def test_the_page_of_a_run_and_that_of_all_folds_fit_a_phone_and_a_screen(folder, tmp_path):  # noqa: F811
    several = write_folds(tmp_path / "cv", "multiclass", [0.9712, 0.9634, 0.9788], [0.9, 0.91, 0.9])
    for file in several.rglob("result.json"):  # as many columns as a real one has
        result = json.loads(file.read_text())
        result["metrics"] |= {f"test/{name}": 3.71e-4 for name in ("balanced_acc", "macro_f1", "loss")}
        write_json(file, result)
    page_of(several, shown())
    for page in (write_report(folder, {2: ["backbone.layer4"]}), several / "report.html"):
        check_page(page, tmp_path)


def check_page(page: Path, work: Path) -> None:
    needed, console, picture = opened(page, work)
    assert needed == {PHONE: PHONE, SCREEN: SCREEN}, page
    assert console == []
    for left, right in ((0, PHONE), (PHONE, PHONE + SCREEN)):
        assert len(picture.crop((left, 0, right, HEIGHT)).getcolors(2**24)) > 10


def test_what_sticks_out_or_fails_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><body><div style='width: 500px'>wide</div><script>nothing()</script>")
    needed, console, _ = opened(page, tmp_path)
    assert needed[PHONE] > 500
    assert needed[SCREEN] == SCREEN
    assert "nothing is not defined" in console[0]
