"""Strides for the tensors of a call that are not its cache: q, q_v, out and the block table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anystride.testing.storage import allocate

__all__ = ["GARBAGE", "ROW_RECIPES", "TABLE_RECIPES", "strided_rows", "strided_table"]

GARBAGE = (2147480000, -1)  # written into table entries that nobody may read


# Each gives (elements of the buffer, offset, strides) for a tensor [tokens, heads, d].
ROW_RECIPES: dict[str, Callable[[int, int, int], tuple[int, int, tuple[int, int, int]]]] = {
    "packed": lambda n, h, d: (n * h * d, 0, (h * d, d, 1)),
    "heads_first": lambda n, h, d: (h * n * d, 0, (d, n * d, 1)),
    "fused_qkv": lambda n, h, d: (n * (h + 2) * d, 0, ((h + 2) * d, d, 1)),
    "padded_rows": lambda n, h, d: (n * h * (d + 8), 0, (h * (d + 8), d + 8, 1)),
    "inner_step_2": lambda n, h, d: (n * h * d * 2, 0, (h * d * 2, d * 2, 2)),
    "dim_major": lambda n, h, d: (n * h * d, 0, (1, d * n, n)),
    "off_by_one": lambda n, h, d: (n * h * d + 1, 1, (h * d, d, 1)),
}

# Each gives (elements, offset, strides) for a table [batch, width].
TABLE_RECIPES: dict[str, Callable[[int, int], tuple[int, int, tuple[int, int]]]] = {
    "packed": lambda b, w: (b * w, 0, (w, 1)),
    "columns_of_wider": lambda b, w: (b * (w + 5), 2, (w + 5, 1)),
    "transposed": lambda b, w: (b * w, 0, (1, b)),
    "every_other_column": lambda b, w: (b * w * 2, 0, (w * 2, 2)),
}


def strided_rows(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
    recipe: str = "packed",
) -> tuple[Tensor, Tensor]:
    """A ``q``, ``q_v`` or ``out`` in the strides of ``recipe``, all NaN.

    Args:
        shape: ``[tokens, heads, d]``.
        dtype: Of the tensor.
        device: Of the tensor.
        recipe: A key of ``ROW_RECIPES``.

    Returns:
        The flat buffer, with 64 spare elements at its end, and the view into it.
    """
    elements, offset, strides = ROW_RECIPES[recipe](*shape)
    flat = allocate(elements + 64, dtype, device, lazy=False)
    return flat, flat.as_strided(shape, strides, offset)


def strided_table(table: Tensor, recipe: str = "packed") -> Tensor:
    """The same int32 ``[batch, width]`` table in the strides of ``recipe``, among garbage."""
    batch, width = table.shape
    elements, offset, strides = TABLE_RECIPES[recipe](batch, width)
    flat = torch.full((elements,), GARBAGE[0], dtype=torch.int32, device=table.device)
    flat[1::2] = GARBAGE[1]
    view = flat.as_strided((batch, width), strides, offset)
    view.copy_(table)
    return view
