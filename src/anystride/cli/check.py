"""``anystride check``: ask the kit, show what it found, store it, make a page of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from anystride.cli.asked import near, the_case, the_device, the_layout
from anystride.cli.check_page import page
from anystride.cli.check_terminal import show_reports
from anystride.testing.choice import exit_code, kernels_asked_for, words
from anystride.testing.conformance import check as check_kernel
from anystride.testing.probes import PROBES
from anystride.testing.report import Finding, Report, load_reports, save_reports

__all__ = ["check"]

Names = "Names with commas between them, or none"


def check(
    kernels: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KERNEL",
            help="A back end, a peer, module:function, or all; by default the back ends for the device.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = "",
    cases: Annotated[str, typer.Option(help=f"{Names}; by default a few of real models.")] = "",
    layouts: Annotated[str, typer.Option(help=f"{Names}; by default the whole catalogue.")] = "",
    probes: Annotated[str, typer.Option(help=f"{Names}; by default all.")] = "",
    json: Annotated[Path | None, typer.Option(help="Store the reports here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Make a page of them here.")] = None,
    peers: Annotated[Path | None, typer.Option(help="The folder of peers that are not installed.")] = None,
    no_isolation: Annotated[
        bool, typer.Option("--no-isolation", help="Call kernels in this process: a crash ends it.")
    ] = False,
    stored: Annotated[
        list[Path] | None, typer.Option("--from", help="Show reports that were stored, and run nothing.")
    ] = None,
) -> None:
    """Call kernels in every layout and with one trap after another; tell what they can be trusted with.

    Leaves with 1 if a call was wrong or crashed, with 2 if there was nothing to call.
    """
    console = Console()
    for path in (json, html):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if stored:
        if kernels:
            raise typer.BadParameter("shows what is stored and runs no kernel", param_hint="--from")
        reports = _stored(stored)
        if json:
            save_reports(json, reports)
    else:
        where = the_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            names = kernels_asked_for(kernels or [], where.type)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="KERNEL") from None
        asked = {
            "cases": _typed(cases, lambda name: the_case(name, "--cases").name),
            "layouts": _typed(layouts, lambda name: the_layout(name, "--layouts").name),
            "probes": _typed(probes, _the_probe),
            "device": str(where),
            "isolate": not no_isolation,
            "peers_folder": peers,
        }
        sys.path.insert(0, str(Path.cwd()))  # a command has no folder of its caller's there, as python -m has
        reports = _run(console, names, asked, json)
    show_reports(console, reports)
    if html:
        html.write_text(page(reports), "utf-8")
    for name, path in (("reports", json), ("page", html)):
        if path:
            console.print(f"{name:<8} {path.resolve()}", highlight=False, markup=False, soft_wrap=True)
    if code := exit_code(reports):
        raise typer.Exit(code)


def _run(console: Console, names: Sequence[str], asked: dict[str, Any], json: Path | None) -> list[Report]:
    """Check one kernel after the other; what is done is stored, whatever becomes of the next."""
    reports: list[Report] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in names:
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int, finding: Finding, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            reports.append(check_kernel(name, progress=advance, **asked))
            progress.stop_task(task)
            if json:
                save_reports(json, reports)
    return reports


def _stored(paths: Sequence[Path]) -> list[Report]:
    try:
        return [report for path in paths for report in load_reports(path)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise typer.BadParameter(f"no reports are stored there: {error}", param_hint="--from") from None


def _typed(text: str, find: Callable[[str], str]) -> list[str] | None:
    """The full names of what was typed; None for the default of the kit."""
    typed = words(text)
    return None if typed is None else [find(name) for name in typed]


def _the_probe(name: str) -> str:
    names = [probe.name for probe in PROBES]
    if name not in names:
        text = f"there is no probe {name!r}; {near(name, names)}"
        raise typer.BadParameter(text, param_hint="--probes")
    return name
