"""The catalogue of layouts: built as the survey says, poisoned, and of no influence on a result's bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from anystride.problem import Relation, find_relation
from anystride.testing import (
    LAYOUTS,
    CacheShape,
    Case,
    Inputs,
    Layout,
    Storage,
    compatible,
    fill,
    find_case,
    find_layout,
    make_inputs,
    occupancy,
)
from anystride.testing.judgement import assert_right, attend
from anystride.testing.recipe import far, round_up
from anystride.testing.rows import ROW_RECIPES, TABLE_RECIPES
from anystride.testing.storage import Geometry, read

BACKENDS = ("reference", "cpu")
TWO_GIGA = 2**31  # elements: the first offset that 32 signed bits cannot hold

# Shapes of every form, all sizes different where they can be: an axis in the wrong place shows.
SHAPES = {
    "kv": CacheShape(5, 6, 3, 16, 16),
    "kv-k-wider": CacheShape(4, 6, 2, 24, 16),
    "kv-v-wider": CacheShape(4, 6, 2, 16, 24),
    "kv-one-head": CacheShape(4, 6, 1, 16, 16),
    "kv-one-token": CacheShape(7, 1, 1, 16, 16),
    "kv-one-token-wider": CacheShape(7, 1, 1, 24, 16),
    "kv-odd": CacheShape(4, 3, 2, 33, 27),
    "kv-fp8": CacheShape(5, 16, 2, 128, 128, torch.float8_e4m3fn),
    "kv-fp32": CacheShape(5, 6, 2, 16, 16, torch.float32),
    "kv-pages": CacheShape(12, 6, 2, 16, 16, blocks_per_page=3),
    "kv-dense": CacheShape(1, 40, 2, 16, 16, paged=False),
    "row": CacheShape(5, 6, 1, 48, 32, form="row"),
    "row-heads": CacheShape(5, 6, 2, 48, 32, form="row"),
    "row-v-is-k": CacheShape(5, 6, 1, 32, 32, form="row"),
    "row-deepseek": CacheShape(3, 16, 1, 576, 512, form="row"),
    "row-fp8": CacheShape(5, 6, 1, 48, 32, torch.float8_e5m2, "row"),
    "row-pages": CacheShape(12, 6, 1, 48, 32, form="row", blocks_per_page=4),
    "row-dense": CacheShape(1, 40, 1, 48, 32, form="row", paged=False),
    "q_v": CacheShape(5, 6, 1, 16, 32, form="q_v"),
    "q_v-heads": CacheShape(5, 6, 2, 16, 32, form="q_v"),
    "q_v-even": CacheShape(5, 6, 1, 32, 32, form="q_v"),
    "q_v-one-token": CacheShape(7, 1, 1, 16, 32, form="q_v"),
    "q_v-pages": CacheShape(12, 6, 1, 16, 32, form="q_v", blocks_per_page=4),
    "q_v-dense": CacheShape(1, 40, 1, 16, 32, form="q_v", paged=False),
}


def fitting(*names: str) -> list[Any]:
    """All layouts, each with every shape (of these names) that it can hold."""
    pairs = [
        pytest.param(layout, SHAPES[name], id=f"{layout.name}-{name}")
        for layout in LAYOUTS.values()
        for name in names or SHAPES
        if layout.misfit(SHAPES[name]) is None
    ]
    assert pairs
    return pairs


# ---------------------------------------------------------------------------------------------------
# Strides: the recipe, the formula written beside it, and a view made by torch are one and the same.
# ---------------------------------------------------------------------------------------------------


def unflatten(pages: Tensor, inner: tuple[int, ...]) -> Tensor:
    """``[n, *inner]`` from ``[n, payload]``."""
    return pages.unflatten(1, inner)  # type: ignore[no-any-return]


class Sizes(NamedTuple):
    """The letters of the formulas; see ``recipe.py``."""

    nb: int
    bs: int
    h: int
    dk: int
    dv: int
    d: int
    r: int
    k: int
    L: int
    l: int
    size: int
    form: str

    def empty(self, *size: int) -> Tensor:
        """No memory: the meta device knows strides and nothing else."""
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def pages(self, extra: int, *inner: int, front: int = 0) -> Tensor:
        """``[nb, *inner]``, with ``front`` elements before and ``extra`` after the payload of each page."""
        payload = torch.Size(inner).numel()
        return unflatten(self.empty(self.nb, front + payload + extra)[:, front : front + payload], inner)


def sizes_of(layout: Layout, shape: CacheShape) -> Sizes:
    in_blocks = "S" in (layout.order if shape.form == "kv" else layout.mla_order).split()
    tokens = shape.block_size * (1 if in_blocks else shape.blocks_per_page)
    r = shape.d_qk if shape.form == "row" else shape.d_qk + shape.d_v
    return Sizes(
        shape.num_pages, tokens, shape.num_kv_heads, shape.d_qk, shape.d_v, max(shape.d_qk, shape.d_v), r,
        shape.blocks_per_page, shape.layers, shape.layers // 2, shape.dtype.itemsize, shape.form,
    )  # fmt: skip


Views = tuple[Tensor, Tensor]


def kv(s: Sizes, both: Tensor) -> Views:
    """K and V of ``[nb, 2, bs, h, d]``."""
    return both[:, 0, ..., : s.dk], both[:, 1, ..., : s.dv]


def packed(s: Sizes, rows: Tensor) -> Views:
    """K and V of rows that hold K's first, then V's."""
    return rows[..., : s.dk], rows[..., s.dk : s.dk + s.dv]


def mla(s: Sizes, rows: Tensor) -> Views:
    """The two views of an MLA row: latent, then rope."""
    if s.form == "row":
        return rows[..., : s.dk], rows[..., : s.dv]
    return rows[..., s.dv : s.dv + s.dk], rows[..., : s.dv]


def mla_rope_first(s: Sizes, rows: Tensor) -> Views:
    if s.form == "row":
        return rows[..., : s.dk], rows[..., s.dk - s.dv : s.dk]
    return rows[..., : s.dk], rows[..., s.dk : s.dk + s.dv]


def regions(s: Sizes) -> Views:
    v_size, begin = s.nb * s.bs * s.h * s.dv, round_up(s.nb * s.bs * s.h * s.dv, 2 * 1024**2 // s.size)
    one = s.empty(begin + s.nb * s.bs * s.h * s.dk)
    return one[begin:].view(s.nb, s.bs, s.h, s.dk), one[:v_size].view(s.nb, s.bs, s.h, s.dv)


def segments(s: Sizes) -> Views:
    page, v_size = s.empty(s.nb, s.bs * s.h * (s.dk + s.dv)), s.bs * s.h * s.dv
    return page[:, v_size:].unflatten(1, (s.bs, s.h, s.dk)), page[:, :v_size].unflatten(1, (s.bs, s.h, s.dv))


def overlapping(s: Sizes) -> Views:
    shared = min(s.dk, s.dv) // 2
    rows = s.empty(s.nb, s.bs, s.h, s.dk + s.dv - shared)
    return rows[..., : s.dk], rows[..., s.dk - shared :]


def same_pointer(s: Sizes) -> Views:
    rows = s.empty(s.nb, s.bs, s.h, max(s.dk, 2 * s.dv))
    return rows[..., : s.dk], rows[..., : 2 * s.dv : 2]


def gap(s: Sizes) -> Views:
    rows = s.empty(s.nb, s.bs, s.h, s.dk + 8 + s.dv)
    return rows[..., : s.dk], rows[..., s.dk + 8 :]


# What the survey of engines (and, for A, the name) says, in torch: [nb, bs, h, d] views of K and of V; 5-D
# where one page's blocks have no single stride.
BY_TORCH: dict[str, Callable[[Sizes], Views]] = {
    "G1": lambda s: kv(s, s.empty(2, s.nb, s.bs, s.h, s.d).transpose(0, 1)),
    "G2": lambda s: kv(s, s.empty(s.nb, 2, s.bs, s.h, s.d)),
    "G3": lambda s: kv(s, s.empty(s.nb, 2, s.h, s.bs, s.d).transpose(2, 3)),
    "G4": lambda s: kv(s, s.empty(s.nb, s.L, 2, s.bs, s.h, s.d)[:, s.l]),
    "G5": lambda s: kv(s, s.empty(s.nb, s.h, s.L, 2, s.bs, s.d)[:, :, s.l].permute(0, 2, 3, 1, 4)),
    "G6": lambda s: kv(s, s.empty(s.nb, 2, s.h, s.L, s.bs, s.d)[:, :, :, s.l].transpose(2, 3)),
    "G7": lambda s: packed(s, s.empty(s.L, s.nb, s.h, s.bs, s.dk + s.dv)[s.l].transpose(1, 2)),
    "G7b": lambda s: packed(s, s.empty(s.L, s.nb, s.bs, s.h, s.dk + s.dv)[s.l]),
    "G7c": lambda s: packed(s, s.empty(s.L, s.h, s.nb, s.bs, s.dk + s.dv)[s.l].permute(1, 2, 0, 3)),
    "G7d": lambda s: packed(s, s.empty(s.nb, s.L, s.h, s.bs, s.dk + s.dv)[:, s.l].transpose(1, 2)),
    "G7e": lambda s: packed(s, s.empty(s.nb, s.L, s.bs, s.h, s.dk + s.dv)[:, s.l]),
    "G7f": lambda s: packed(s, s.empty(s.nb, s.h, s.L, s.bs, s.dk + s.dv)[:, :, s.l].transpose(1, 2)),
    "G9": lambda s: kv(s, s.pages(1104, 2, s.bs, s.h, s.d)),
    "G9b": lambda s: kv(s, s.pages(1104, 2, s.h, s.bs, s.d).transpose(2, 3)),
    "G10": lambda s: kv(s, s.pages(0, s.L, 2, s.bs, s.h, s.d, front=132 * s.bs // s.size)[:, s.l]),
    "G11": lambda s: kv(s, s.pages(1104, s.k, 2, s.bs, s.h, s.d).transpose(1, 2)),
    "G12": lambda s: kv(s, s.empty(s.nb, 2, s.bs, s.h, s.d + 4 // s.size)),
    "G13": lambda s: packed(s, s.empty(s.nb, s.bs, s.h, s.dk + s.dv)),
    "G14": lambda s: kv(s, s.empty(s.nb, s.bs, 2, s.h, s.d).transpose(1, 2)),
    "G14b": lambda s: packed(s, s.empty(s.nb, s.h, s.bs, s.dk + s.dv).transpose(1, 2)),
    "G14c": lambda s: packed(s, s.empty(s.nb, s.bs, s.h, s.dk + s.dv + 32 // s.size)),
    "G15": lambda s: (
        s.empty(s.nb, s.h, s.bs, s.dk).transpose(1, 2),
        s.empty(s.nb, s.h, s.dv, s.bs).permute(0, 3, 1, 2),
    ),
    "G16": lambda s: (s.empty(s.nb, s.bs, s.h, s.dk), s.empty(s.nb, s.bs, s.h, s.dv)),
    "G17": lambda s: kv(s, s.empty(s.nb, s.L, 2, s.h, s.bs, s.d)[:, s.l].transpose(2, 3)),
    "G18": lambda s: kv(s, s.empty(s.nb, s.L, 2, s.bs, s.h, s.d)[:, s.l]),
    "G19": lambda s: kv(s, s.empty(2, s.L, s.nb, s.bs, s.h, s.d)[:, s.l].transpose(0, 1)),
    "G19b": lambda s: kv(s, s.empty(s.L, s.nb, s.h, s.bs, 2, s.d)[s.l].permute(0, 3, 2, 1, 4)),
    "G20": lambda s: (s.pages(48, s.bs, s.h, s.dk), s.pages(48, s.bs, s.h, s.dv)),
    "G21": lambda s: kv(s, s.pages(-2 * s.bs * s.h * s.d % 4224, 2, s.bs, s.h, s.d)),
    "M1": lambda s: mla(s, s.empty(s.nb, s.bs, s.h, s.r)),
    "M1b": lambda s: mla_rope_first(s, s.empty(s.nb, s.bs, s.h, s.r)),
    "M2": lambda s: mla(s, s.empty(s.nb, s.L, s.bs, s.h, s.r)[:, s.l]),
    "M3": lambda s: mla(s, s.pages(1104, s.bs, s.h, s.r)),
    "M3b": lambda s: mla(s, s.pages(1104, s.k, s.bs, s.h, s.r)),
    "M4": lambda s: mla(s, s.pages(0, s.L, s.bs, s.h, s.r, front=132 * s.bs // s.size)[:, s.l]),
    "M5": lambda s: mla(s, s.empty(s.L, s.nb * s.bs, s.h, s.r)[s.l].unflatten(0, (s.nb, s.bs))),
    "M6": lambda s: mla(s, s.empty(s.nb, s.h, s.bs, s.r).transpose(1, 2)),
    "M7": lambda s: mla(s, s.empty(s.nb, s.bs, s.h, s.r)),
    "M8": regions,
    "M9": lambda s: (s.empty(s.nb, s.bs, s.h, s.dk), s.empty(s.nb, s.bs, s.h, s.dv)),
    "M10": segments,
    "M14": lambda s: mla(s, s.empty(s.nb, s.bs, s.h, s.r)),
    "M15": lambda s: mla(s, s.empty(s.nb, s.bs, s.h, s.r)),
    "A-inner-step-2": lambda s: (
        kv(s, s.empty(s.nb, 2, s.bs, s.h, 2 * s.d)[..., ::2])
        if s.form == "kv"
        else mla(s, s.empty(s.nb, s.bs, s.h, 2 * s.r)[..., ::2])
    ),
    "A-dim-major": lambda s: (
        kv(s, s.empty(s.nb, 2, s.h, s.d, s.bs).permute(0, 1, 4, 2, 3))
        if s.form == "kv"
        else mla(s, s.empty(s.nb, s.h, s.r, s.bs).permute(0, 3, 1, 2))
    ),
    "A-blocks-innermost": lambda s: (
        kv(s, s.empty(2, s.bs, s.h, s.d, s.nb).permute(4, 0, 1, 2, 3))
        if s.form == "kv"
        else mla(s, s.empty(s.bs, s.h, s.r, s.nb).permute(3, 0, 1, 2))
    ),
    "A-expanded-heads": lambda s: (
        kv(s, s.empty(s.nb, 2, s.bs, 1, s.d).expand(-1, -1, -1, s.h, -1))
        if s.form == "kv"
        else mla(s, s.empty(s.nb, s.bs, 1, s.r).expand(-1, -1, s.h, -1))
    ),
    "A-off-by-one": lambda s: (
        kv(s, s.empty(1 + s.nb * 2 * s.bs * s.h * s.d)[1:].unflatten(0, (s.nb, 2, s.bs, s.h, s.d)))
        if s.form == "kv"
        else mla(s, s.empty(1 + s.nb * s.bs * s.h * s.r)[1:].unflatten(0, (s.nb, s.bs, s.h, s.r)))
    ),
    "A-odd-page": lambda s: (
        kv(s, s.pages(7, 2, s.bs, s.h, s.d)) if s.form == "kv" else mla(s, s.pages(7, s.bs, s.h, s.r))
    ),
    "A-padded-rows": lambda s: (
        kv(s, s.empty(s.nb, 2, s.bs, s.h, s.d + 48 // s.size))
        if s.form == "kv"
        else mla(s, s.empty(s.nb, s.bs, s.h, s.r + 48 // s.size))
    ),
    "A-absurd-strides": lambda s: (
        kv(s, s.empty(s.nb, 2, s.bs, s.h, s.d)) if s.form == "kv" else mla(s, s.empty(s.nb, s.bs, s.h, s.r))
    ),
    "A-huge-blocks": lambda s: (
        kv(s, s.pages(far(s.nb) - 2 * s.bs * s.h * s.d, 2, s.bs, s.h, s.d))
        if s.form == "kv"
        else mla(s, s.pages(far(s.nb) - s.bs * s.h * s.r, s.bs, s.h, s.r))
    ),
    "A-huge-tokens": lambda s: (
        kv(s, outer(s, far(s.bs), s.bs, 2, s.nb, s.h, s.d).permute(2, 1, 0, 3, 4))
        if s.form == "kv"
        else mla(s, outer(s, far(s.bs), s.bs, s.nb, s.h, s.r).transpose(0, 1))
    ),
    "A-huge-heads": lambda s: (
        kv(s, outer(s, far(s.h), s.h, 2, s.nb, s.bs, s.d).permute(2, 1, 3, 0, 4))
        if s.form == "kv"
        else mla(s, outer(s, far(s.h), s.h, s.nb, s.bs, s.r).permute(1, 2, 0, 3))
    ),
    "A-huge-values": lambda s: kv(s, outer(s, far(2), 2, s.nb, s.bs, s.h, s.d).transpose(0, 1)),
    "A-v-before-k": lambda s: packed(s._replace(dk=s.dv, dv=s.dk), s.empty(s.nb, s.bs, s.h, s.dk + s.dv))[
        ::-1
    ],
    "A-same-pointer": same_pointer,
    "A-overlap": overlapping,
    "A-gap": gap,
}


def outer(s: Sizes, stride: int, n: int, *inner: int) -> Tensor:
    """``[n, *inner]``, packed but for the first stride."""
    payload = torch.Size(inner).numel()
    return unflatten(s.empty(n, stride)[:, :payload], inner)


def key_of(layout: Layout) -> str:
    return layout.name if layout.name.startswith("A-") else layout.name.partition("-")[0]


def used(strides: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if n == 1 else stride for n, stride in zip(size, strides, strict=True))


@pytest.mark.parametrize(("layout", "shape"), fitting())
def test_views_lie_where_torch_puts_them(layout: Layout, shape: CacheShape) -> None:
    views = BY_TORCH[key_of(layout)](sizes_of(layout, shape))
    storage = layout.build(shape)
    k, v = storage.k_geometry, storage.v_geometry
    for geometry, view in zip((k, v), views, strict=True):
        if view.dim() == 4:
            view = view.unflatten(1, (shape.blocks_per_page, shape.block_size))
        assert geometry.size == view.shape
        assert used(geometry.stride, geometry.size) == used(view.stride(), view.shape)
        assert geometry.offset == view.storage_offset()
    k_root, v_root = (view if view._base is None else view._base for view in views)
    assert (k.buffer == v.buffer) == (k_root is v_root)


def formula(text: str, s: Sizes) -> Any:
    names = s._asdict() | {"up": round_up, "far": far, "min": min, "max": max}
    return eval(text, {"__builtins__": {}}, names)


@pytest.mark.parametrize(("layout", "shape"), fitting())
def test_strides_are_those_written_in_the_catalogue(layout: Layout, shape: CacheShape) -> None:
    s, storage = sizes_of(layout, shape), layout.build(shape)
    k, v = storage.k_geometry, storage.v_geometry
    for_k = layout.strides if shape.form == "kv" else layout.mla_strides
    for text, geometry in ((for_k, k), (layout.v_strides or for_k, v)):
        written = formula(text, s)
        if len(written) == 4:  # tokens of a page are evenly spaced: so are its blocks
            page, token, head, dim = written
            written = (page, token * shape.block_size, token, head, dim)
        assert used(geometry.stride, geometry.size) == used(written, geometry.size)
    assert min(k.offset, v.offset) == formula(layout.base, s) * (k.buffer == v.buffer)
    if k.buffer != v.buffer:
        assert layout.v_from_k == ""
    elif shape.form == "kv" or layout.parts != "one" or layout.lookalike:
        assert layout.v_from_k == "" or v.offset - k.offset == formula(layout.v_from_k, s)


def test_every_row_of_the_survey_that_is_a_strided_view_is_in_the_catalogue() -> None:
    numbers = {key_of(layout) for layout in LAYOUTS.values()}
    expected = [f"G{n}" for n in (*range(1, 8), *range(9, 14), *range(16, 22))]
    expected += [f"G7{letter}" for letter in "bcdef"]
    expected += [f"M{n}" for n in (*range(1, 11), 14, 15)]
    assert numbers.issuperset(expected)
    assert numbers == set(BY_TORCH)


def test_every_cache_format_of_lmcache_is_named() -> None:
    formats = re.findall(r"\b(?:NB|NL|TWO)_[A-Z_]+", " ".join(layout.users for layout in LAYOUTS.values()))
    assert sorted(formats) == [
        "NB_NL_NH_BS_CS", "NB_NL_TWO_BS_NH_HS", "NB_NL_TWO_NH_BS_HS", "NL_X_NBBS_ONE_HS", "NL_X_NB_BS_HS",
        "NL_X_NB_BS_NH_CS", "NL_X_NB_NH_BS_CS", "NL_X_NB_NH_BS_TWO_HS", "NL_X_NB_TWO_BS_NH_HS",
        "NL_X_NB_TWO_NH_BS_HS", "NL_X_TWO_NB_BS_NH_HS", "TWO_X_NL_X_NBBS_NH_HS",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["A-huge-blocks", "A-huge-tokens", "A-huge-heads"])
def test_the_last_rows_of_a_huge_layout_lie_beyond_32_bits(name: str) -> None:
    k = LAYOUTS[name].build(CacheShape(4, 2, 3, 16, 16)).k_geometry
    last = sum((n - 1) * stride for n, stride in zip(k.size[:4], k.stride[:4], strict=True))
    assert last >= TWO_GIGA


def test_a_row_of_quantised_values_is_132_bytes() -> None:
    shape = CacheShape(4, 16, 2, 128, 128, torch.float8_e4m3fn)
    assert find_layout("G12").build(shape).k.stride() == (2 * 16 * 2 * 132, 2 * 132, 132, 1)


def test_layouts_are_found_by_name_and_by_number() -> None:
    assert find_layout("G2") is find_layout("g2-vllm-nhd") is LAYOUTS["G2-vllm-nhd"]
    assert find_layout("m10") is LAYOUTS["M10-segmented"]
    for wrong in ("G8", "A", ""):
        with pytest.raises(KeyError, match="G2-vllm-nhd"):
            find_layout(wrong)


def test_a_layout_says_why_it_cannot_hold_a_shape() -> None:
    kv_shape, row_shape = SHAPES["kv"], SHAPES["row"]
    for name, shape, reason in (
        ("G2", row_shape, "does not hold V in K's row"),
        ("M1", kv_shape, "does not hold K and V of their own"),
        ("M9", row_shape, "does not hold V in K's row"),
        ("G11", kv_shape, "is about pages of several blocks"),
        ("M14", row_shape, "is about fp8 caches"),
        ("M15", SHAPES["row-deepseek"], "is about rows other than 512"),
        ("A-expanded-heads", SHAPES["kv-one-head"], "needs 2 KV heads, not 1"),
        ("A-absurd-strides", kv_shape, "needs a dimension of size 1"),
        ("A-huge-blocks", SHAPES["kv-dense"], "needs two steps along its outermost axis, B"),
    ):
        with pytest.raises(ValueError, match=reason):
            find_layout(name).build(shape)


# ---------------------------------------------------------------------------------------------------
# Memory: who shares bytes with whom, what is filled, what stays poison.
# ---------------------------------------------------------------------------------------------------


def addresses(geometry: Geometry) -> Tensor:
    """The place of every element of a view in its buffer, in the shape of the view."""
    where = torch.tensor(geometry.offset)
    for n, stride in zip(geometry.size, geometry.stride, strict=True):
        where = where[..., None] + torch.arange(n) * (0 if n == 1 else stride)
    return where


@pytest.mark.parametrize(("layout", "shape"), fitting())
def test_k_and_v_share_bytes_only_where_they_should(layout: Layout, shape: CacheShape) -> None:
    storage = layout.build(shape)
    sets = []
    for geometry in (storage.k_geometry, storage.v_geometry, *storage.others):
        where = addresses(geometry)
        if len(geometry.size) == 5 and geometry.stride[3] == 0:
            where = where[..., :1, :]
        assert where.unique().numel() == where.numel(), "an element of the view is another element too"
        sets.append({(geometry.buffer, place) for place in where.flatten().tolist()})
    k_set, v_set, *other_sets = sets
    if shape.form == "row" and not layout.lookalike:
        assert v_set <= k_set
    elif layout.lookalike in ("overlap", "same_pointer"):
        assert k_set & v_set
        assert v_set - k_set
    else:
        assert not k_set & v_set
    for n, other in enumerate(other_sets):
        assert not other & (k_set | v_set)
        for further in other_sets[n + 1 :]:
            assert not other & further or shape.form == "row"  # another layer's V in its K


def test_layers_of_a_shared_buffer_are_all_there() -> None:
    for layout in LAYOUTS.values():
        form = "kv" if layout.order else "row"
        order = layout.order or layout.mla_order
        shape = replace(SHAPES[form], layers=4)
        if layout.misfit(shape) is None:
            expected = 2 * 3 * ("L" in order.split()) + bool(layout.front_bytes)
            assert len(layout.build(shape).others) == expected, layout.name


FILLED = [find_case(name) for name in (
    "tiny-gqa", "tiny-uneven-dims", "tiny-fp8", "tiny-pages", "tiny-dense", "tiny-block-1", "tiny-float32",
    "tiny-row", "tiny-row-fp8", "tiny-row-pages", "tiny-q_v", "dense-row", "dense-q_v", "dense-slack",
)]  # fmt: skip


def pairs_of(cases: list[Case]) -> list[Any]:
    """All layouts, each with every one of these cases that it can hold."""
    return [
        pytest.param(case, layout, id=f"{layout.name}-{case.name}")
        for layout in LAYOUTS.values()
        for case in cases
        if compatible(case, layout) is None
    ]


def valid_rows(inputs: Inputs, geometry: Geometry) -> Tensor:
    """Addresses of the valid tokens' elements, found token by token from the arguments of the call."""
    kwargs, shape = inputs.kwargs, inputs.storage.shape
    table, starts = kwargs.get("block_table"), kwargs.get("cu_seqlens_k")
    everything, where = addresses(geometry), []
    for seq, length in enumerate(inputs.lengths):
        for token in range(length):
            block, inside = divmod(token, shape.block_size)
            if table is not None:
                page, sub = divmod(int(table[seq, block]), shape.blocks_per_page)
                where.append(everything[page, sub, inside])
            elif starts is not None:
                where.append(everything[0, 0, int(starts[seq]) + token])
    return torch.stack(where)


