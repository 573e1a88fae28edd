"""The benchmark's lines in a terminal: a table a suite, what it comes to, and what has changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anystride.bench.lines import Change, Line
from anystride.bench.ratios import Overhead, by_row, geometric_mean, overheads, speed_ups
from anystride.bench.run import head_of
from anystride.bench.suites import SUITES, packed_layouts

__all__ = ["show_changes", "show_lines"]

# Headings, and how many characters they must have: names and notes wrap before numbers do.
COLUMNS = {"median us": 9, "quartiles": 17, "host us": 7, "GB/s": 5, "of read": 7, "of matrix": 9}
VERDICTS = {"slower": "bold red", "no longer timed": "bold red", "faster": "green", "": "dim"}


def show_lines(console: Console, lines: Sequence[Line]) -> None:
    """Print a table for each suite, and the sum of it."""
    for suite in dict.fromkeys(line.suite for line in lines):
        some = [line for line in lines if line.suite == suite]
        console.print(head_of(some[0]), highlight=False, markup=False)
        console.print(_table(suite, some))
        _show_speed_ups(console, some)
        if suite == "layouts":
            _show_overheads(console, some)


def _table(suite: str, lines: Sequence[Line]) -> Table:
    title = f"{suite}: {SUITES.get(suite, '')}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("kernel", min_width=24, overflow="fold")
    for heading, width in COLUMNS.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for (_, case, layout), row in by_row(lines).items():
        table.add_row(f"[bold]{escape(case)}[/bold] [dim]{escape(layout)}[/dim]")
        fastest = min((line.median_us for line in row if line.median_us and not line.is_yardstick), default=0)
        for line in row:
            table.add_row(*_cells(line, line.median_us == fastest))
        table.add_section()
    return table


def _cells(line: Line, is_fastest: bool) -> list[str]:
    name = escape(line.kernel)
    if line.median_us is None:
        style = "bold red" if line.note.startswith("WRONG") else "dim"
        return [f"  {name} [{style}]{escape(line.note)}[/{style}]"]
    name = f"[dim]{name}[/dim]" if line.is_yardstick else f"[green]{name}[/green]" if is_fastest else name
    return [
        f"  {name}",
        f"{line.median_us:.1f}",
        f"{line.q1_us:.1f} - {line.q3_us:.1f}",
        "" if line.host_us is None else f"{line.host_us:.1f}",
        f"{line.bytes_a_second / 1e9:.0f}",
        f"{line.of_read:.0%}",
        f"{line.of_product:.0%}" if line.flop else "",
    ]


def _show_speed_ups(console: Console, lines: Sequence[Line]) -> None:
    found = speed_ups(lines)
    if not found:
        return
    mean = geometric_mean([one.ratio for one in found])
    console.print(
        f"The fastest of ours against the best peer, geometric mean of {len(found)} rows: {mean:.2f}",
        highlight=False,
    )
    for one in sorted(found, key=lambda one: one.ratio):
        if one.ratio < 1:
            text = f"  slower than {one.peer.kernel}: {one.ours.case} {one.ours.layout}: {one.ratio:.2f}"
            console.print(text, highlight=False, markup=False)


def _show_overheads(console: Console, lines: Sequence[Line]) -> None:
    """Each layout's time by that of a packed cache, a table a case."""
    found = overheads(lines, packed_layouts())
    for case in dict.fromkeys(one.line.case for one in found):
        some = [one for one in found if one.line.case == case]
        kernels = list(dict.fromkeys(one.line.kernel for one in some))
        layouts = list(dict.fromkeys(one.line.layout for one in some))
        if len(layouts) < 2:
            continue
        table = Table(
            title=f"{case}: time by that of a packed cache", title_justify="left", title_style="bold"
        )
        table.add_column("layout", no_wrap=True)
        for kernel in kernels:
            table.add_column(kernel, justify="right")
        cells = {(one.line.layout, one.line.kernel): one for one in some}
        for layout in layouts:
            table.add_row(
                escape(layout), *(_overhead_cell(cells.get((layout, kernel))) for kernel in kernels)
            )
        console.print(table)
    if found:
        text = "copied: refused; the copy that it would need and the packed call, together\n"
        console.print(text, highlight=False)


def _overhead_cell(one: Overhead | None) -> str:
    if one is None:
        return ""
    if math.isnan(one.ratio):
        return f"[dim]{escape(one.line.note.partition(':')[0])}[/dim]"
    return f"[yellow]{one.ratio:.2f} copied[/yellow]" if one.is_copied else f"{one.ratio:.2f}"


def show_changes(console: Console, changes: Sequence[Change]) -> None:
    """Print what is slower, faster, or no longer timed, and how many stay within the spread."""
    table = Table()
    for heading in ("suite", "case", "layout", "kernel"):
        table.add_column(heading)
    for heading in ("old us", "new us", "ratio", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    changed = [change for change in changes if change.verdict]
    for change in sorted(changed, key=lambda change: -change.ratio if change.ratio == change.ratio else -1e9):
        style = VERDICTS[change.verdict]
        median = change.new.median_us
        table.add_row(
            *map(escape, change.new.key),
            f"{change.old.median_us:.1f}",
            escape(change.new.note) if median is None else f"{median:.1f}",
            "" if median is None else f"{change.ratio:.2f}",
            f"[{style}]{change.verdict}[/{style}]",
        )
    if changed:
        console.print(table)
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in VERDICTS}
    told = [f"{count} {verdict or 'within the spread'}" for verdict, count in counts.items() if count]
    console.print(f"{len(changes)} measurements: {', '.join(told)}", highlight=False)
