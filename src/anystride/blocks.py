"""Copying blocks between caches: the facts of one call, and its checks.

Looks at shapes, strides, dtypes and devices, never at values, so it never synchronises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anystride.errors import InvalidInputError
from anystride.problem import (
    BITS,
    FP8_DTYPES,
    Q_DTYPES,
    Faults,
    alignment,
    in_words,
    shares_memory,
    used_strides,
)
from anystride.store import five_dims

__all__ = ["BlocksCall", "BlocksProblem", "check", "make_problem"]


class BlocksCall(NamedTuple):
    """The tensors of one call, in one form: caches 5-D, as integers of their width."""

    source: Tensor
    target: Tensor
    source_ids: Tensor  # [n]
    target_ids: Tensor | None  # [n]; None: 0, 1, 2, ...


@dataclass(frozen=True)
class BlocksProblem:
    """Everything that decides how a call is run. Strides are in elements, 0 for dimensions of size 1."""

    device: torch.device
    dtype: torch.dtype  # an integer
    count: int  # of blocks to copy
    block_size: int
    heads: int
    d: int
    source_blocks_per_page: int
    target_blocks_per_page: int
    source_strides: tuple[int, int, int, int, int]  # page, block, token, head, dim
    target_strides: tuple[int, int, int, int, int]
    source_align: int  # bytes, at most 16
    target_align: int
    source_id_stride: int
    target_id_stride: int
    counts: bool  # no target ids were given: 0, 1, 2, ...


def check(operation: str, source: Any, target: Any, ids: Any, columns: int) -> None:
    """Check the arguments; ``ids``: ``[n]`` for one column, else ``[n, columns]``.

    Raises:
        InvalidInputError: With every fault that was found.
    """
    faults = Faults()
    need = faults.need
    ids_name = "block_ids" if columns == 1 else "block_mapping"
    for name, tensor in (("source", source), ("target", target), (ids_name, ids)):
        need(isinstance(tensor, Tensor), f"{name} must be a tensor.", in_words(tensor), "torch.Tensor")
    if faults:
        raise InvalidInputError(operation, faults)
    shape = "[n]" if columns == 1 else f"[n, {columns}]"
    fits = ids.dim() == 1 if columns == 1 else ids.dim() == 2 and ids.shape[1] == columns
    need(
        fits and ids.dtype in (torch.int32, torch.int64),
        f"{ids_name} must be int32 or int64 of shape {shape}.",
        in_words(ids),
        f"int64 {shape}",
    )
    for name, cache in (("source", source), ("target", target)):
        need(
            cache.dim() in (4, 5) and cache.dtype in (*Q_DTYPES, *FP8_DTYPES),
            f"{name} must be a paged cache of floating-point numbers.",
            in_words(cache),
            "[num_blocks, block_size, num_kv_heads, d] or "
            "[num_pages, blocks_per_page, block_size, num_kv_heads, d], 8, 16 or 32 bits",
        )
        need(cache.device == ids.device, f"{name} must be on the device of {ids_name}.", in_words(cache))
    need(
        not shares_memory(target),
        "target gives several rows the same memory: it can only be read.",
        in_words(target),
        "no dimension with a stride of 0",
    )
    need(
        source.dtype == target.dtype and source.shape[-3:] == target.shape[-3:],
        "source and target must have blocks of the same dtype, tokens, heads and dimensions.",
        f"{source.dtype} {list(source.shape[-3:])} and {target.dtype} {list(target.shape[-3:])}",
    )
    if not faults and columns == 1:
        blocks = target.shape[0] * (target.shape[1] if target.dim() == 5 else 1)
        need(
            blocks >= ids.shape[0],
            "target must have a block for each id.",
            f"{blocks} blocks, {ids.shape[0]} ids",
        )
    if faults:
        raise InvalidInputError(operation, faults)


def canonical(source: Tensor, target: Tensor, ids: Tensor, columns: int) -> BlocksCall:
    """A checked call in one form. Views only."""
    bits = BITS[source.itemsize]
    caches = (five_dims(cache).view(bits) for cache in (source, target))
    return BlocksCall(*caches, *((ids, None) if columns == 1 else ids.unbind(1)))


def make_problem(call: BlocksCall) -> BlocksProblem:
    """The facts of a call."""
    source, target, source_ids, target_ids = call
    return BlocksProblem(
        device=source.device,
        dtype=source.dtype,
        count=source_ids.shape[0],
        block_size=source.shape[2],
        heads=source.shape[3],
        d=source.shape[4],
        source_blocks_per_page=source.shape[1],
        target_blocks_per_page=target.shape[1],
        source_strides=used_strides(source),  # type: ignore[arg-type]
        target_strides=used_strides(target),  # type: ignore[arg-type]
        source_align=alignment(source),
        target_align=alignment(target),
        source_id_stride=source_ids.stride(0),
        target_id_stride=0 if target_ids is None else target_ids.stride(0),
        counts=target_ids is None,
    )