@pytest.mark.parametrize(("case", "layout"), pairs_of(FILLED))
def test_valid_rows_hold_the_values_and_everything_else_is_nan(case: Case, layout: Layout) -> None:
    inputs = make_inputs(case, layout)
    storage, bits = inputs.storage, inputs.storage.bits()
    owned = [torch.zeros(0 if storage.lazy else flat.numel(), dtype=torch.bool) for flat in bits]
    for geometry, values in ((storage.k_geometry, inputs.values.k), (storage.v_geometry, inputs.values.v)):
        rows = valid_rows(inputs, geometry)
        assert torch.equal(bits[geometry.buffer][rows], values.view(bits[0].dtype))
        if storage.lazy:
            unused = torch.ones(geometry.size, dtype=torch.bool)
            unused.view(-1)[torch.isin(addresses(geometry).view(-1), rows)] = False
            assert geometry.view(storage.buffers)[unused].isnan().all()
        else:
            owned[geometry.buffer][rows.flatten()] = True
    for flat, filled in zip(storage.buffers, owned, strict=True):
        if not storage.lazy:
            holds = flat.float()
            assert not holds[filled].isnan().any()
            assert holds[~filled].isnan().all()
    back = read(
        storage, inputs.kwargs.get("block_table"), ints(*inputs.lengths), inputs.kwargs.get("cu_seqlens_k")
    )
    for got, values in zip(back, (inputs.values.k, inputs.values.v), strict=True):
        assert torch.equal(got.view(bits[0].dtype), values.view(bits[0].dtype))


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_values_that_a_layout_cannot_hold_are_refused() -> None:
    case = find_case("tiny-gqa")
    values = make_inputs(case, find_layout("G2")).values
    for name in ("A-expanded-heads", "A-overlap", "A-same-pointer"):
        with pytest.raises(ValueError, match="bytes are shared, values differ"):
            make_inputs(case, find_layout(name), values=values)


