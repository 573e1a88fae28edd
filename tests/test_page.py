"""The page of the kit's reports, as a browser without a network shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from reports import HOSTILE, KERNELS, PROBE_NAMES, VERSIONS, hand_made

from anystride.cli.check_page import page
from anystride.testing import LAYOUTS
from anystride.testing.probes import PROBES
from anystride.testing.report import Finding, Report, Verdict

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not on PATH: the page is not opened"
)

# Colours of the style sheet, light and dark: what a cell of a verdict is filled with.
LIGHT = {"ok": "#e3f3e7", "copied": "#fdeebf", "refused": "#e9ebef", "WRONG": "#c4262e", "crashed": "#5a2382"}
DARK = {"ok": "#1b3726", "copied": "#4a3a0c", "refused": "#2b3038", "WRONG": "#d23a41", "crashed": "#8145b3"}

# Asked of the page after its own script: stands in the copy that is opened, not in the page.
ASK = """
<script>
const told = {};
const root = document.documentElement;
const inScroller = (element) => element.closest(".scroll, .wide, dialog, svg");
told.ready = root.dataset.ready;
told.title = document.title;
told.dark = matchMedia("(prefers-color-scheme: dark)").matches;
told.beyond = root.scrollWidth - root.clientWidth;
told.overflowing = [...document.body.querySelectorAll("*")]
  .filter((e) => !inScroller(e) && e.getBoundingClientRect().right > root.clientWidth + 1)
  .map((e) => e.tagName + "." + e.className);
told.clipped = [...document.querySelectorAll(".cells button, .cells thead th")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent);
told.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
const rows = () => [...document.querySelectorAll(".cells tbody tr:not(.family)")].filter((r) => !r.hidden);
const boxes = [...document.querySelectorAll(".filter input")];
told.rows = rows().length;
for (const box of boxes) if (box.value !== "crashed" && box.checked) box.click();
told.crashedRows = rows().length;
told.faded = document.querySelectorAll(".cells td.faded").length;
for (const box of boxes) if (!box.checked) box.click();
told.rowsAgain = rows().length;
document.querySelector('[data-probe="page stride"] button[data-kernel="%(kernel)d"]').click();
const dialog = document.getElementById("calls");
told.opened = dialog.open;
told.calls = dialog.innerText;
dialog.querySelector(".close").click();
told.closed = !dialog.open;
window.dispatchEvent(new Event("beforeprint"));
told.folded = document.querySelectorAll("details:not([open])").length;
root.dataset.told = JSON.stringify(told);
</script>
"""
CATCH = "<script>window.onerror = (what) => { document.documentElement.dataset.error = what; };</script>"


def chromium(target: Path, *arguments: str, width: int = 1280, height: int = 1600) -> str:
    """What Chromium, which can reach no network, prints about a file."""
    command = [
        CHROMIUM or "",
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(f"--user-data-dir={target.parent / 'profile'}", f"--window-size={width},{height}"),
        *(*arguments, target.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def the_page() -> str:
    return page(hand_made())


class Elements(HTMLParser):
    """Every element with its attributes, all text that stands in the page, and what was left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def told_by(tmp_path: Path, width: int, *arguments: str) -> tuple[dict[str, object], str]:
    """What the page answers to ``ASK``, and the document as it then is."""
    kernel = next(
        number
        for number, report in enumerate(hand_made())
        for finding in report.findings
        if finding.probe == "page stride" and finding.verdict in (Verdict.WRONG, Verdict.CRASHED)
    )
    copy = tmp_path / "asked.html"
    text = (
        the_page()
        .replace("<head>", f"<head>{CATCH}")
        .replace("</body>", ASK % {"kernel": kernel} + "</body>")
    )
    copy.write_text(text)
    document = chromium(copy, "--dump-dom", *arguments, width=width)
    root = dict(Elements(document).found[0][1])
    assert "data-error" not in root, root.get("data-error")
    told = json.loads(root["data-told"])
    assert isinstance(told, dict)
    return told, document


# Without a browser: what stands in the text of the page.


def test_the_page_is_well_formed_and_says_everything() -> None:
    elements = Elements(the_page())
    assert elements.open == []
    for word in (*(title for _, title in KERNELS), *PROBE_NAMES, *LAYOUTS, *VERSIONS.values(), "NVIDIA H200"):
        assert word in elements.text
    assert "the package <absent> is not installed; pip install absent" in elements.text
    assert f"A-huge-blocks: <8 GB> are not free: {', '.join(title for _, title in KERNELS)}" in elements.text
    assert all(f"{probe.name} {probe.about}" in elements.text for probe in PROBES)
    assert "out[3, 5, 17]: got nan, right 0.12" in elements.text
    assert "error 7.00e-01, allowed 8.00e-03" in elements.text


def test_a_cell_says_its_verdict_in_words_and_to_those_who_do_not_see() -> None:
    kernel = Report("k", "Kernel", "1", "cpu", {}, (
        Finding("a", "packed", Verdict.OK, "page stride"),
        Finding("b", "packed", Verdict.WRONG, "page stride", "off"),
        Finding("a", "packed", Verdict.OK, "NaN tails"),
        Finding("b", "packed", Verdict.REFUSED, "NaN tails", "no"),
        Finding("b", "G1-kv-outermost", Verdict.REFUSED, "", "no"),
    ))  # fmt: skip
    text = page([kernel])
    cells = re.findall(r'<td class="(\w+)" data-verdicts="([\w ]+)"(.*?)><button.*?aria-label="(.*?)"', text)
    assert cells == [
        ("WRONG", "WRONG ok", "", "Kernel, page stride: 1 WRONG, 1 ok"),
        ("ok", "refused ok", ' style="--share:50%"', "Kernel, NaN tails: 1 refused, 1 ok"),
        ("refused", "refused", "", "Kernel, G1-kv-outermost: 1 refused"),
    ]


