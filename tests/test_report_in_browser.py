"""The report in a real browser. `make test-browser` installs one; without, this is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser, browsing
from test_report import SECTIONS, evaluated

pytestmark = pytest.mark.skipif(
    shutil.which(PROGRAM) is None, reason=f"needs {PROGRAM} (a Debian package; make test-browser installs it)"
)
# Contrast of text on its background (WCAG 2.2, 1.4.3).
CONTRAST = """
(() => {
  const light = text => {
    const parts = text.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255);
    const [r, g, b] = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(document.body), page = getComputedStyle(document.documentElement);
  const [ink, paper] = [light(style.color), light(page.backgroundColor)].sort((a, b) => a - b);
  return (paper + 0.05) / (ink + 0.05);
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(evaluated(tmp_path_factory.mktemp("report")).run_dir) / "report" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_readable_and_silent(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    height = "document.getElementById('{}').getBoundingClientRect().height"
    assert [name for name in SECTIONS if not browser.evaluate(height.format(name)) > 50] == []
    # Nothing is cut off: wide tables scroll in their own boxes.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("parseFloat(getComputedStyle(document.querySelector('main p')).fontSize)") >= 14
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.named("Log.entryAdded") == []
    assert browser.named("Runtime.consoleAPICalled") == browser.named("Runtime.exceptionThrown") == []
    requests = [request["request"]["url"] for request in browser.named("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]


def test_on_paper_nothing_is_folded_or_cut_off(browser: Browser, report: Path) -> None:
    width = 673  # A4 without its margins
    browser.open(report, width, printed=True)
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    cut_off = "[...document.querySelectorAll('.scroll, pre')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(cut_off) == 0
    # What is folded on a screen stands open.
    folded = "[...document.querySelectorAll('details > :last-child')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.evaluate(folded)) > 0
    dark_ink = "getComputedStyle(document.body).color"
    inks = []
    for dark in (False, True):
        browser.open(report, width, dark=dark, printed=True)
        inks.append(browser.evaluate(dark_ink))
    assert inks[0] == inks[1]


def test_what_is_wrong_is_seen(browser: Browser, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    source = report.read_text(encoding="utf-8")
    broken.write_text(source.replace("<main>", '<main><img src="https://crossguard.invalid/a.png"><hr width="2000">'))
    browser.open(broken, 400)
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert browser.named("Log.entryAdded")