def test_values_do_not_depend_on_the_layout() -> None:
    for name, layouts in (("tiny-gqa", ("G2", "G7", "A-dim-major")), ("tiny-row", ("M1", "M2", "M3"))):
        one, *more = (make_inputs(find_case(name), find_layout(layout)) for layout in layouts)
        for other in more:
            for key in ("q", "block_table", "seqused_k"):
                assert torch.equal(one.kwargs[key], other.kwargs[key])
            assert torch.equal(one.values.k, other.values.k)
            assert torch.equal(one.values.v, other.values.v)


def occupied(storage: Storage) -> list[int]:
    return torch.bincount(occupancy(storage).long(), minlength=5).tolist()


def test_a_map_of_the_storage_counts_each_element_once() -> None:
    # gaps, K alone, V alone, both, others
    shape = CacheShape(2, 4, 2, 16, 8)
    payload_k, payload_v = 2 * 4 * 2 * 16, 2 * 4 * 2 * 8
    both, total = payload_k + payload_v, 2 * payload_k
    assert occupied(find_layout("G2").build(shape)) == [total - both, payload_k, payload_v, 0, 0]
    assert occupied(find_layout("G4").build(shape)) == [3 * (total - both), payload_k, payload_v, 0, 2 * both]
    assert occupied(find_layout("G9").build(shape)) == [total - both + 2 * 1104, payload_k, payload_v, 0, 0]
    row = CacheShape(2, 4, 1, 48, 32, form="row")
    assert occupied(find_layout("M1").build(row)) == [0, 8 * 16, 0, 8 * 32, 0]
    assert occupied(find_layout("M4").build(row)) == [0, 8 * 16, 0, 8 * 32, 2 * 8 * 48 + 8 * 66]
    with pytest.raises(ValueError, match="too large"):
        occupancy(find_layout("A-huge-blocks").build(row))


