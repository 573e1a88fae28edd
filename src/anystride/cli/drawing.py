"""Pictures of layouts: where K, V, gaps and other layers lie in memory, and what the strides step over.

Memory is drawn as one tape cut into lines, addresses rising from left to right and from line to line.
Coordinates are inches from the upper left corner, so that text can be measured against boxes. The file is
long because a picture has many parts and nothing else can use them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

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

__all__ = ["draw"]

DPI = 160
WIDTH = 13.0  # of the picture
LEFT, RIGHT = 1.25, 10.95  # where the tape begins and ends
TITLE = 0.8  # height of the two lines of text above a tape
LINE, BETWEEN = 0.42, 0.13  # heights of a line and of the space below it
LEVEL = 0.27  # between two strides drawn one above the other
BREAK = 0.34  # for lines that are left out

# Okabe and Ito's colours, which people who are colour-blind can tell apart; greys for what is not ours.
COLOURS: dict[Kind, str] = {
    "k": "#0072B2",
    "v": "#E69F00",
    "both": "#009E73",
    "layer": "#D0D0D0",
    "cache": "#A8A8A8",
}
ON_COLOURS: dict[Kind, str] = {
    "k": "white",
    "v": "black",
    "both": "white",
    "layer": "#505050",
    "cache": "black",
}
GAP: dict[str, Any] = {"facecolor": "white", "edgecolor": "#BBBBBB", "hatch": "////", "linewidth": 0.0}
INK, QUIET = "#1A1A1A", "#666666"

MEANINGS: dict[Kind, dict[str, str]] = {
    "k": {"kv": "K", "row": "K alone (rope)", "q_v": "K (rope)"},
    "v": {"kv": "V", "row": "V alone", "q_v": "V (latent)"},
    "both": {"kv": "K and V, the same bytes", "row": "K and V, the same bytes (latent)", "q_v": "K and V"},
    "layer": dict.fromkeys(("kv", "row", "q_v"), "other layers"),
    "cache": dict.fromkeys(("kv", "row", "q_v"), "a cache of another kind"),
}


def draw(layouts: Iterable[Layout], path: Path, heading: str = "") -> None:
    """Write a PNG that shows a small cache in each of the layouts, one below the other.

    Args:
        layouts: What to draw.
        path: Of the file.
        heading: Stands above all, if there is more than one layout.
    """
    panels = [_Panel.of(layout) for layout in layouts]
    top = 0.65 if heading else 0.1
    height = top + sum(panel.height for panel in panels) + 0.1
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    if heading:
        axes.text(0.3, 0.4, heading, fontsize=15, weight="bold", color=INK, va="center")
    for panel in panels:
        panel.draw(axes, top)
        top += panel.height
    figure.savefig(path, format="png")


def _text_width(text: str, size: float) -> float:
    """Inches that a text takes, roughly: a letter is 0.55 of its size wide."""
    return 0.55 * len(text) * size / 72


@dataclass(frozen=True)
class _Panel:
    """One layout, with everything that has to be known before it can be placed.

    Attributes:
        across: Strides that stay in the line of K's first element, the shortest first.
        down: Strides that end in another line.
        anchor: Index of the line with K's first element.
    """

    layout: Layout
    storage: Storage
    found: MemoryMap
    across: tuple[Stride, ...]
    down: tuple[Stride, ...]
    anchor: int

    @classmethod
    def of(cls, layout: Layout) -> _Panel:
        storage = layout.build(sample_shape(layout))
        found = map_memory(storage)
        k = storage.k_geometry
        anchor = line_of(found, k.buffer, k.offset)
        across: list[Stride] = []
        down: list[Stride] = []
        for stride in strides_of(layout, storage):
            if stride.elements in (0, 1):
                continue
            same = line_of(found, k.buffer, k.offset + stride.elements) == anchor
            (across if same else down).append(stride)
        across.sort(key=lambda stride: abs(stride.elements))
        return cls(layout, storage, found, tuple(across), tuple(down), anchor)

    @property
    def height(self) -> float:
        """Inches: title, lines, legend, notes, space."""
        return TITLE + self._tops()[-1] + 0.65 + 0.2 * len(self._notes())

    def _tops(self) -> list[float]:
        """Where each line begins, below the title; at the end, where the last one ends."""
        tops, at, buffer = [], 0.0, -1
        for index, line in enumerate(self.found.lines):
            if line.buffer != buffer and len(self.found.rulers) > 1:
                at += 0.26  # the name of the allocation
            buffer = line.buffer
            at += BREAK if line.skipped else 0.0
            at += self._above(index)
            tops.append(at)
            at += LINE + BETWEEN
        return [*tops, at]

    def _above(self, index: int) -> float:
        """Height that the strides above a line take."""
        return 0.1 + LEVEL * len(self.across) if index == self.anchor and self.across else 0.0

    def draw(self, axes: Axes, top: float) -> None:
        """Draw everything, ``top`` inches below the upper edge."""
        self._title(axes, top)
        top += TITLE
        tops = [top + offset for offset in self._tops()]
        buffer = -1
        for index, line in enumerate(self.found.lines):
            if line.buffer != buffer and len(self.found.rulers) > 1:
                owner = "K" if line.buffer == self.storage.k_geometry.buffer else "V"
                at = tops[index] - self._above(index) - 0.1
                axes.text(LEFT, at, f"{owner}'s allocation", fontsize=9, color=INK)
            buffer = line.buffer
            if line.skipped:
                text = f"⋮   {line.skipped:,} elements that hold nothing of this cache   ⋮"
                at = tops[index] - self._above(index) - BREAK / 2 - BETWEEN / 2
                axes.text((LEFT + RIGHT) / 2, at, text,
                          fontsize=8.5, color=QUIET, ha="center", va="center")  # fmt: skip
            self._line(axes, line, tops[index])
        self._across(axes, tops[self.anchor])
        self._down(axes, tops)
        self._legend(axes, tops[-1])

    def _title(self, axes: Axes, top: float) -> None:
        name, shape = self.layout.name, self.storage.shape
        axes.text(0.3, top + 0.2, name, fontsize=13, weight="bold", color=INK, va="center")
        at = 0.3 + _text_width(name, 13) * 1.18 + 0.2
        axes.text(at, top + 0.205, self.layout.description, fontsize=11, color=INK, va="center")
        drawn = f"{shape.num_blocks} blocks of {shape.block_size} tokens"
        if shape.blocks_per_page > 1:
            drawn = f"{shape.num_pages} pages of {shape.blocks_per_page} blocks of {shape.block_size} tokens"
        if shape.num_kv_heads > 1:
            drawn += f", {shape.num_kv_heads} heads"
        if self.storage.others:
            drawn += f", layer {shape.layers // 2} of layers 0 to {shape.layers - 1}"
        text = f"{self.layout.users}.   Drawn: {drawn}; numbers are elements."
        axes.text(0.3, top + 0.5, text, fontsize=9, color=QUIET, va="center")

    def _x(self, line: Line, element: int) -> float:
        return LEFT + self.found.rulers[line.buffer].place(element - line.begin) * (RIGHT - LEFT)

    def _line(self, axes: Axes, line: Line, top: float) -> None:
        rows = [(name, INK) for name in self._all_of(line)]
        rows.append((f"{line.begin:,}", QUIET))
        for row, (text, colour) in enumerate(rows):
            y = top + LINE * (row + 0.5) / len(rows)
            axes.text(LEFT - 0.1, y, text, fontsize=8.5, color=colour, ha="right", va="center")
        for begin, end in gaps_of(line):
            self._gap(axes, line, begin, end, top)
        for run in line.runs:
            left, right = self._x(line, run.begin), self._x(line, run.end)
            edge = 0.8 if right - left > 0.05 else 0.2
            box = Rectangle((left, top), right - left, LINE, edgecolor="white", linewidth=edge)
            box.set_facecolor(COLOURS[run.kind])
            axes.add_patch(box)
            label = self._label(run, right - left)
            if label:
                axes.text((left + right) / 2, top + LINE / 2, label, fontsize=7.5, ha="center",
                          va="center", color=ON_COLOURS[run.kind])  # fmt: skip

    def _all_of(self, line: Line) -> list[str]:
        """What all of this layer's elements in a line have in common, if it is worth a name."""
        shape = self.storage.shape
        per_page = shape.blocks_per_page
        ours = [run.owner for run in line.runs if run.kind in ("k", "v", "both")]
        facts = [
            ("page", shape.num_pages if per_page > 1 else 1, {block // per_page for block, _, _ in ours}),
            ("block", shape.num_blocks, {block for block, _, _ in ours}),
            ("token", shape.block_size, {token for _, token, _ in ours}),
            ("head", shape.num_kv_heads, {head for _, _, head in ours}),
        ]
        return [f"{name} {min(found)}" for name, size, found in facts if size > 1 and len(found) == 1][:1]

    def _gap(self, axes: Axes, line: Line, begin: int, end: int, top: float) -> None:
        left, right = self._x(line, begin), self._x(line, end)
        axes.add_patch(Rectangle((left, top), right - left, LINE, **GAP))
        folded = any(b < end - line.begin and begin - line.begin < e for b, e in
                     self.found.rulers[line.buffer].folds)  # fmt: skip
        text = f"{end - begin:,}" + (" (folded)" if folded else "")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        if max(_text_width(text, 7.5), 0.3) < right - left - 0.05:
            axes.text((left + right) / 2, top + LINE / 2, text, fontsize=7.5, ha="center", va="center",
                      color=QUIET, bbox=box)  # fmt: skip

    def _label(self, run: Run, width: float) -> str:
        """The longest of a few names that fits into a box."""
        if run.kind == "cache":
            names = ["other cache", "other"]
        elif run.kind == "layer":
            names = [f"layer {run.owner[0]}", str(run.owner[0])]
        else:
            block, token, head = run.owner
            part = {"k": "K", "v": "V", "both": "K+V"}[run.kind]
            of_head = self.storage.shape.num_kv_heads > 1 and self.storage.k_geometry.stride[3] > 0
            full = f"block {block} token {token}" + (f" head {head}" if of_head else "")
            short = f"t{token}" + (f" h{head}" if of_head else "")
            names = [f"{part}  {full}", f"{part} {short}", f"{part}\n{short}", part]
        for name in names:
            if max(_text_width(row, 7.5) for row in name.split("\n")) < width - 0.05:
                return name
        return ""

    def _across(self, axes: Axes, top: float) -> None:
        """Strides within a line, above it: from K's first element, the shortest lowest."""
        line, start = self.found.lines[self.anchor], self.storage.k_geometry.offset
        begin = self._x(line, start)
        for level, stride in enumerate(self.across):
            at = top - 0.1 - LEVEL * (level + 0.5)
            end = self._x(line, start + stride.elements)
            axes.plot([end, end], [at, top], color=INK, linewidth=0.6, linestyle=(0, (2, 2)))
            axes.annotate("", (end, at), (begin, at), arrowprops={
                "arrowstyle": "-|>", "color": INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0,
                "mutation_scale": 8})  # fmt: skip
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(max(begin, end) + 0.07, at, _named(stride), fontsize=8.5, color=INK, va="center",
                      bbox=box)  # fmt: skip
        if self.across:
            highest = top - 0.1 - LEVEL * (len(self.across) - 0.5)
            axes.plot([begin, begin], [highest, top], color=INK, linewidth=0.6, linestyle=(0, (2, 2)))

    def _down(self, axes: Axes, tops: list[float]) -> None:
        """Strides that end in another line, at the right of the tape."""
        start, buffer = self.storage.k_geometry.offset, self.storage.k_geometry.buffer
        for column, stride in enumerate(self.down):
            other = line_of(self.found, buffer, start + stride.elements)
            x = RIGHT + 0.15 + 0.2 * column
            ends = [tops[self.anchor] + LINE / 2, tops[other] + LINE / 2]
            for y in ends:
                axes.plot([RIGHT + 0.04, x], [y, y], color=INK, linewidth=0.8)
            axes.annotate("", (x, ends[1]), (x, ends[0]), arrowprops={
                "arrowstyle": "-|>", "color": INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0,
                "mutation_scale": 8})  # fmt: skip
            text_at = RIGHT + 0.28 + 0.2 * (len(self.down) - 1)
            y = ends[0] + (ends[1] - ends[0]) * 0.5
            axes.text(text_at, y, _named(stride, "\n"), fontsize=8.5, color=INK, va="center",
                      linespacing=1.25)  # fmt: skip

    def _letters(self) -> str:
        """What the letters in the formulas stand for."""
        shape = self.storage.shape
        letters = {
            "L": f"{shape.layers} layers",
            "nb": f"{shape.num_pages} {'pages' if shape.blocks_per_page > 1 else 'blocks'}",
            "k": f"{shape.blocks_per_page} blocks in a page",
            "bs": f"{shape.block_size} tokens in a block",
            "h": f"{shape.num_kv_heads} head{'s' * (shape.num_kv_heads > 1)}",
            "d": f"{max(shape.d_qk, shape.d_v)} elements in a row",
            "dk": f"{shape.d_qk} elements in a row of K",
            "dv": f"{shape.d_v} elements in a row of V",
            "r": f"{shape.d_qk + shape.d_v * (shape.form == 'q_v')} elements in a row",
            "size": f"{shape.dtype.itemsize} bytes in an element",
        }
        formulas = " ".join(stride.formula for stride in self.across + self.down)
        used = re.findall(r"[a-zA-Z]+", formulas)
        return ", ".join(f"{letter} = {meaning}" for letter, meaning in letters.items() if letter in used)

    def _legend(self, axes: Axes, top: float) -> None:
        form = self.storage.shape.form
        kinds = {run.kind for line in self.found.lines for run in line.runs}
        items: list[tuple[Patch, str]] = [
            (Patch(facecolor=COLOURS[kind]), MEANINGS[kind][form]) for kind in COLOURS if kind in kinds
        ]
        if any(gaps_of(line) for line in self.found.lines):
            items.append((Patch(**GAP), "a gap: never read, never written"))
        x = LEFT
        for patch, text in items:
            style = {"facecolor": patch.get_facecolor(), "edgecolor": "#BBBBBB", "hatch": patch.get_hatch()}
            axes.add_patch(Rectangle((x, top + 0.05), 0.3, 0.17, linewidth=0.5, **style))  # type: ignore[arg-type]
            axes.text(x + 0.38, top + 0.135, text, fontsize=9, color=INK, va="center")
            x += 0.38 + _text_width(text, 9) + 0.3
        for row, text in enumerate(self._notes()):
            axes.text(LEFT, top + 0.42 + 0.2 * row, text, fontsize=8.5, color=INK, va="center",
                      family="monospace")  # fmt: skip

    def _notes(self) -> list[str]:
        """What a caller passes: shapes, strides, where K and V begin."""
        notes = []
        for name, tensor in (("k", self.storage.k), ("v", self.storage.v)):
            notes.append(
                f"{name}  shape {list(tensor.shape)}  strides {tensor.stride()}  "
                f"begins at element {tensor.storage_offset():,}"
            )
        letters = self._letters()
        return [*notes, *([letters] if letters else []), *self._trap()]

    def _trap(self) -> list[str]:
        """Where a kernel ends up that takes a block to be as long as its tokens."""
        k = self.storage.k_geometry
        axis = 1 if self.storage.shape.blocks_per_page > 1 else 0
        assumed = k.size[2] * k.stride[2]
        target = k.offset + assumed
        runs = [run for line in self.found.lines if line.buffer == k.buffer for run in line.runs]
        if assumed == k.stride[axis] or target >= runs[-1].end:
            return []
        where = "a gap"
        for run in runs:
            if run.begin <= target < run.end:
                where = "another cache" if run.kind == "cache" else f"layer {run.owner[0]}"
                if run.kind in ("k", "v", "both"):
                    block, token, head = run.owner
                    where = f"{'V' if run.kind == 'v' else 'K'} of block {block}, token {token}, head {head}"
        return [
            f"A kernel that takes the next block to be block_size * token stride = {assumed:,} elements away "
            f"reads {where}."
        ]


def _named(stride: Stride, between: str = " ") -> str:
    name = "from K to V" if stride.name == "V" else f"{stride.name} stride"
    formula = f"{stride.formula} = " if stride.formula else ""
    if between == "\n" and len(formula) > 18:
        formula = formula.replace(" + ", "\n+ ").replace(" =", "\n=")
    return f"{name}:{between}{formula}{stride.elements:,}"
