"""Where the scales of an fp8 cache lie: beside it in strides of their own, or in the gaps of its rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from anystride.testing.recipe import Layout
from anystride.testing.storage import Storage, allocate

__all__ = ["SCALE_RECIPES", "place_scales"]

Sizes = tuple[int, int, int, int]

# Each gives (elements of the buffer, offset, strides) for scales [pages, blocks of a page, tokens, n].
SCALE_RECIPES: dict[str, Callable[[int, int, int, int], tuple[int, int, Sizes]]] = {
    "packed": lambda p, s, t, n: (p * s * t * n, 0, (s * t * n, t * n, n, 1)),
    "tokens_last": lambda p, s, t, n: (p * s * n * t, 0, (s * n * t, n * t, 1, t)),
    "padded_pages": lambda p, s, t, n: (p * (s * t * n + 5), 3, (s * t * n + 5, t * n, n, 1)),
    "step_2": lambda p, s, t, n: (p * s * t * n * 2, 1, (s * t * n * 2, t * n * 2, n * 2, 2)),
    "pages_last": lambda p, s, t, n: (s * t * n * p, 0, (1, t * n * p, n * p, p)),
}


def place_scales(storage: Storage, layout: Layout, of_v: bool, groups: int, recipe: str = "") -> Tensor:
    """A place for the scales of K or of V, all NaN.

    Args:
        storage: The cache.
        layout: What made it. Its name also says in which strides scales lie that have no place in its rows.
        of_v: Whether they are V's.
        groups: Scales of a row: more than 1 only of a cache with one head.
        recipe: A key of ``SCALE_RECIPES`` for scales that have no place in the rows; "": by the layout's
            name.

    Returns:
        float32 ``[num_pages, blocks_per_page, block_size, num_kv_heads or groups]``.
    """
    geometry = storage.v_geometry if of_v else storage.k_geometry
    pages, per_page, tokens, heads, _ = geometry.size
    size = (pages, per_page, tokens, heads if groups == 1 else groups)
    gap = _gap(storage, layout, of_v, groups)
    if gap is not None:
        flat = storage.buffers[geometry.buffer]
        words = flat[: flat.numel() // 4 * 4].view(torch.float32)
        strides = [s // 4 for s in geometry.stride[:4]]
        stride = tuple(strides if groups == 1 else (*strides[:3], 1))
        view = words.as_strided(size, stride, gap // 4)
        view.fill_(float("nan"))
        return view
    names = list(SCALE_RECIPES)
    recipe = recipe or names[zlib.crc32(f"{layout.name} {of_v}".encode()) % len(names)]
    elements, offset, stride = SCALE_RECIPES[recipe](*size)
    flat = allocate(elements + offset, torch.float32, storage.buffers[0].device, lazy=False)
    return flat.as_strided(size, stride, offset)


def _gap(storage: Storage, layout: Layout, of_v: bool, groups: int) -> int | None:
    """Where the first row's scales begin in its buffer, in bytes; None where rows have no gap for them."""
    shape, geometry = storage.shape, storage.v_geometry if of_v else storage.k_geometry
    if shape.dtype.itemsize > 1 or not layout.row_pad_bytes or layout.step > 1:
        return None
    row, k_start, v_start, _ = layout._row(shape)
    both = "D" not in layout.axes(shape)  # K's row and V's are one: V's scales follow those of K
    begin = geometry.offset - (v_start if of_v else k_start) + row + 4 * groups * (both and of_v)
    fits = 4 * groups * (1 + both) <= layout.row_pad_bytes
    used = [s for n, s in zip(geometry.size[:4], geometry.stride[:4], strict=True) if n > 1]
    return begin if fits and all(x % 4 == 0 for x in (begin, *used)) else None