def test_a_write_to_any_byte_of_the_cache_is_seen() -> None:
    case = find_case("tiny-gqa")
    for name in ("G4", "G9", "G16", "A-expanded-heads", "A-huge-blocks"):
        inputs = make_inputs(case, find_layout(name))
        inputs.assert_untouched()
        storage = inputs.storage
        flats = [g.view(storage.buffers) for g in (storage.k_geometry, storage.v_geometry)]
        flats = flats if storage.lazy else list(storage.buffers)
        for flat in flats:
            for place in (0, flat.numel() // 2, flat.numel() - 1):
                index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), flat.shape))
                bits = flat.view(torch.int16)
                bits[index] += 1
                with pytest.raises(AssertionError, match="1 elements of the cache were written"):
                    inputs.assert_untouched()
                bits[index] -= 1
        inputs.assert_untouched()


def test_a_write_around_out_or_to_rows_of_no_sequence_is_seen() -> None:
    inputs = make_inputs(find_case("padded-q"), find_layout("G2"), out="padded_rows")
    out, flat = inputs.kwargs["out"], inputs.out_flat
    assert flat is not None
    out[: inputs.case.total_q] = 1.0
    inputs.assert_untouched()
    for place in (out.shape[-1], flat.numel() - 1):  # right after the first row; behind the last
        flat[place] = 0.0
        with pytest.raises(AssertionError, match=f"1 elements around out were written, the first at {place}"):
            inputs.assert_untouched()
        flat[place] = float("nan")
    out[inputs.case.total_q] = 0.0
    with pytest.raises(AssertionError, match="around out were written"):
        inputs.assert_untouched()


