"""Which elements of a cache's memory belong to K, to V, to other layers or to nothing, wrapped to lines.

What a picture of a layout shows, in a terminal or as a file, comes from here. A buffer becomes lines of
equal length, the largest stride of the cache, so that blocks stand below each other. Works on intervals
and not on elements: the map of a buffer of 2^31 elements is as cheap as that of a small one.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from anystride.testing import CacheShape, Layout, Storage
from anystride.testing.storage import Form, Geometry

__all__ = [
    "Kind",
    "Line",
    "MemoryMap",
    "Run",
    "Stride",
    "gaps_of",
    "line_of",
    "map_memory",
    "sample_shape",
    "strides_of",
]

Kind = Literal["k", "v", "both", "layer", "cache"]


class Run(NamedTuple):
    """Neighbouring elements that hold the same thing.

    Attributes:
        begin: First element, counted from the start of the buffer.
        end: One past the last element.
        kind: ``k``: K alone; ``v``: V alone; ``both``: K and V share the bytes; ``layer``: another layer;
            ``cache``: a cache of another kind.
        owner: ``(block, token, head)`` in this layer, ``(layer,)`` in another one, ``()`` elsewhere.
    """

    begin: int
    end: int
    kind: Kind
    owner: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """A stretch of a buffer that is drawn as one line.

    Attributes:
        buffer: Number of the buffer.
        begin: First element.
        end: One past the last element.
        skipped: Elements in front of it that hold nothing and are not shown.
        runs: What lies in it, cut at its ends, in the order of addresses.
    """

    buffer: int
    begin: int
    end: int
    skipped: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Ruler:
    """Where an element of a line is drawn. Gaps that are longer than all the rest are folded.

    Attributes:
        length: Elements of a line.
        folds: Stretches ``(begin, end)`` of every line that are drawn shorter than they are.
        fold_length: How long a fold is drawn, in elements.
    """

    length: int
    folds: tuple[tuple[int, int], ...]
    fold_length: int

    def place(self, element: int) -> float:
        """From 0, the start of a line, to 1, its end."""
        return self._drawn(element) / self._drawn(self.length)

    def _drawn(self, element: int) -> float:
        drawn = float(element)
        for begin, end in self.folds:
            inside = min(max(element - begin, 0), end - begin)
            drawn -= inside * (1 - self.fold_length / (end - begin))
        return drawn


@dataclass(frozen=True)
class MemoryMap:
    """The lines of a storage and, for each of its buffers, their ruler."""

    lines: tuple[Line, ...]
    rulers: tuple[Ruler, ...]


class Stride(NamedTuple):
    """One stride of K, or the way from K to V, from the first element of K on.

    Attributes:
        name: ``page``, ``block``, ``token``, ``head``, ``dim`` or ``V``.
        elements: How far.
        formula: The same in the catalogue's letters, "" if it is a plain number.
    """

    name: str
    elements: int
    formula: str


def sample_shape(layout: Layout) -> CacheShape:
    """A cache that is small enough to be drawn and that the layout can hold.

    Rows are as wide as in real models, except where every element of a row would be drawn apart.
    """
    form: Form = "kv" if layout.order else layout.forms[0] if len(layout.forms) == 1 else "row"
    wide: dict[Form, tuple[int, int]] = {"kv": (128, 128), "row": (576, 512), "q_v": (64, 512)}
    narrow: dict[Form, tuple[int, int]] = {"kv": (8, 8), "row": (9, 8), "q_v": (4, 8)}
    other: dict[Form, tuple[int, int]] = {"kv": (192, 128), "row": (320, 256), "q_v": (64, 256)}
    orders = [order for order in (layout.order or layout.mla_order, layout.v_order) if order]
    in_rows = all(order[-1] in "DCR" for order in orders) and layout.step == 1
    if not in_rows or layout.lookalike == "same_pointer":
        d_qk, d_v = narrow[form]
    else:
        unequal = layout.only == "other_dims" or layout.name == "G13-unequal-rows"
        d_qk, d_v = (other if unequal else wide)[form]
    per_page = 2 if layout.only == "pages" else 1
    fp8 = layout.only == "fp8" or layout.name == "G12-quantised-row"  # its rows have 132 bytes
    return CacheShape(
        num_blocks=3 * per_page,
        block_size=2 if (d_qk, d_v) == narrow[form] else 4,
        num_kv_heads=2 if form == "kv" and not layout.absurd else layout.min_heads,
        d_qk=d_qk,
        d_v=d_v,
        dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16,
        form=form,
        blocks_per_page=per_page,
    )


def strides_of(layout: Layout, storage: Storage) -> list[Stride]:
    """The strides of K that mean something, and the distance from K to V where they share a buffer."""
    formulas = _split(layout.strides if storage.shape.form == "kv" else layout.mla_strides)
    if len(formulas) == 4:  # page, token, head, dim: blocks are pages
        formulas.insert(1, formulas[0])
    names = ["page", "block", "token", "head", "dim"]
    if storage.shape.blocks_per_page == 1:
        names[0] = "block"
    k, v = storage.k_geometry, storage.v_geometry
    found = [
        Stride(name, stride, "" if formula.isdigit() else formula)
        for name, size, stride, formula in zip(names, k.size, k.stride, formulas, strict=True)
        if size > 1
    ]
    if k.buffer == v.buffer:
        formula = layout.v_from_k if storage.shape.form == "kv" else ""
        found.append(Stride("V", v.offset - k.offset, "" if formula.isdigit() else formula))
    return found


def _split(formulas: str) -> list[str]:
    """Cut at commas that stand in no bracket."""
    return re.split(r",\s*(?![^()]*\))", formulas)


def map_memory(storage: Storage) -> MemoryMap:
    """Map all buffers of a storage."""
    lines: list[Line] = []
    rulers: list[Ruler] = []
    for buffer, flat in enumerate(storage.buffers):
        runs = list(_runs(storage, buffer))
        length = _line_length(storage, buffer)
        found = list(_lines(runs, buffer, length, flat.numel()))
        lines += found
        rulers.append(_ruler(found, length))
    return MemoryMap(tuple(lines), tuple(rulers))


def _rows(geometry: Geometry) -> Iterator[tuple[tuple[int, int, int], int, int]]:
    """Owner, begin and end of every stretch of neighbouring elements of a view."""
    pages, blocks, tokens, heads, d = geometry.size
    stride_page, stride_block, stride_token, stride_head, stride_dim = geometry.stride
    for page, block, token, head in itertools.product(*map(range, (pages, blocks, tokens, heads))):
        begin = geometry.offset + page * stride_page + block * stride_block
        begin += token * stride_token + head * stride_head
        owner = (page * blocks + block, token, head)
        if stride_dim == 1:
            yield owner, begin, begin + d
        else:
            yield from ((owner, begin + i * stride_dim, begin + i * stride_dim + 1) for i in range(d))


def _runs(storage: Storage, buffer: int) -> Iterator[Run]:
    """What lies in a buffer, in the order of addresses; K and V come before everything else."""
    pieces: list[tuple[str, tuple[int, ...], int, int]] = []  # part, owner, begin, end
    for part, geometry in (("k", storage.k_geometry), ("v", storage.v_geometry)):
        if geometry.buffer == buffer:
            pieces += [(part, *row) for row in _rows(geometry)]
    ours = storage.shape.layers // 2
    for index, geometry in enumerate(storage.others):
        if geometry.buffer != buffer:
            continue
        if len(geometry.size) == 2:  # the part of each page that another cache takes
            starts = (geometry.offset + page * geometry.stride[0] for page in range(geometry.size[0]))
            pieces += [("cache", (), start, start + geometry.size[1]) for start in starts]
        else:
            layer = index // 2 + (index // 2 >= ours)  # each layer gives K, then V
            pieces += [("layer", (layer,), begin, end) for _, begin, end in _rows(geometry)]
    edges = sorted({edge for _, _, begin, end in pieces for edge in (begin, end)})
    held: list[dict[str, tuple[int, ...]]] = [{} for _ in edges]
    for part, owner, begin, end in pieces:
        for index in range(bisect_left(edges, begin), bisect_left(edges, end)):
            held[index].setdefault(part, owner)
    last: Run | None = None
    for begin, end, parts in zip(edges, edges[1:], held, strict=False):
        run = _run(begin, end, parts)
        if last and run and last.end == begin and (last.kind, last.owner) == (run.kind, run.owner):
            last = last._replace(end=end)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


def _run(begin: int, end: int, parts: dict[str, tuple[int, ...]]) -> Run | None:
    if "k" in parts:
        return Run(begin, end, "both" if "v" in parts else "k", parts["k"])
    if "v" in parts:
        return Run(begin, end, "v", parts["v"])
    if "layer" in parts:
        return Run(begin, end, "layer", parts["layer"])
    return Run(begin, end, "cache", ()) if parts else None


def _line_length(storage: Storage, buffer: int) -> int:
    """The largest stride of K and V: with it, what an index steps over stands below each other."""
    geometries = [g for g in (storage.k_geometry, storage.v_geometry) if g.buffer == buffer]
    used = [s for g in geometries for n, s in zip(g.size, g.stride, strict=True) if n > 1]
    return max(used)


def _lines(runs: list[Run], buffer: int, length: int, total: int) -> Iterator[Line]:
    """Cut runs into lines; lines that hold nothing are left out and counted."""
    cut: dict[int, list[Run]] = {}
    for run in runs:
        for number in range(run.begin // length, (run.end - 1) // length + 1):
            begin, end = max(run.begin, number * length), min(run.end, (number + 1) * length)
            cut.setdefault(number, []).append(run._replace(begin=begin, end=end))
    expected = 0
    for number in sorted(cut):
        begin, end = number * length, min((number + 1) * length, total)
        yield Line(buffer, begin, end, (number - expected) * length, tuple(cut[number]))
        expected = number + 1


def _ruler(lines: list[Line], length: int) -> Ruler:
    covered = sorted((r.begin - line.begin, r.end - line.begin) for line in lines for r in line.runs)
    gaps, reached = [], 0
    for begin, end in [*covered, (length, length)]:
        if begin > reached:
            gaps.append((reached, begin))
        reached = max(reached, end)
    full = length - sum(end - begin for begin, end in gaps)
    folds = tuple(gap for gap in gaps if gap[1] - gap[0] > full)
    return Ruler(length, folds, max(1, full // 6))


def gaps_of(line: Line) -> list[tuple[int, int]]:
    """The stretches of a line that hold nothing: begin and end, in elements of the buffer."""
    edges = [line.begin, *(edge for run in line.runs for edge in (run.begin, run.end)), line.end]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


def line_of(found: MemoryMap, buffer: int, element: int) -> int:
    """The index of the line in which an element of a buffer is drawn."""
    for index, line in enumerate(found.lines):
        if line.buffer == buffer and line.begin <= element < line.end:
            return index
    raise ValueError(f"element {element} of buffer {buffer} is in no line")
