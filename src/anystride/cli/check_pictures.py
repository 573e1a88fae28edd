"""A small picture of a layout as SVG for a page: the tape of memory, and what the strides step over.

Smaller than ``drawing.py`` draws it, and without colours of its own: classes say what lies where, and the
page's style sheet colours them, light or dark. ``KINDS`` names the classes.
"""

from __future__ import annotations

from html import escape

from anystride.cli.memory_map import (
    Kind,
    Line,
    MemoryMap,
    Run,
    Stride,
    gaps_of,
    line_of,
    map_memory,
    sample_shape,
    strides_of,
)
from anystride.testing import Layout, Storage

__all__ = ["KINDS", "picture", "strides_in_words"]

KINDS: dict[str, str] = {
    "k": "K",
    "v": "V",
    "both": "K and V, the same bytes",
    "layer": "other layers",
    "cache": "another cache",
    "gap": "a gap: never read",
}

# Units of the picture: pixels where it is shown at its full width.
WIDTH, LEFT, RIGHT = 600, 78, 596
LINE, BETWEEN, LEVEL, BREAK = 17, 5, 15, 16
LETTER = 5.0  # width of a letter of 8.5 pixels


def picture(layout: Layout) -> str:
    """An ``<svg>`` element, in which a small cache lies as the layout has it."""
    return _Picture(layout).svg()


def strides_in_words(layout: Layout) -> list[tuple[str, str, str]]:
    """Name, formula and length in the picture of each stride of K, and of the way from K to V."""
    return [
        (_name(stride), stride.formula, f"{stride.elements:,}")
        for stride in strides_of(layout, layout.build(sample_shape(layout)))
    ]


def _name(stride: Stride) -> str:
    return "K to V" if stride.name == "V" else stride.name


class _Picture:
    """What has to be known before the first line can be placed, and the pieces of the picture."""

    layout: Layout
    storage: Storage
    found: MemoryMap

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.storage = layout.build(sample_shape(layout))
        self.found = map_memory(self.storage)
        k = self.storage.k_geometry
        self.anchor = line_of(self.found, k.buffer, k.offset)
        self.across: list[Stride] = []  # they stay in the line of K's first element, the shortest first
        for stride in strides_of(layout, self.storage):
            if stride.elements not in (0, 1):
                end = line_of(self.found, k.buffer, k.offset + stride.elements)
                if end == self.anchor:
                    self.across.append(stride)
        self.across.sort(key=lambda stride: abs(stride.elements))

    def svg(self) -> str:
        boxes: dict[str, list[str]] = {kind: [] for kind in ("gap", *KINDS)}
        texts: list[str] = []
        top, buffer = 2.0, -1
        strides = ""
        for index, line in enumerate(self.found.lines):
            if line.buffer != buffer and len(self.found.rulers) > 1:
                owner = "K" if line.buffer == self.storage.k_geometry.buffer else "V"
                texts.append(_text(LEFT, top + 10, f"{owner}'s allocation", "n"))
                top += BREAK
            buffer = line.buffer
            if line.skipped:
                words = f"⋮  {line.skipped:,} elements of nothing  ⋮"
                texts.append(_text((LEFT + RIGHT) / 2, top + 10, words, "n m"))
                top += BREAK
            if index == self.anchor and self.across:
                top += 2 + LEVEL * len(self.across)
                strides = self._strides(line, top)
            texts.append(_text(LEFT - 6, top + LINE / 2 + 3, f"{line.begin:,}", "n e"))
            self._gaps(line, top, boxes["gap"], texts)
            for run in line.runs:
                self._run(line, run, top, boxes[run.kind], texts)
            top += LINE + BETWEEN
        paths = "".join(f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in boxes.items() if d)
        label = escape(f"{self.layout.name}: {self.layout.description}")
        return (
            f'<svg viewBox="0 0 {WIDTH} {top:.0f}" role="img" aria-label="{label}">'
            f"{paths}{strides}{''.join(texts)}</svg>"
        )

    def _x(self, line: Line, element: int) -> float:
        return LEFT + self.found.rulers[line.buffer].place(element - line.begin) * (RIGHT - LEFT)

    def _gaps(self, line: Line, top: float, boxes: list[str], texts: list[str]) -> None:
        folds = self.found.rulers[line.buffer].folds
        for begin, end in gaps_of(line):
            left, right = self._x(line, begin), self._x(line, end)
            boxes.append(_box(left, right, top))
            folded = any(b < end - line.begin and begin - line.begin < e for b, e in folds)
            words = f"{end - begin:,} (folded)" if folded else f"{end - begin:,}"
            if len(words) * LETTER < right - left - 8:
                texts.append(_text((left + right) / 2, top + LINE / 2 + 3, words, "h m"))

    def _run(self, line: Line, run: Run, top: float, boxes: list[str], texts: list[str]) -> None:
        left, right = self._x(line, run.begin), self._x(line, run.end)
        # A sliver of ground between two boxes, unless they are slivers themselves.
        boxes.append(_box(left, right - (0.8 if right - left > 4 else 0.0), top))
        for words in self._labels(run):
            if len(words) * LETTER < right - left - 3:
                texts.append(_text((left + right) / 2, top + LINE / 2 + 3, words, f"on-{run.kind} m"))
                break

    def _labels(self, run: Run) -> list[str]:
        """What may stand in a box, the longest first."""
        if run.kind == "cache":
            return ["another cache", "other"]
        if run.kind == "layer":
            return [f"layer {run.owner[0]}", f"{run.owner[0]}"]
        block, token, head = run.owner
        names: dict[Kind, str] = {"k": "K", "v": "V", "both": "K+V"}
        has_heads = self.storage.shape.num_kv_heads > 1 and self.storage.k_geometry.stride[3] > 0
        short = f"t{token} h{head}" if has_heads else f"t{token}"
        part = names[run.kind]
        return [f"{part} block {block} {short}", f"{part} {short}", part]

    def _strides(self, line: Line, top: float) -> str:
        """Arrows from K's first element, above its line, the shortest lowest."""
        start = self.storage.k_geometry.offset
        begin = self._x(line, start)
        arrows, names = [], []
        for level, stride in enumerate(self.across):
            end, y = self._x(line, start + stride.elements), top - 4 - LEVEL * level - 3
            tip = 4 if end > begin else -4
            head = f"m{-tip} -3l{tip} 3l{-tip} 3"
            arrows.append(f'<path class="a" d="M{begin:.1f} {y}H{end:.1f}{head}M{end:.1f} {y}V{top}"/>')
            words = _name(stride) + (f" {stride.formula}" if stride.formula else "")
            after = max(begin, end) + 5
            if after + len(words) * LETTER * 1.1 < WIDTH:
                names.append(_text(after, y + 3, words, "s"))
            else:
                names.append(_text(min(begin, end) + 4, y - 2.5, words, "s"))
        highest = top - 4 - LEVEL * (len(self.across) - 1) - 3
        arrows.append(f'<path class="a" d="M{begin:.1f} {highest}V{top}"/>')
        return "".join((*arrows, *names))


def _box(left: float, right: float, top: float) -> str:
    return f"M{left:.1f} {top:.0f}H{max(right, left + 0.3):.1f}v{LINE}H{left:.1f}z"


def _text(x: float, y: float, words: str, classes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(words)}</text>'