# ---------------------------------------------------------------------------------------------------
# The relation between K and V.
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "shape"), fitting())
def test_the_relation_found_is_the_one_built(layout: Layout, shape: CacheShape) -> None:
    storage = layout.build(shape)
    assert find_relation(storage.k, storage.v, shape.form == "q_v") == layout.relation(shape)


NEIGHBOURS = {"G7", "G7b", "G7c", "G7d", "G7e", "G7f", "G13", "G14b", "G14c", "G19b", "A-v-before-k"}
APART = {"M8", "M9", "M10"}
LOOKALIKES = {"A-same-pointer", "A-overlap", "A-gap"}


@pytest.mark.parametrize(("layout", "shape"), fitting("kv", "row", "q_v"))
def test_the_relation_of_each_layout_is_the_one_written_here(layout: Layout, shape: CacheShape) -> None:
    key, none = key_of(layout), Relation("separate", 0)
    if shape.form == "kv":
        offset = -shape.d_v if key == "A-v-before-k" else shape.d_qk
        expected = Relation("neighbours", offset) if key in NEIGHBOURS else none
    elif key in LOOKALIKES | APART:
        expected = none
    elif shape.form == "row":
        expected = Relation("v_in_k", 16 if key == "M1b" else 0)
    else:
        expected = Relation("split_latent", 16 if key == "M1b" else -32)
    assert layout.relation(shape) == expected


