"""A layout as a recipe: the axes of a buffer in order, and what departs from them.

A recipe is mostly one line, the axes of the buffer, outermost first: ``B`` page, ``S`` block in the
page, ``T`` token, ``H`` head, ``L`` layer, ``2`` K then V, and the row: ``D`` of K or of V alone,
``C`` K's and V's rows side by side, ``R`` the MLA row (latent and rope). Strides follow from right
to left; an axis that is not named has stride 0, and ``S`` stands left of ``T`` unless it is named.

The same in closed form, in elements, stands in the strings ``strides``, ``base`` and ``v_from_k``,
to which the tests hold every recipe: ``nb`` pages, ``bs`` tokens in a page (in a block where ``S``
is named, with ``k`` blocks to a page), ``h`` heads, ``dk``, ``dv``, ``d`` the larger of the two,
``r`` the MLA row, ``L`` layers, ``l`` this layer, ``size`` bytes of an element, ``up(x, m)`` x
rounded up to a multiple of m, ``far(n)`` a stride with which the last of n steps starts beyond 2^31
elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from anystride.problem import Relation
from anystride.testing.storage import CacheShape, Form, Geometry, Storage, allocate, poison

__all__ = ["Layout", "far", "round_up"]

FAR = 2**31  # elements: the first offset that 32 signed bits cannot hold
REGION_ALIGN = 2 * 1024 * 1024  # bytes, between the regions of a component-major cache


def round_up(x: int, multiple: int) -> int:
    """``x`` rounded up to a multiple."""
    return -(-x // multiple) * multiple


def far(n: int) -> int:
    """A stride, a multiple of 64: the last of ``n`` steps starts beyond 2^31 elements."""
    return round_up(-(-FAR // (n - 1)), 64)


@dataclass(frozen=True)
class Layout:
    """One recipe. Lengths are in elements unless they are said to be bytes.

    Attributes:
        name: Its number in the survey of engines, and a slug.
        users: Who lays a cache out like this; for the adversarial ones, what the trap is.
        description: Where the data lie.
        order: Axes of a cache with K and V of their own (GQA, MQA, MHA), or "".
        mla_order: Axes of a cache in which V is a part of K's row, or in which the two parts of the
            row are given apart, or "".
        strides: Of K for ``order``: page, token, head, dim; with ``S`` page, block, token, head,
            dim.
        mla_strides: Of K for ``mla_order``.
        v_strides: Of V, where they are not those of K.
        base: Where the layer begins, without the place of K or V in the row.
        v_from_k: From K's first element to V's; "" where they are in different allocations. In an
            MLA row the row alone decides, and this is about ``order``.
        parts: ``one``: one buffer, in which the row or the axis ``2`` holds both. ``buffers``: two
            allocations. ``regions``: of one buffer, V's first. ``segments``: of each page, V's
            first.
        v_order: Axes of V's buffer, where they are not those of K's.
        page_pad: Between two pages.
        page_multiple: Pages are padded to a multiple of so many elements.
        front_bytes: Bytes for each token that another cache takes at the front of each page.
        row_pad_bytes: Bytes after each row.
        step: From one element of a row to the next.
        offset: Before the first page.
        reversed_row: The parts of the row stand the other way round: rope before latent, V before K.
        lookalike: ``overlap``: V's row begins inside K's and ends outside. ``gap``: 8 elements lie
            between K's row and V's. ``same_pointer``: V starts where K does and takes every other
            element.
        huge: The outermost axis reaches beyond 2^31 elements.
        lone: An axis of which the stride steps over the whole packed buffer: it alone is not packed.
        absurd: Dimensions of size 1 have strides that would leave the address space.
        forms: Which forms of a cache it can hold.
        min_heads: KV heads needed.
        only: ``pages``: only pages of several blocks. ``fp8``: only fp8 caches. ``other_dims``:
            only rows that are not 512 + 64.
    """

    name: str
    users: str
    description: str
    order: str = ""
    mla_order: str = ""
    strides: str = ""
    mla_strides: str = ""
    v_strides: str = ""
    base: str = "0"
    v_from_k: str = ""
    parts: Literal["one", "buffers", "regions", "segments"] = "one"
    v_order: str = ""
    page_pad: int = 0
    page_multiple: int = 1
    front_bytes: int = 0
    row_pad_bytes: int = 0
    step: int = 1
    offset: int = 0
    reversed_row: bool = False
    lookalike: Literal["", "overlap", "gap", "same_pointer"] = ""
    huge: bool = False
    lone: str = ""
    absurd: bool = False
    forms: tuple[Form, ...] = ("kv", "row", "q_v")
    min_heads: int = 1
    only: Literal["", "pages", "fp8", "other_dims"] = ""

    @property
    def family(self) -> Literal["gqa", "mla", "both"]:
        """Which caches it can hold: K and V of their own, MLA rows, or both."""
        if self.order and self.mla_order:
            return "both"
        return "gqa" if self.order else "mla"

    def axes(self, shape: CacheShape, of_v: bool = False) -> tuple[str, ...]:
        """The axes of the buffer for this shape, outermost first."""
        order = self.order if shape.form == "kv" else self.mla_order
        axes = (self.v_order if of_v and self.v_order else order).split()
        if "S" not in axes:
            axes.insert(axes.index("T"), "S")
        return tuple(axes)

    def misfit(self, shape: CacheShape) -> str | None:
        """Why this layout cannot hold a cache of this shape, or None."""
        order = self.order if shape.form == "kv" else self.mla_order
        if not order or shape.form not in self.forms:
            kinds = {"kv": "K and V of their own", "row": "V in K's row", "q_v": "a split MLA row"}
            return f"{self.name} does not hold {kinds[shape.form]}"
        if shape.num_kv_heads < self.min_heads:
            return f"{self.name} needs {self.min_heads} KV heads, not {shape.num_kv_heads}"
        if shape.k_dtype not in (None, shape.dtype) and self.parts != "buffers":
            return f"{self.name} keeps K and V in one buffer, of one dtype"
        if self.only == "pages" and shape.blocks_per_page == 1:
            return f"{self.name} is about pages of several blocks"
        if self.only == "fp8" and shape.dtype.itemsize != 1:
            return f"{self.name} is about fp8 caches, not {shape.dtype}"
        if self.only == "other_dims" and max(shape.d_v, shape.d_qk) in (512, 576):
            return f"{self.name} is about rows other than 512 + 64"
        if self.absurd and min(shape.num_kv_heads, shape.block_size, shape.num_pages) > 1:
            return f"{self.name} needs a dimension of size 1"
        if self.huge:
            axis = order.split()[0]
            if self._sizes(shape, 1)[axis] * (shape.blocks_per_page if axis == "T" else 1) < 2:
                return f"{self.name} needs two steps along its outermost axis, {axis}"
        return None

    def relation(self, shape: CacheShape) -> Relation:
        """The relation between K and V, told from the recipe, not from addresses."""
        separate = Relation("separate", 0)
        if self.lookalike or self.parts in ("buffers", "regions"):
            return separate
        neighbours: Literal["neighbours", "split_latent"] = (
            "split_latent" if shape.form == "q_v" else "neighbours"
        )
        if self.parts == "segments":
            one_row = shape.blocks_per_page * shape.block_size * shape.num_kv_heads == 1
            return Relation(neighbours, -shape.d_v) if one_row else separate
        axes = self.axes(shape)
        if "R" in axes and shape.form == "row":
            return Relation("v_in_k", shape.d_qk - shape.d_v if self.reversed_row else 0)
        if "R" in axes:
            return Relation("split_latent", shape.d_qk if self.reversed_row else -shape.d_v)
        if "C" in axes:
            return Relation(neighbours, -shape.d_v if self.reversed_row else shape.d_qk)
        # K's row and V's are one row if nothing lies between the axis 2 and the row.
        sizes = self._sizes(shape, max(shape.d_qk, shape.d_v))
        between = axes[axes.index("2") + 1 : axes.index("D")]
        if (
            all(sizes[axis] == 1 for axis in between)
            and shape.d_qk >= shape.d_v
            and not self.row_pad_bytes
            and not (self.huge and axes[0] == "2")
        ):
            return Relation(neighbours, shape.d_qk)
        return separate

    def build(self, shape: CacheShape, device: torch.device | str = "cpu") -> Storage:
        """Allocate, poison, and place K and V.

        Args:
            shape: What to hold.
            device: Where. On an accelerator a huge layout takes its memory for real, 4 to 9 GB.

        Returns:
            The storage, nothing filled in.

        Raises:
            ValueError: The layout cannot hold the shape; the text of :meth:`misfit`.
        """
        reason = self.misfit(shape)
        if reason is not None:
            raise ValueError(reason)
        totals, k, v, others = self._place(shape)
        if self.absurd:
            k, v = _absurd(k, 2**40 + 3), _absurd(v, 2**41 + 5)
        dtypes = (shape.k_dtype or shape.dtype, shape.dtype)
        buffers = tuple(
            allocate(total, dtype, device, self.huge) for total, dtype in zip(totals, dtypes, strict=False)
        )
        if self.huge:
            for geometry in (k, v):
                poison(geometry.view(buffers))
        return Storage(self.name, shape, buffers, k, v, others, self.huge)

    def _sizes(self, shape: CacheShape, row: int) -> dict[str, int]:
        sizes = {"B": shape.num_pages, "S": shape.blocks_per_page, "T": shape.block_size, "2": 2}
        sizes |= {"H": shape.num_kv_heads, "L": shape.layers}
        return sizes | dict.fromkeys("DCR", row)

    def _strides(
        self, axes: tuple[str, ...], sizes: dict[str, int], shape: CacheShape
    ) -> tuple[dict[str, int], int]:
        """The stride of each axis, and the elements that all take together, from right to left."""
        strides, extent = dict.fromkeys("BSTHL2DCR", 0), self.step
        outermost = axes[1] if axes[0] == "S" else axes[0]
        for axis in reversed(axes):
            if axis == "B":
                extent = round_up(extent + self.page_pad + self._front(shape), self.page_multiple)
            if self.huge and axis == outermost:
                extent = max(extent, far(sizes[axis] * (sizes["S"] if axis == "T" else 1)))
            strides[axis] = extent
            extent *= sizes[axis]
            if axis in "DCR":
                extent += self.row_pad_bytes // shape.dtype.itemsize
        if self.lone:
            strides[self.lone] = extent
            extent *= sizes[self.lone]
        if self.huge:  # nothing follows the last element: a buffer of twice 2^31 is not needed
            extent = 1 + sum((sizes[axis] - 1) * strides[axis] for axis in axes)
        return strides, extent

    def _front(self, shape: CacheShape) -> int:
        """Elements that another cache takes at the front of a page."""
        tokens = shape.block_size * shape.blocks_per_page
        return self.front_bytes * tokens // shape.dtype.itemsize

    def _row(self, shape: CacheShape) -> tuple[int, int, int, int]:
        """Elements of the row, where K and V start in it, and V's step over K's."""
        d_qk, d_v = shape.d_qk, shape.d_v
        if self.lookalike == "overlap":
            start = d_qk - min(d_qk, d_v) // 2
            return start + d_v, 0, start, 1
        if self.lookalike == "gap":
            return d_qk + 8 + d_v, 0, d_qk + 8, 1
        if self.lookalike == "same_pointer":
            return max(d_qk, 2 * d_v), 0, 0, 2
        axes = self.axes(shape)
        if "C" in axes:
            return d_qk + d_v, *((d_v, 0) if self.reversed_row else (0, d_qk)), 1
        if "D" in axes:
            return max(d_qk, d_v), 0, 0, 1
        if shape.form == "row":
            return d_qk, 0, d_qk - d_v if self.reversed_row else 0, 1
        return d_qk + d_v, *((0, d_qk) if self.reversed_row else (d_v, 0)), 1

    def _place(self, shape: CacheShape) -> tuple[tuple[int, ...], Geometry, Geometry, tuple[Geometry, ...]]:
        """Sizes of the buffers, K, V, and what else lies in the buffers."""
        if self.parts != "one":
            return *self._place_apart(shape), ()
        axes = self.axes(shape)
        row, k_start, v_start, v_step = self._row(shape)
        strides, total = self._strides(axes, self._sizes(shape, row), shape)
        dim = max(strides[axis] for axis in "DCR")  # one of them is in the order, the others are 0
        front = self.offset + self._front(shape)

        def view(layer: int, start: int, kv: int, step: int, d: int) -> Geometry:
            offset = front + layer * strides["L"] + kv * strides["2"] + start * dim
            return _geometry(shape, strides, 0, offset, d, dim * step)

        def layer_views(layer: int) -> tuple[Geometry, Geometry]:
            return view(layer, k_start, 0, 1, shape.d_qk), view(layer, v_start, 1, v_step, shape.d_v)

        ours = shape.layers // 2
        others = [layer_views(n) for n in range(shape.layers) if n != ours and "L" in axes]
        extra = [g for pair in others for g in pair]
        if self.front_bytes:
            size, stride = (shape.num_pages, self._front(shape)), (strides["B"], 1)
            extra.append(Geometry(0, self.offset, size, stride))
        return (total + self.offset,), *layer_views(ours), tuple(extra)

    def _place_apart(self, shape: CacheShape) -> tuple[tuple[int, ...], Geometry, Geometry]:
        """K and V in two buffers, two regions of a buffer, or two segments of each page."""
        k_sizes, v_sizes = self._sizes(shape, shape.d_qk), self._sizes(shape, shape.d_v)
        k_strides, k_total = self._strides(self.axes(shape), k_sizes, shape)
        v_strides, v_total = self._strides(self.axes(shape, of_v=True), v_sizes, shape)
        v_buffer, k_start = 1, 0
        totals: tuple[int, ...] = (k_total, v_total)
        if self.parts == "regions":
            v_buffer, k_start = 0, round_up(v_total, REGION_ALIGN // shape.dtype.itemsize)
            totals = (k_start + k_total,)
        elif self.parts == "segments":
            v_buffer, k_start = 0, v_strides["B"]
            k_strides["B"] = v_strides["B"] = k_strides["B"] + v_strides["B"]
            totals = (shape.num_pages * k_strides["B"],)
        k = _geometry(shape, k_strides, 0, k_start, shape.d_qk, k_strides["D"])
        v = _geometry(shape, v_strides, v_buffer, 0, shape.d_v, v_strides["D"])
        return totals, k, v


def _geometry(
    shape: CacheShape, strides: dict[str, int], buffer: int, offset: int, d: int, dim: int
) -> Geometry:
    size = (shape.num_pages, shape.blocks_per_page, shape.block_size, shape.num_kv_heads, d)
    return Geometry(buffer, offset, size, (*(strides[axis] for axis in "BSTH"), dim))


def _absurd(geometry: Geometry, stride: int) -> Geometry:
    """The same addresses, with a stride that nobody may use on each dimension of size 1."""
    sizes = zip(geometry.size, geometry.stride, strict=True)
    used = tuple(stride if n == 1 else s for n, s in sizes)
    return Geometry(geometry.buffer, geometry.offset, geometry.size, used)
