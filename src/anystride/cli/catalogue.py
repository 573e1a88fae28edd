"""The catalogue of layouts in a terminal: a list of all, and one of them with a map of its memory."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from anystride.cli.memory_map import (
    Kind,
    Line,
    MemoryMap,
    Ruler,
    gaps_of,
    map_memory,
    sample_shape,
    strides_of,
)
from anystride.testing import LAYOUTS, Layout, Storage

__all__ = ["list_layouts", "show_layout", "text_lines"]

# What stands for a kind in a terminal; a gap is a dot.
CHARACTERS: dict[Kind, str] = {"k": "K", "v": "V", "both": "B", "layer": "o", "cache": "x"}

COLOURS = {"K": "#56B4E9", "V": "#E69F00", "B": "#009E73", "o": "bright_black", "x": "bright_black"}
AXES = {
    "B": "block, or page of blocks",
    "S": "block in the page",
    "T": "token",
    "H": "head",
    "L": "layer",
    "2": "K then V",
    "D": "row of K or of V",
    "C": "both rows side by side",
    "R": "MLA row",
}
FORMS = {
    "kv": "K and V of their own",
    "row": "MLA, V in K's row",
    "q_v": "MLA, the row given in two parts",
}
MEANINGS = {
    "K": "keys",
    "V": "values",
    "B": "keys and values, the same bytes",
    "o": "other layers",
    "x": "another cache",
    ".": "a gap",
    "~": "a long gap, folded",
}


FAMILIES = {
    "gqa": "K and V of their own (GQA, MQA, MHA)",
    "mla": "MLA: V is a part of K's row, or the row is given in two parts",
    "adversarial": "Adversarial: no engine does this, any may",
}


def list_layouts(console: Console) -> None:
    """A table for each family, and what the letters mean."""
    for family, title in FAMILIES.items():
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("name", no_wrap=True)
        for heading in ("used by", "order", "forms", "relation", "strides of K"):
            table.add_column(heading)
        for layout in LAYOUTS.values():
            if family == ("adversarial" if layout.name.startswith("A-") else layout.family):
                table.add_row(*map(escape, _row(layout)))
        console.print(table)
    forms = "; ".join(f"{form} {meaning}" for form, meaning in FORMS.items())
    console.print(
        f"{len(LAYOUTS)} layouts.\n"
        f"Order, outermost first: {_axes(' '.join(AXES))}.\n"
        f"Forms: {forms}.\n"
        "Strides, in elements, of block, token, head, dim, with S of page, block, token, head, dim: nb "
        "blocks, bs tokens, h heads, dk, dv, d the larger of them, r the MLA row, L layers, k blocks in a "
        "page, size bytes of an element, up(x, m) rounded up, far(n) beyond 2^31.\n"
        "anystride layouts NAME shows one; with --png FILE as a picture.",
        highlight=False,
        markup=False,
    )


def _row(layout: Layout) -> tuple[str, ...]:
    """A layout in the list; one that has two orders has two lines of order and strides."""
    orders = [order for order in (layout.order, layout.mla_order) if order]
    strides = [text for text in (layout.strides, layout.mla_strides) if text]
    relation = layout.relation(sample_shape(layout)).kind
    return (
        layout.name,
        layout.users,
        "\n".join(orders),
        ", ".join(_forms(layout)),
        relation,
        "\n".join(strides),
    )


def _forms(layout: Layout) -> list[str]:
    """The forms of a cache for which the layout has an order."""
    return [form for form in layout.forms if (layout.order if form == "kv" else layout.mla_order)]


def _axes(order: str) -> str:
    return ", ".join(f"{axis} {AXES[axis]}" for axis in order.split())


def show_layout(console: Console, layout: Layout) -> None:
    """One layout in text: facts, strides, and a map of a small cache."""
    shape = sample_shape(layout)
    storage = layout.build(shape)
    order = layout.order if shape.form == "kv" else layout.mla_order
    kind, offset = layout.relation(shape)
    rows = [
        ("used by", layout.users),
        ("order", f"{order}   ({_axes(order)})"),
        ("forms", "; ".join(FORMS[form] for form in _forms(layout))),
        ("relation", kind if kind == "separate" else f"{kind}: V at element {offset} of K's row"),
    ]
    for stride in strides_of(layout, storage):
        name = "K to V" if stride.name == "V" else stride.name
        formula = f"{stride.formula} = " if stride.formula else ""
        heading = "" if rows[-1][0] in ("strides", "") else "strides"
        rows.append((heading, f"{name:<8}{formula}{stride.elements:,}"))
    console.print(f"[bold]{escape(layout.name)}[/bold]   {escape(layout.description)}", highlight=False)
    for heading, text in rows:
        console.print(f"{heading:<10}{text}", highlight=False, markup=False)
    of_pages = f" in pages of {shape.blocks_per_page}" if shape.blocks_per_page > 1 else ""
    console.print(
        f"\nThe map of {shape.num_blocks} blocks{of_pages}, {shape.block_size} tokens, {shape.num_kv_heads} "
        f"KV heads, {shape.d_qk} and {shape.d_v} elements a row; each line with its first element:",
        highlight=False,
    )
    _print_map(console, storage)


def _print_map(console: Console, storage: Storage) -> None:
    found = map_memory(storage)
    margin = 18
    buffer, seen = 0, set()
    for line, characters in zip(found.lines, text_lines(found, console.width - margin), strict=True):
        if line.buffer != buffer:
            console.print(f"{'':{margin}}the second allocation:")
        buffer = line.buffer
        if line.skipped:
            console.print(f"{'':{margin}}{line.skipped:,} elements that hold nothing", highlight=False)
        text = Text(f"{line.begin:>{margin - 2},}  ")
        for character in characters:
            text.append(character, COLOURS.get(character, "dim"))
        console.print(text)
        seen |= set(characters)
    legend = [f"{character} {meaning}" for character, meaning in MEANINGS.items() if character in seen]
    console.print(f"\n{'   '.join(legend)}", highlight=False)


def text_lines(found: MemoryMap, width: int) -> list[str]:
    """The map in characters, one string a line, at most ``width`` long.

    What is narrower than a character still gets one, a gap too; a folded gap is a row of ``~``.
    """
    columns = [_columns(found, buffer, width) for buffer in range(len(found.rulers))]
    return [_text(line, found.rulers[line.buffer], columns[line.buffer]) for line in found.lines]


def _columns(found: MemoryMap, buffer: int, width: int) -> int:
    """The largest number of columns in which every edge falls between two characters, or ``width``."""
    ruler = found.rulers[buffer]
    lines = [line for line in found.lines if line.buffer == buffer]
    edges = {edge - line.begin for line in lines for run in line.runs for edge in (run.begin, run.end)}
    for columns in range(width, width // 2, -1):
        if not ruler.folds and all(edge * columns % ruler.length == 0 for edge in edges):
            return columns
    return width


def _text(line: Line, ruler: Ruler, columns: int) -> str:
    length = max(1, round(ruler.place(line.end - line.begin) * columns))
    characters = ["."] * length
    stretches = [(run.begin, run.end, CHARACTERS[run.kind]) for run in line.runs]
    for begin, end in gaps_of(line):
        folded = any(begin - line.begin <= left and right <= end - line.begin for left, right in ruler.folds)
        stretches.append((begin, end, "~" if folded else "."))
    narrow = []
    for begin, end, character in stretches:
        left, right = (ruler.place(edge - line.begin) * columns for edge in (begin, end))
        centres = [i for i in range(length) if left <= i + 0.5 < right]
        for index in centres:
            characters[index] = character
        if not centres:
            narrow.append((min(int((left + right) / 2), length - 1), character))
    for index, character in narrow:  # last, so that nothing wider covers them
        characters[index] = character
    return "".join(characters)
