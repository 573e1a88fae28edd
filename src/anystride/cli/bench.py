"""``anystride bench``: time the suites, show the lines, store them, draw them, compare two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anystride.bench import store
from anystride.bench.clock import ROUNDS
from anystride.bench.lines import Line, append, compare, load
from anystride.bench.measure import Bench
from anystride.bench.run import RESULTS, device_for, exit_code, file_of, head_of, rows_asked_for, start
from anystride.bench.suites import SUITES, Row
from anystride.cli.asked import near
from anystride.cli.bench_plots import draw_plots
from anystride.cli.bench_terminal import show_changes, show_lines

__all__ = ["bench"]


def bench(
    suite: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SUITES)}; may be given several times.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Ours to time; by default the usual ones of the device.")
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="The folder of peers that are not installed.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A peer to leave out.")] = None,
    only: Annotated[str, typer.Option(help="Rows whose case or layout contains this.")] = "",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...; by default what the suite is for.")] = "",
    hot: Annotated[
        bool, typer.Option("--hot", help="Leave the L2 cache as the call before left it.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each kernel.", min=1)] = ROUNDS,
    results: Annotated[Path, typer.Option(help="The folder of the lines.")] = RESULTS,
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder.")] = None,
    commit: Annotated[str, typer.Option(help="What runs, where git cannot tell.")] = "",
    stored: Annotated[
        list[Path] | None, typer.Option("--from", help="Show and draw stored lines, and run nothing.")
    ] = None,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="OLD NEW", help="What has become slower between two files."),
    ] = None,
) -> None:
    """Time our back ends and every peer that is there, each checked first, in one run.

    Leaves with 1 if a kernel of ours was wrong or, with --compare, has become slower; with 2 if nothing was
    timed.
    """
    console = Console()
    if sum(map(bool, (suite, stored, compared))) != 1:
        raise typer.BadParameter("give --suite, --from or --compare, one of them", param_hint="--suite")
    if compared:
        if not _compare(console, *compared):
            raise typer.Exit(1)
        return
    if stored:
        lines = [line for path in stored for line in _load(path, "--from") if only in _name(line)]
        show_lines(console, lines)
    else:
        for name in suite or []:
            if name not in SUITES:
                text = f"there is no suite {name!r}; {near(name, list(SUITES))}"
                raise typer.BadParameter(text, param_hint="--suite")
        rows = {name: rows_asked_for(name, only) for name in dict.fromkeys(suite or [])}
        if not any(rows.values()):
            raise typer.BadParameter(f"no row has {only!r} in its name", param_hint="--only")
        try:
            where = device_for(list(rows), device)
            asked = start(where, backend or [], peers, without or [], hot, rounds, commit)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--suite") from None
        lines = _run(console, asked, rows, results)
    if plots is not None:
        for path in draw_plots(lines, plots):
            console.print(f"plot     {path.resolve()}", highlight=False, markup=False, soft_wrap=True)
    if code := exit_code(lines):
        raise typer.Exit(code)


def _run(
    console: Console, asked: Bench, rows: Mapping[str, Sequence[Row | store.Row]], results: Path
) -> list[Line]:
    """Time suites one after the other; what is done is stored, whatever becomes of the next row."""
    every: list[Line] = []
    for name, some in rows.items():
        path = file_of(results, name, asked.facts)
        lines = _time(console, asked, name, some, path)
        show_lines(console, lines)
        if lines:
            console.print(f"lines    {path.resolve()}\n", highlight=False, markup=False, soft_wrap=True)
        every += lines
    for name, why in asked.absent.items():
        console.print(f"absent   {name}: {why}", highlight=False, markup=False)
    return every


def _time(
    console: Console, asked: Bench, name: str, rows: Sequence[Row | store.Row], path: Path
) -> list[Line]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lines: list[Line] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(rows))
        for row in rows:
            progress.update(task, description=f"{name}: {row.name}")
            done = asked.measure(row)
            append(path, done)
            lines += done
            progress.advance(task)
    return lines


def _compare(console: Console, old: Path, new: Path) -> bool:
    """Show what has changed; whether no kernel of ours is slower, and none is no longer timed."""
    before, after = _load(old, "--compare"), _load(new, "--compare")
    try:
        changes = compare(before, after)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from None
    if not changes:
        raise typer.BadParameter("the two files have no measurement in common", param_hint="--compare")
    console.print(f"old      {head_of(before[0])}", highlight=False, markup=False)
    console.print(f"new      {head_of(after[0])}", highlight=False, markup=False)
    show_changes(console, changes)
    return not any(
        change.new.is_ours and change.verdict in ("slower", "no longer timed") for change in changes
    )


def _load(path: Path, hint: str) -> list[Line]:
    try:
        lines = load(path)
    except (OSError, ValueError, TypeError) as error:
        raise typer.BadParameter(f"no lines are stored there: {error}", param_hint=hint) from None
    if not lines:
        raise typer.BadParameter(f"{path} is empty", param_hint=hint)
    return lines


def _name(line: Line) -> str:
    return f"{line.case} {line.layout}"
