"""The commands of ``anystride``: they print, the work is done elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import anystride
from anystride import collect_env
from anystride.cli import demo as demonstration
from anystride.cli.asked import stop, the_case, the_device, the_layout
from anystride.cli.bench import bench
from anystride.cli.catalogue import list_layouts, show_layout
from anystride.cli.check import check
from anystride.cli.drawing import draw
from anystride.testing import LAYOUTS, compatible, find_layout, make_inputs
from anystride.testing.inputs import cache_shape

__all__ = ["app"]

app = typer.Typer(
    help="Paged decode attention over a KV cache of any stride, read in place.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Backend = Annotated[str | None, typer.Option(help="triton, cpu or reference; by default the first that can.")]
Device = Annotated[str, typer.Option(help="Where the tensors lie: cpu, cuda, cuda:1, ...")]

MOST_BYTES = 1 << 30  # a cache that `explain` is ready to fill on a CPU


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Paged decode attention over a KV cache of any stride, read in place."""
    if version:
        typer.echo(anystride.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the picture goes: a file or a folder.")] = Path("."),
    backend: Backend = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = "",
) -> None:
    """Decode four caches of real shape in place, check every layer, and show what a copy would have cost.

    Leaves with 1 if a layer is wrong.
    """
    began = time.perf_counter()
    picture = out if out.suffix.lower() == ".png" else out / "anystride-demo.png"
    where = the_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{where} has no clock here; cpu and cuda have", param_hint="--device")
    size = demonstration.Size.fitting(where)
    console = Console()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else collect_env.processor()
    console.print(f"anystride {anystride.__version__} on {escape(name)}", style="bold", highlight=False)
    console.print(
        f"Each cache: {size.layers} layers, {size.batch} sequences of about {size.tokens:,} tokens, one new "
        "token each. Gaps, unused blocks and tails are NaN.\n",
        highlight=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[tuple[demonstration.Scene, list[demonstration.LayerResult]]] = []
    try:
        with Progress(*columns, console=console) as progress:
            total = len(demonstration.SCENES) * demonstration.steps(size)
            task = progress.add_task("", total=total)
            for scene in demonstration.SCENES:

                def advance(done: str, layout: str = scene.layout) -> None:
                    progress.update(task, description=f"{layout}, {done}", advance=1)

                results = list(demonstration.run_scene(scene, size, where, backend, advance))
                found.append((scene, results))
    except anystride.AnystrideError as error:
        stop(str(error))
    _show_results(console, found)
    picture.parent.mkdir(parents=True, exist_ok=True)
    layouts_shown = [find_layout(scene.layout) for scene, _ in found]
    draw(layouts_shown, picture, "Where K and V of one layer lie in the demonstration's caches")
    console.print(f"picture  {picture.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"took     {time.perf_counter() - began:.1f} s", highlight=False)
    if not all(result.is_right for _, results in found for result in results):
        raise typer.Exit(1)


def _show_results(
    console: Console, found: list[tuple[demonstration.Scene, list[demonstration.LayerResult]]]
) -> None:
    """The table, what is wrong, and the sum of it."""
    table = Table(title="Time and bytes are those of one layer, the median of all", title_style="italic")
    for heading in ("cache", "layers\nright", "largest error\n(allowed)", "V, seen\nfrom K", "backend"):
        table.add_column(heading)
    for heading in ("attention\nin place", "gather into\na packed copy", "the copy\ncosts"):
        table.add_column(heading, justify="right")
    wrong = []
    for scene, results in found:
        right = [result for result in results if result.is_right]
        worst = max(results, key=lambda result: result.error / result.bound)
        middle = sorted(results, key=lambda result: result.seconds)[len(results) // 2]
        copy = sorted(result.copy_seconds for result in results)[len(results) // 2]
        table.add_row(
            f"{scene.title}\n[dim]{scene.layout}[/dim]",
            f"[{'green' if len(right) == len(results) else 'bold red'}]{len(right)} of {len(results)}",
            f"{worst.error:.1e}\n({worst.bound:.1e})",
            results[0].relation,
            results[0].backend,
            _milliseconds(middle.seconds),
            f"{_milliseconds(copy)}\n{results[0].copied_bytes / 1e6:.1f} MB",
            _share(copy / middle.seconds),
        )
        for number, result in enumerate(results):
            if not result.is_right:
                what = f"error {result.error:.2e}, allowed {result.bound:.2e}"
                what += "" if result.untouched else "; the cache was written"
                wrong.append(f"WRONG  {scene.layout}, layer {number}: {what}")
    console.print(table)
    for text in wrong:
        console.print(text, style="bold red", highlight=False)
    every = [result for _, results in found for result in results]
    attention, copies = sum(r.seconds for r in every), sum(r.copy_seconds for r in every)
    megabytes = sum(r.copied_bytes for r in every) / 1e6
    console.print(
        f"{len(every) - len(wrong)} of {len(every)} layers are right, and no byte of a cache was copied.\n"
        f"A kernel that needs a packed cache would first have copied {megabytes:.0f} MB, for one new token "
        f"of each sequence:\n{_milliseconds(copies)} on top of {_milliseconds(attention)} of attention, "
        f"{_share(copies / attention)}, at every step.\n",
        highlight=False,
    )


def _share(ratio: float) -> str:
    return f"+{ratio:.0%}" if ratio >= 0.095 else f"+{ratio:.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


@app.command()
def explain(
    case: Annotated[str, typer.Option(help="A name from the table of cases.")] = "deepseek-v3-h16",
    layout: Annotated[str, typer.Option(help="A name or number from the catalogue.")] = "M2",
    backend: Backend = None,
    device: Device = "cpu",
) -> None:
    """Tell who would run a case in a layout, who refuses and why, and what must move."""
    asked, laid, where = the_case(case), the_layout(layout, "--layout"), the_device(device)
    misfit = compatible(asked, laid)
    if misfit is not None:
        fitting = ", ".join(other.name for other in LAYOUTS.values() if compatible(asked, other) is None)
        raise typer.BadParameter(f"{misfit}; {asked.name} fits {fitting}", param_hint="--layout")
    shape = cache_shape(asked)
    rows = shape.num_blocks * shape.block_size * shape.num_kv_heads
    size = rows * (shape.d_qk + shape.d_v) * shape.dtype.itemsize
    if where.type == "cpu" and size > MOST_BYTES:
        text = f"{asked.name} has a cache of {size / 1e9:.1f} GB; pass --device cuda"
        raise typer.BadParameter(text, param_hint="--case")
    inputs = make_inputs(asked, laid, where, guard=False)
    try:
        told = anystride.explain(**inputs.kwargs, backend=backend)
    except anystride.AnystrideError as error:
        stop(str(error))
    typer.echo(f"{asked.name} ({asked.source}) in {laid.name} ({laid.description})\n\n{told}")


@app.command()
def layouts(
    name: Annotated[str, typer.Argument(help="A name or number; without it all are listed.")] = "",
    png: Annotated[Path | None, typer.Option(help="Draw the layout into this file.")] = None,
) -> None:
    """List the catalogue of layouts, show one, or draw where its K, V, gaps and other layers lie."""
    if not name:
        if png is not None:
            raise typer.BadParameter(
                "name the layout to draw: anystride layouts M2 --png m2.png", param_hint="--png"
            )
        list_layouts(Console())
        return
    layout = the_layout(name, "NAME")
    if png is None:
        show_layout(Console(), layout)
        return
    png.parent.mkdir(parents=True, exist_ok=True)
    draw([layout], png)
    typer.echo(f"{layout.name} is drawn in {png.resolve()}")


app.command()(check)
app.command()(bench)


@app.command()
def env() -> None:
    """Print what a bug report needs."""
    typer.echo(collect_env.report())


if __name__ == "__main__":
    app()