SEPARATE = Relation("separate", 0)


def view(flat: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Tensor:
    return flat.as_strided(size, stride, offset)


def look_alikes() -> Iterator[Any]:
    """K, V, whether V is in the scores, and the relation."""
    flat, other = torch.zeros(8192), torch.zeros(8192)
    size_k, size_v, stride = (4, 8, 1, 24), (4, 8, 1, 16), (320, 40, 40, 1)
    k = view(flat, size_k, stride)
    for name, v, q_v, expected in (
        ("inside", view(flat, size_v, stride, 0), False, Relation("v_in_k", 0)),
        ("inside, at the end", view(flat, size_v, stride, 8), False, Relation("v_in_k", 8)),
        ("one past the end", view(flat, size_v, stride, 9), False, SEPARATE),
        ("inside, and in the scores", view(flat, size_v, stride, 0), True, SEPARATE),
        ("neighbours", view(flat, size_v, stride, 24), False, Relation("neighbours", 24)),
        ("split latent", view(flat, size_v, stride, 24), True, Relation("split_latent", 24)),
        ("one element apart", view(flat, size_v, stride, 25), False, SEPARATE),
        ("one element shared", view(flat, size_v, stride, 23), False, SEPARATE),
        ("same pointer, other token stride", view(flat, size_v, (320, 39, 40, 1)), False, SEPARATE),
        ("same pointer, other block stride", view(flat, size_v, (321, 40, 40, 1)), False, SEPARATE),
        ("same pointer, other step", view(flat, size_v, (320, 40, 40, 2)), False, SEPARATE),
        ("same pointer, stride 0", view(flat, size_v, (320, 0, 40, 1)), False, SEPARATE),
        ("another buffer, same offset", view(other, size_v, stride), False, SEPARATE),
        ("another dtype", view(flat.view(torch.int32), size_v, stride), False, SEPARATE),
        ("the next token's row", view(flat, size_v, stride, 40), False, SEPARATE),
        (
            "other stride where none is used",
            view(flat, size_v, (320, 40, 7, 1)),
            False,
            Relation("v_in_k", 0),
        ),
    ):
        yield pytest.param(k, v, q_v, expected, id=name)
    # Rows without a gap: the row right after K's first is K's second, not V's neighbour.
    tight = view(flat, (4, 8, 1, 24), (192, 24, 24, 1))
    after = view(flat, (4, 8, 1, 16), (192, 24, 24, 1), 24)
    yield pytest.param(tight, after, False, SEPARATE, id="rows without a gap")
    before = view(flat, size_v, stride, 0), view(flat, size_k, stride, 16)
    yield pytest.param(before[1], before[0], False, Relation("neighbours", -16), id="v before k")
    yield pytest.param(before[1], before[0], True, Relation("split_latent", -16), id="v before k, q_v")
    wide = (640, 80, 80, 2)
    k_2 = view(flat, size_k, wide)
    inside, between = view(flat, size_v, wide, 4), view(flat, size_v, wide, 3)
    yield pytest.param(k_2, inside, False, Relation("v_in_k", 2), id="step 2, inside")
    yield pytest.param(k_2, between, False, SEPARATE, id="step 2, between the elements")
    beside = view(flat, size_v, wide, 48)
    yield pytest.param(k_2, beside, False, Relation("neighbours", 24), id="step 2, neighbours")
    # Dim-major: the step is 8 tokens, and the token's stride is 1.
    major_k, major_v = (
        view(flat, (4, 8, 1, 24), (320, 1, 320, 8)),
        view(flat, (4, 8, 1, 16), (320, 1, 320, 8), 192),
    )
    yield pytest.param(major_k, major_v, False, Relation("neighbours", 24), id="dim-major neighbours")
    narrow = view(flat, (4, 8, 1, 16), (320, 1, 320, 8), 64)
    yield pytest.param(major_k, narrow, False, Relation("v_in_k", 8), id="dim-major inside")
    one, absurd = (1, 1, 1, 24), (2**40, 2**41, 2**42, 1)
    absurd_k, absurd_v = view(flat, one, absurd), view(flat, (1, 1, 1, 16), (3, 5, 7, 1), 24)
    yield pytest.param(
        absurd_k, absurd_v, False, Relation("neighbours", 24), id="absurd strides of one token"
    )
    expanded_k, expanded_v = (view(flat, (4, 8, 3, d), (320, 40, 0, 1), at) for d, at in ((24, 0), (16, 24)))
    yield pytest.param(expanded_k, expanded_v, False, Relation("neighbours", 24), id="expanded heads")


@pytest.mark.parametrize(("k", "v", "q_v", "expected"), list(look_alikes()))
def test_look_alikes_are_told_apart(k: Tensor, v: Tensor, q_v: bool, expected: Relation) -> None:
    assert find_relation(k, v, q_v) == expected
    found = find_relation(k.transpose(0, 1), v.transpose(0, 1), q_v)
    assert found == expected, "the order of the dimensions must not matter"


# ---------------------------------------------------------------------------------------------------
# The decisive test: a layout changes addresses, not arithmetic.
# ---------------------------------------------------------------------------------------------------

SAME_BITS = [find_case(name) for name in (
    "tiny-gqa", "tiny-uneven-dims", "tiny-all-features", "tiny-fp8", "tiny-pages", "tiny-dense", "d-odd",
    "block-3", "mixed", "splits-3", "batch-invariant",
    "tiny-row", "tiny-row-all-features", "tiny-row-fp8", "tiny-row-pages", "dense-row", "d-row-2-heads",
    "deepseek-v3-mtp", "tiny-q_v", "tiny-q_v-all-features", "dense-q_v", "d-q_v-2-heads", "pages-q_v-2x32",
)]  # fmt: skip


def in_packed_buffers(inputs: Inputs) -> Inputs:
    """The same call with K and V each packed in an allocation of its own, whatever they share."""
    case = inputs.case
    if case.form == "q_v":
        return make_inputs(case, find_layout("M9"), values=inputs.values)
    return make_inputs(replace(case, form="kv"), find_layout("G16"), values=inputs.values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "layout"), pairs_of(SAME_BITS))
