"""The kit's reports in a terminal: readable in 100 columns, and without colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import indent

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from anystride.cli.check_summary import (
    FAMILIES,
    FAULTS,
    MEANINGS,
    READING,
    Cell,
    Group,
    error_of,
    groups_of,
    layout_cell,
    layouts_by_family,
    left_out_of,
    place_of,
    probe_cell,
    probes_of,
    sentence,
    split,
    versions_of,
)
from anystride.testing.report import Report, Verdict

__all__ = ["show_reports"]

STYLES = {
    Verdict.OK: "green",
    Verdict.COPIED: "yellow",
    Verdict.REFUSED: "dim",
    Verdict.WRONG: "bold red",
    Verdict.CRASHED: "bold magenta",
}
MOST_PLACES = 6  # of a refusal that are named


def show_reports(console: Console, reports: Sequence[Report]) -> None:
    """Print everything: versions, both tables, what was wrong, refused, not tried, and who is absent."""
    present, absent = split(reports)
    for name, versions in versions_of(present).items():
        console.print(f"{name:<10} {', '.join(versions)}", highlight=False, markup=False)
    console.print()
    if present:
        _show_kernels(console, present)
        _show_legend(console)
        _show_probes(console, present)
        _show_layouts(console, present)
        _show_faults(console, present)
        _show_refusals(console, present)
    left_out = left_out_of(present)
    if left_out:
        console.print("Not tried", style="bold")
    for why, titles in left_out.items():
        console.print(indent(f"{why}: {', '.join(titles)}", "  "), highlight=False, markup=False)
    if absent:
        console.print("Absent", style="bold")
        for report in absent:
            console.print(indent(f"{report.title}: {report.absent}", "  "), highlight=False, markup=False)


def _show_kernels(console: Console, reports: Sequence[Report]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "version", "findings"):
        table.add_column(heading, overflow="fold")
    for report in reports:
        style = "" if report.is_trustworthy else "bold red"
        table.add_row(escape(report.title), escape(report.version), Text(sentence(report), style))
    console.print(table)
    console.print()


def _show_legend(console: Console) -> None:
    for verdict in Verdict:
        line = Text(f"  {verdict.value:<9}", STYLES[verdict])
        console.print(line.append(MEANINGS[verdict], "not bold default"))
    console.print(f"{READING}\n", highlight=False)


def _show_probes(console: Console, reports: Sequence[Report]) -> None:
    probes = probes_of(reports)
    if probes:
        _show_cells(console, "Probes: one thing alone", "probe", {"": probes}, reports, probe_cell)


def _show_layouts(console: Console, reports: Sequence[Report]) -> None:
    families = layouts_by_family(reports)
    if families:
        title = "Layouts: cases of the table, with NaN in its gaps"
        _show_cells(console, title, "layout", families, reports, layout_cell)


def _show_cells(
    console: Console,
    title: str,
    heading: str,
    rows: dict[str, list[str]],
    reports: Sequence[Report],
    cell_of: Callable[[Report, str], Cell | None],
) -> None:
    """One table, cut into several where the kernels do not fit next to each other."""
    names = [name for group in rows.values() for name in group]
    first = max(map(len, (*names, heading)))
    columns = [[cell_of(report, name) for name in names] for report in reports]
    widths = [
        max(len(text) for text in (*report.title.split(), *(cell.text for cell in cells if cell)))
        for report, cells in zip(reports, columns, strict=True)
    ]
    begin = 0
    while begin < len(reports):
        end, used = begin + 1, first + 2 + widths[begin]
        while end < len(reports) and used + 2 + widths[end] <= console.width:
            used += 2 + widths[end]
            end += 1
        console.print(title, style="bold", highlight=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
        table.add_column(heading, no_wrap=True, min_width=first)
        for report, width in zip(reports[begin:end], widths[begin:end], strict=True):
            table.add_column(escape(report.title), min_width=width, max_width=width, vertical="bottom")
        row = 0
        for family, group in rows.items():
            if family:
                table.add_row(Text(family, "italic"), *[""] * (end - begin))
            for name in group:
                table.add_row(escape(name), *(_text(cells[row]) for cells in columns[begin:end]))
                row += 1
        console.print(table)
        begin = end
        title = f"{title.removesuffix(', continued')}, continued"
        console.print()
    for family in rows:
        if family:
            console.print(FAMILIES[family], highlight=False)
    console.print()


def _text(cell: Cell | None) -> Text:
    return Text(cell.text, STYLES[cell.verdict]) if cell else Text("")


def _show_faults(console: Console, reports: Sequence[Report]) -> None:
    """Every call that was wrong or crashed, by what is said of it."""
    for report in reports:
        groups = groups_of(report, *FAULTS)
        if not groups:
            continue
        count = sum(len(group.findings) for group in groups)
        console.print(f"[bold]{escape(report.title)}: {count} wrong or crashed[/bold]", highlight=False)
        for group in groups:
            _show_message(console, group)
            for finding in group.findings:
                told = [place_of(finding), finding.where, error_of(finding)]
                console.print(indent("\n  ".join(filter(None, told)), "    "), highlight=False, markup=False)
        console.print()


def _show_refusals(console: Console, reports: Sequence[Report]) -> None:
    for report in reports:
        groups = groups_of(report, Verdict.REFUSED)
        if not groups:
            continue
        console.print(f"[bold]{escape(report.title)} refused, in its own words[/bold]", highlight=False)
        for group in groups:
            _show_message(console, group)
            places = list(dict.fromkeys(map(place_of, group.findings)))
            more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES else ""
            named = f"{'; '.join(places[:MOST_PLACES])}{more}"
            console.print(Padding(Text(named, "dim"), (0, 0, 0, 4)), highlight=False)
        console.print()


def _show_message(console: Console, group: Group) -> None:
    """Verdict, message and number of calls of a group."""
    calls = len(group.findings)
    count = f"  ({calls} calls{', with other numbers' if group.alike else ''})" if calls > 1 else ""
    line = Text(f"{group.verdict.value}  ", STYLES[group.verdict])
    line.append(f"{group.message or 'no message'}{count}", "not bold default")
    console.print(Padding(line, (0, 0, 0, 2)), highlight=False)
