"""Plots of the benchmark's lines: roofline, speed-up bars, and what layouts cost; PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from anystride.bench.lines import Line
from anystride.bench.ratios import geometric_mean, overheads, speed_ups
from anystride.bench.suites import packed_layouts

__all__ = ["draw_plots"]

# Okabe and Ito's colours, which most eyes tell apart; markers for the others.
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#999999", "#B8A500", "#000000")
MARKERS = "osv^D*PXh"
MOST = 3.0  # where the colours of the map of overheads end


def draw_plots(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Draw what the lines can show.

    Args:
        lines: Of one run or of several; each suite gets its own plots.
        folder: Where they go; it is made if it is not there.

    Returns:
        The files: for each suite ``roofline-<suite>`` and, where there are peers, ``speed-up-<suite>``; for
        each case of the suite layouts ``overhead-<case>``; each as PNG and as SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suite in dict.fromkeys(line.suite for line in lines):
        some = [line for line in lines if line.suite == suite]
        figures = {f"roofline-{suite}": _roofline(some), f"speed-up-{suite}": _speed_up(some)}
        if suite == "layouts":
            for case in dict.fromkeys(line.case for line in some):
                figures[f"overhead-{case}"] = _overhead([line for line in some if line.case == case])
        for name, figure in figures.items():
            if figure is None:
                continue
            for kind in ("png", "svg"):
                path = folder / f"{name}.{kind}"
                with mpl.rc_context({"svg.hashsalt": name}):  # the same lines give the same file
                    metadata = {"Date": None} if kind == "svg" else {}
                    figure.savefig(path, dpi=150, metadata=metadata)
                files.append(path)
    return files


def _of_run(line: Line) -> str:
    return f"{line.device}, commit {line.commit}, {line.date[:10]}"


def _roofline(lines: Sequence[Line]) -> Figure | None:
    """Operations a second over operations a byte, under both ceilings of the run."""
    timed = [line for line in lines if line.median_us and line.flop and not line.is_yardstick]
    if not timed:
        return None
    read, product = timed[0].read, timed[0].product
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    knee = product / read
    xs = [line.flop / line.bytes for line in timed]
    low, high = min(*xs, knee) / 2, max(*xs, knee) * 2
    axes.plot([low, knee, high], [low * read / 1e12, product / 1e12, product / 1e12], color="0.3", lw=1)
    near: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"{read / 1e9:.0f} GB/s read", (low, low * read / 1e12), (0, 26), **near)
    text = f"{product / 1e12:.3g} TFLOP/s matrix product"
    axes.annotate(text, (high, product / 1e12), (-4, 4), ha="right", **near)
    for nth, kernel in enumerate(dict.fromkeys(line.kernel for line in timed)):
        some = [line for line in timed if line.kernel == kernel]
        axes.plot(
            [line.flop / line.bytes for line in some],
            [line.flop / (1e-6 * (line.median_us or math.nan)) / 1e12 for line in some],
            MARKERS[nth % len(MARKERS)], color=COLOURS[nth % len(COLOURS)], mfc="none", ms=6, ls="none",
            label=kernel,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="TFLOP/s")
    axes.set_title(f"{timed[0].suite}: {_of_run(timed[0])}", fontsize=10)
    axes.grid(True, which="both", lw=0.2)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _speed_up(lines: Sequence[Line]) -> Figure | None:
    """A bar a row: the best peer's time by the fastest of ours, and who that peer is."""
    found = speed_ups(lines)
    if not found:
        return None
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(found)), layout="constrained")
    axes = figure.subplots()
    found.reverse()  # the first row on top
    ratios = [one.ratio for one in found]
    colours = [COLOURS[0] if ratio >= 1 else COLOURS[3] for ratio in ratios]
    axes.set_xscale("log", base=2)  # twice as fast and half as fast are as long
    axes.barh(range(len(found)), [ratio - 1 for ratio in ratios], left=1, color=colours)
    for nth, one in enumerate(found):
        text = f"{one.ratio:.2f} {one.peer.kernel}"
        place = (max(one.ratio, 1), nth)
        axes.annotate(text, place, (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(found)), [_label(one.ours, found[0].ours) for one in found], fontsize=7)
    axes.axvline(1, color="0.3", lw=1)
    low, high = min(*ratios, 1), max(*ratios, 1)
    margin = (high / low) ** 0.3 * 1.2  # for what stands beside the bars
    axes.set_xlim(low / 1.1, high * margin)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.set_xlabel("time of the best peer by that of the fastest of ours; to the right ours is faster")
    mean = geometric_mean(ratios)
    axes.set_title(f"{found[0].ours.suite}: geometric mean {mean:.2f}; {_of_run(found[0].ours)}", fontsize=10)
    return figure


def _label(line: Line, other: Line) -> str:
    """The case, without what all of them begin with; the layout where it is what differs."""
    name = line.case.removeprefix("bench-")
    return f"{name} {line.layout}" if other.suite in ("layouts", "cpu") else name


def _overhead(lines: Sequence[Line]) -> Figure | None:
    """A map of layouts and kernels: time by that of the same kernel over a packed cache."""
    found = overheads(lines, packed_layouts())
    kernels = list(dict.fromkeys(one.line.kernel for one in found))
    layouts = list(dict.fromkeys(one.line.layout for one in found))
    if len(layouts) < 2:
        return None
    cells = {(one.line.layout, one.line.kernel): one for one in found}
    figure = Figure(figsize=(2.6 + 1.05 * len(kernels), 1.8 + 0.24 * len(layouts)), layout="constrained")
    axes = figure.subplots()
    values = [
        [cells[row, column].ratio if (row, column) in cells else math.nan for column in kernels]
        for row in layouts
    ]
    colours = mpl.colormaps["viridis_r"].with_extremes(bad="0.85")
    image = axes.imshow(values, cmap=colours, vmin=1, vmax=MOST, aspect="auto")
    for y, row in enumerate(layouts):
        for x, column in enumerate(kernels):
            one = cells.get((row, column))
            if one is not None:
                _write(axes, x, y, one.ratio, one.is_copied, one.line.note)
    axes.set_xticks(range(len(kernels)), kernels, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(layouts)), layouts, fontsize=7)
    figure.colorbar(image, ax=axes, label="time by that of a packed cache", extend="max")
    axes.set_title(
        f"{lines[0].case}\n{_of_run(lines[0])}\n+ refused: the copy that it needs, and the packed call",
        fontsize=8,
    )
    return figure


def _write(axes: Axes, x: int, y: int, ratio: float, is_copied: bool, note: str) -> None:
    """What a cell says: a ratio, + where it contains a copy, or the first word of what went wrong."""
    if math.isnan(ratio):
        text, colour = note.partition(":")[0], "black"
    else:
        text, colour = f"{ratio:.2f}{'+' * is_copied}", "white" if ratio > (1 + MOST) / 2 else "black"
    axes.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