def test_same_values_in_another_layout_give_the_same_bits(case: Case, layout: Layout, backend: str) -> None:
    inputs = make_inputs(case, layout)
    dense = in_packed_buffers(inputs)
    for name in inputs.kwargs.keys() - {"k", "v"}:
        one, other = inputs.kwargs[name], dense.kwargs[name]
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    out, lse = attend(inputs, backend)
    dense_out, dense_lse = attend(dense, backend)
    assert torch.equal(out, dense_out)
    assert lse is not None
    assert dense_lse is not None
    assert torch.equal(lse, dense_lse)
    assert not out.isnan().any()
    inputs.assert_untouched()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny-gqa", "padded-q", "mixed-q_v"])
def test_strides_of_q_out_and_table_change_no_bit(name: str, backend: str) -> None:
    case = find_case(name)
    layout = find_layout("G2" if case.form == "kv" else "M7")
    out, lse = attend(make_inputs(case, layout), backend)
    assert lse is not None
    out, lse = out[: case.total_q], lse[:, : case.total_q]
    for table in TABLE_RECIPES:
        for rows in ROW_RECIPES:
            inputs = make_inputs(case, layout, rows=rows, table=table, out=rows)
            other_out, other_lse = attend(inputs, backend)
            assert other_lse is not None
            assert torch.equal(other_out[: case.total_q], out), (rows, table)
            assert torch.equal(other_lse[:, : case.total_q], lse), (rows, table)
            assert other_out is inputs.kwargs["out"]
            inputs.assert_untouched()