def test_every_picture_that_is_linked_is_there() -> None:
    elements = Elements(the_page()).found
    names = {attributes["id"] for _, attributes in elements if "id" in attributes}
    links = [attributes["href"] for tag, attributes in elements if tag == "a"]
    assert {f"#layout-{name}" for name in LAYOUTS} <= set(links)
    assert all(link.removeprefix("#") in names for link in links)
    pictures = [attributes["aria-label"] for tag, attributes in elements if attributes.get("role") == "img"]
    assert pictures == [f"{layout.name}: {layout.description}" for layout in LAYOUTS.values()]


def test_every_head_of_a_table_has_a_scope() -> None:
    assert all("scope" in attributes for tag, attributes in Elements(the_page()).found if tag == "th")


def test_nothing_is_loaded_from_anywhere() -> None:
    for tag, attributes in Elements(the_page()).found:
        assert "src" not in attributes, tag
        assert "srcset" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:,")), attributes
        assert "http" not in attributes.get("style", "")
    style = the_page().partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert set(re.findall(r"url\(.*?\)", style)) == {"url(#hatch)"}


def test_no_message_becomes_markup_or_script() -> None:
    text = the_page()
    assert HOSTILE in [f.message for report in hand_made() for f in report.findings]
    assert "<script>document" not in text
    assert "<b>x" not in text
    assert text.count("<script") == text.count("</script>") == 2
    stored = text.partition('id="findings">')[2].partition("</script>")[0]
    assert HOSTILE in json.loads(stored)["texts"]


def test_a_page_about_nothing_says_so() -> None:
    text = Elements(page([])).text
    assert "Nothing was wrong, and nothing crashed." in text
    assert "Nothing was refused." in text


def test_a_layout_that_the_catalogue_does_not_have_gets_a_row_and_no_picture() -> None:
    kernel = Report("k", "Kernel", "", "cpu", {}, (Finding("a", "mine", Verdict.OK),))
    elements = Elements(page([kernel]))
    assert "Not in the catalogue mine ok" in elements.text
    assert not any(tag == "figure" for tag, _ in elements.found)


def test_the_page_stays_small() -> None:
    assert len(the_page().encode()) < 3_000_000


# With a browser.


@needs_chromium
@pytest.mark.parametrize("width", [600, 1280])
def test_a_browser_shows_it_whole(tmp_path: Path, width: int) -> None:
    told, document = told_by(tmp_path, width)
    assert told["ready"] == "yes"
    assert told["title"] == "Which kernels can be trusted with a layout"  # no message took over
    assert told["loaded"] == []
    assert told["beyond"] == 0
    assert told["overflowing"] == []
    assert told["clipped"] == []
    text = Elements(document).text
    words = (
        *(title for _, title in KERNELS),
        *PROBE_NAMES,
        *LAYOUTS,
        *(verdict.value for verdict in Verdict),
    )
    assert [word for word in words if word not in text] == []


@needs_chromium
def test_its_script_filters_opens_cells_and_unfolds_for_the_printer(tmp_path: Path) -> None:
    told, _ = told_by(tmp_path, 1280)
    assert told["rows"] == told["rowsAgain"] == len(PROBE_NAMES) + len(LAYOUTS)
    crashed = {
        (f.probe, f.probe or f.layout)
        for r in hand_made()
        for f in r.findings
        if f.verdict.value == "crashed"
    }
    assert told["crashedRows"] == len(crashed) < len(PROBE_NAMES) + len(LAYOUTS)
    faded = told["faded"]
    assert isinstance(faded, int)
    assert faded > 0
    assert told["opened"]
    assert told["closed"]
    assert re.search(r"page stride.*(WRONG|crashed) probe-\w+ in packed", str(told["calls"]), re.DOTALL)
    assert told["folded"] == 0


@needs_chromium
def test_a_table_of_few_kernels_is_not_stretched(tmp_path: Path) -> None:
    ask = (
        "<script>document.documentElement.dataset.widths = "
        'JSON.stringify([...document.querySelectorAll(".cells")].map((table) => table.offsetWidth))</script>'
    )
    copy = tmp_path / "asked.html"
    copy.write_text(page(hand_made()[:2]).replace("</body>", f"{ask}</body>"))
    widths = json.loads(Elements(chromium(copy, "--dump-dom")).found[0][1]["data-widths"])
    assert len(widths) == 2
    assert max(widths) < 640


@needs_chromium
@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_a_screenshot_has_every_colour(tmp_path: Path, scheme: str, colours: dict[str, str]) -> None:
    copy, picture = tmp_path / "page.html", tmp_path / "page.png"
    copy.write_text(the_page())
    wish = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    chromium(copy, f"--screenshot={picture}", wish, height=3000)
    seen = set(_colours(picture))
    missing = [verdict for verdict, colour in colours.items() if colour not in seen]
    assert missing == []
    style = the_page().partition("<style>")[2]
    for verdict, colour in colours.items():
        assert f"--{verdict.lower()}: {colour};" in style


def _colours(picture: Path) -> Iterator[str]:
    """Every colour of a picture that fills at least 400 pixels: more than the edge of a letter."""
    pixels = (imread(picture)[..., :3] * 255).round().astype("uint32")
    codes = (pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]).ravel().tolist()
    counts: dict[int, int] = {}
    for code in codes:
        counts[code] = counts.get(code, 0) + 1
    return (f"#{code:06x}" for code, count in counts.items() if count >= 400)