# ---------------------------------------------------------------------------------------------------
# Poison: a reader with one of the field's faults must not pass. The faults are put into the arguments.
# ---------------------------------------------------------------------------------------------------


def with_page_stride_from_a_shape(inputs: Inputs) -> dict[str, Tensor]:
    views = {}
    for name in ("k", "v"):
        cache = inputs.kwargs[name]
        stride = (cache.shape[1] * cache.stride(1), *cache.stride()[1:])
        views[name] = cache.as_strided(cache.shape, stride)
    return views


def with_strides_of_k_for_v(inputs: Inputs) -> dict[str, Tensor]:
    k, v = inputs.kwargs["k"], inputs.kwargs["v"]
    limit = v.untyped_storage().nbytes() // v.itemsize
    last = v.storage_offset() + sum((n - 1) * s for n, s in zip(v.shape, k.stride(), strict=True))
    assert last < limit, "the fault would leave the buffer, where a test cannot follow"
    return {"v": v.as_strided(v.shape, k.stride(), v.storage_offset())}


def with_one_token_more(inputs: Inputs) -> dict[str, Tensor]:
    return {"seqused_k": inputs.kwargs["seqused_k"] + 1}


def with_one_element_on(inputs: Inputs) -> dict[str, Tensor]:
    k = inputs.kwargs["k"]
    return {"k": k.as_strided(k.shape, k.stride(), k.storage_offset() + 1)}


def with_dense_table(inputs: Inputs) -> dict[str, Tensor]:
    table = inputs.kwargs["block_table"]
    wrong = table.as_strided(table.shape, (table.shape[1], 1))
    return {"block_table": wrong.clamp(0, inputs.storage.shape.num_blocks - 1)}


def with_the_null_block(inputs: Inputs) -> dict[str, Tensor]:
    return {"block_table": torch.zeros_like(inputs.kwargs["block_table"])}


def with_inner_stride_1(inputs: Inputs) -> dict[str, Tensor]:
    k = inputs.kwargs["k"]
    return {"k": k.as_strided(k.shape, (*k.stride()[:-1], 1))}


@pytest.mark.parametrize(
    ("fault", "layout", "case"),
    [
        (with_page_stride_from_a_shape, "G2", "tiny-gqa"),
        (with_page_stride_from_a_shape, "G9", "tiny-gqa"),
        (with_page_stride_from_a_shape, "A-odd-page", "tiny-gqa"),
        (with_page_stride_from_a_shape, "M2", "tiny-row"),
        (with_page_stride_from_a_shape, "M3", "tiny-row"),
        (with_page_stride_from_a_shape, "M4", "tiny-row"),
        (with_strides_of_k_for_v, "M8", "tiny-q_v"),
        (with_strides_of_k_for_v, "G15", "tiny-gqa"),
        (with_one_token_more, "G2", "tiny-gqa"),
        (with_one_token_more, "M1", "tiny-row"),
        (with_one_token_more, "A-huge-blocks", "tiny-gqa"),
        (with_one_element_on, "G12", "tiny-gqa"),
        (with_one_element_on, "A-padded-rows", "tiny-row"),
        (with_dense_table, "G2", "tiny-gqa"),
        (with_the_null_block, "G2", "tiny-gqa"),
        (with_inner_stride_1, "A-inner-step-2", "tiny-row"),
    ],
)
def test_a_reader_with_a_known_fault_meets_poison(
    fault: Callable[[Inputs], dict[str, Tensor]], layout: str, case: str
) -> None:
    lens = (7, 20, 33)  # no multiple of the block size: the row after the last is never filled
    uneven = replace(find_case(case), seqused_k=lens, q_lens=(1, 1, 1))
    inputs = make_inputs(uneven, find_layout(layout), table="columns_of_wider")
    out, lse = attend(inputs, "reference")
    assert_right(inputs, out, lse)
    wrong_out, _ = attend(inputs, "reference", **fault(inputs))
    assert wrong_out.isnan().any()
    with pytest.raises(AssertionError, match=r"out: .* are NaN"):
        assert_right(inputs, wrong_out, lse)


# ---------------------------------------------------------------------------------------------------
# Offsets past 2^31 elements.
# ---------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of real memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("A-huge")])
def test_offsets_beyond_32_bits_are_read_without_4_gb_of_memory(name: str, backend: str) -> None:
    layout = LAYOUTS[name]
    before = resident()
    for case in map(find_case, ("tiny-gqa", "tiny-row", "tiny-q_v", "d-row-2-heads")):
        if layout.misfit(SHAPES[case.form]) is not None or case.num_kv_heads < layout.min_heads:
            continue
        inputs = make_inputs(case, layout)
        (flat,) = inputs.storage.buffers
        assert flat.nbytes > 4 << 30
        reached = max(
            int(valid_rows(inputs, g).max()) for g in (inputs.storage.k_geometry, inputs.storage.v_geometry)
        )
        assert reached > TWO_GIGA, "no valid row lies beyond 32 bits: the test would show nothing"
        out, lse = attend(inputs, backend)
        assert_right(inputs, out, lse)
        assert resident() - before < 128 << 20


def test_a_huge_offset_wrapped_to_32_bits_would_be_seen() -> None:
    inputs = make_inputs(find_case("tiny-gqa"), LAYOUTS["A-huge-blocks"])
    (flat,) = inputs.storage.buffers
    rows = valid_rows(inputs, inputs.storage.k_geometry)
    far_ones = rows[rows >= TWO_GIGA]
    wrapped = far_ones % TWO_GIGA
    assert not torch.equal(flat[wrapped], flat[far_ones])


def test_filling_a_cache_without_a_table_needs_starts() -> None:
    storage = find_layout("G2").build(SHAPES["kv-dense"])
    rows = torch.zeros(2, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs cu_seqlens_k"):
        fill(storage, rows, rows, None, ints(2))
