"""The write side: the facts of one call that stores rows into a cache, and its checks.

Every call stores two halves, K and V of GQA, or the latent and the rope part of MLA: rows of the new tokens
into the places of a cache that their slots name. Looks at shapes, strides, dtypes and devices, never at
values, so it never synchronises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anystride.errors import InvalidInputError
from anystride.problem import FP8_DTYPES, Q_DTYPES, Faults, alignment, in_words, shares_memory, used_strides

__all__ = ["Argument", "Half", "HalfFacts", "StoreCall", "StoreProblem", "check", "make_problem"]


class Half(NamedTuple):
    """One half of a call, in one form.

    ``scale``: None, a number, a float32 tensor of one element, or of ``[heads]``: what stored values are to
    be multiplied with when they are read. ``written``: float32 ``[pages, blocks, tokens, heads, groups]``:
    scales that are computed here. One of the two at most.
    """

    rows: Tensor  # [tokens, heads, d]
    cache: Tensor  # [pages, blocks of a page, tokens of a block, heads, d]
    scale: Tensor | float | None
    written: Tensor | None


class StoreCall(NamedTuple):
    """The tensors of one call, checked."""

    slot_mapping: Tensor  # [tokens] int32 or int64
    first: Half
    second: Half


@dataclass(frozen=True)
class HalfFacts:
    """What decides how a half is stored. Strides are in elements, 0 for dimensions of size 1."""

    dtype: torch.dtype
    cache_dtype: torch.dtype
    heads: int
    d: int
    groups: int  # runs of dimensions with a scale each
    strides: tuple[int, int, int]  # token, head, dim
    cache_strides: tuple[int, int, int, int, int]  # page, block, token, head, dim
    align: int  # bytes, at most 16
    cache_align: int
    scale: str  # none, number, one, heads, written
    number: float  # the scale, if it is one
    scale_strides: tuple[int, int, int, int, int]  # page, block, token, head, group


@dataclass(frozen=True)
class StoreProblem:
    """Everything that decides how a call is run."""

    device: torch.device
    num_tokens: int
    slot_stride: int
    num_pages: int
    blocks_per_page: int
    block_size: int
    first: HalfFacts
    second: HalfFacts


class Argument(NamedTuple):
    """A half as the caller named it."""

    name: str  # of the rows
    cache_name: str
    scale_name: str
    rows: Any  # [tokens, heads, d]
    cache: Any  # [num_blocks, block_size, heads, d], or 5-D
    scale: Any
    groups: bool  # whether the last dimension of scales that are written counts groups, and not heads


def five_dims(cache: Tensor) -> Tensor:
    """``[pages, blocks of a page, ...]``: a 4-D cache has one block in a page."""
    return cache.unsqueeze(1) if cache.dim() == 4 else cache


def is_written(scale: Tensor, cache: Tensor) -> bool:
    """Whether a tensor has a place for the scale of each row: it is computed then, and not given."""
    return scale.dim() == cache.dim() - 1


def check(operation: str, slot_mapping: Any, arguments: tuple[Argument, Argument]) -> StoreCall:
    """Check a call and bring it into one form.

    Raises:
        InvalidInputError: With every fault that was found.
    """
    faults = Faults()
    for name, tensor in (
        ("slot_mapping", slot_mapping),
        *((a.name, a.rows) for a in arguments),
        *((a.cache_name, a.cache) for a in arguments),
    ):
        faults.need(isinstance(tensor, Tensor), f"{name} must be a tensor.", in_words(tensor), "torch.Tensor")
    if faults:
        raise InvalidInputError(operation, faults)
    device = slot_mapping.device
    faults.need(
        slot_mapping.dim() == 1 and slot_mapping.dtype in (torch.int32, torch.int64),
        "slot_mapping must be int32 or int64 of shape [num_tokens].",
        in_words(slot_mapping),
        "int64 [num_tokens]",
        "slot_mapping = slot_mapping.flatten().to(torch.int64)",
    )
    for argument in arguments:
        _check_half(argument, slot_mapping, device, faults)
    if not faults:
        shapes = [a.cache.shape[:-2] for a in arguments]
        faults.need(
            shapes[0] == shapes[1],
            f"{' and '.join(a.cache_name for a in arguments)} must have the same blocks.",
            " and ".join(str(list(s)) for s in shapes),
            "the same number of blocks (and pages), and the same block_size",
        )
    if faults:
        raise InvalidInputError(operation, faults)
    first, second = (half_of(a) for a in arguments)
    return StoreCall(slot_mapping, first, second)


def _check_half(a: Argument, slots: Tensor, device: torch.device, faults: Faults) -> None:
    """What is wrong with one half."""
    need = faults.need
    rows, cache, scale = a.rows, a.cache, a.scale
    for name, tensor in ((a.name, rows), (a.cache_name, cache), (a.scale_name, scale)):
        if isinstance(tensor, Tensor):
            need(
                tensor.device == device,
                f"{name} must be on the device of slot_mapping.",
                in_words(tensor),
                str(device),
            )
    need(
        rows.dim() == 3 and rows.dtype in Q_DTYPES,
        f"{a.name} must be [num_tokens, num_kv_heads, d] in float16, bfloat16 or float32.",
        in_words(rows),
    )
    need(
        cache.dim() in (4, 5) and cache.dtype in (*Q_DTYPES, *FP8_DTYPES),
        f"{a.cache_name} must be a paged cache of floating-point numbers.",
        in_words(cache),
        "[num_blocks, block_size, num_kv_heads, d] or "
        "[num_pages, blocks_per_page, block_size, num_kv_heads, d], 8, 16 or 32 bits",
    )
    if rows.dim() == 3 and cache.dim() in (4, 5):
        need(
            rows.shape[1:] == cache.shape[-2:],
            f"{a.name} and {a.cache_name} must have the same heads and dimensions.",
            f"{list(rows.shape[1:])} and {list(cache.shape[-2:])}",
        )
        need(
            rows.shape[0] >= slots.numel(),
            f"{a.name} must have a row for each slot.",
            f"{rows.shape[0]} rows, {slots.numel()} slots",
            "slot_mapping of shape [num_tokens], at most as many as there are rows",
        )
        need(
            not shares_memory(cache),
            f"{a.cache_name} gives several rows the same memory: it can only be read.",
            in_words(cache),
            "no dimension with a stride of 0",
        )
    if scale is None:
        return
    if isinstance(scale, float | int):
        need(0 < scale < math.inf, f"{a.scale_name} must be positive and finite.", in_words(scale))
        return
    if not isinstance(scale, Tensor):
        need(False, f"{a.scale_name} must be a number or a tensor.", in_words(scale))
        return
    need(
        scale.dtype == torch.float32,
        f"{a.scale_name} must be float32.",
        in_words(scale),
        "float32",
    )
    if cache.dim() not in (4, 5):
        return
    blocks = list(cache.shape[:-2])
    if is_written(scale, cache):
        per = scale.shape[-1]
        fits = list(scale.shape[:-1]) == blocks
        fits = fits and (per > 0 and cache.shape[-1] % per == 0 if a.groups else per == cache.shape[-2])
        last = "groups, a divisor of the row's width" if a.groups else f"{cache.shape[-2]}"
        need(
            fits,
            f"{a.scale_name} to be written must have a place for each row of {a.cache_name}.",
            in_words(scale),
            f"[{', '.join(map(str, blocks))}, {last}]",
        )
        need(
            cache.dtype in FP8_DTYPES,
            f"{a.scale_name} can be computed for an fp8 cache only.",
            f"a cache of {cache.dtype}",
            "float8_e4m3fn or float8_e5m2",
        )
        need(
            not shares_memory(scale),
            f"{a.scale_name} gives several scales the same memory: it can only be read.",
            in_words(scale),
        )
    elif scale.numel() != 1:
        need(
            scale.dim() == 1 and scale.shape[0] == cache.shape[-2],
            f"{a.scale_name} must be one number, one for each head, or have a place for each row.",
            in_words(scale),
            f"a float, [{cache.shape[-2]}], or [{', '.join(map(str, blocks))}, "
            f"{'groups' if a.groups else cache.shape[-2]}]",
        )


def half_of(a: Argument) -> Half:
    """A half in one form. Views only."""
    scale, written = a.scale, None
    if isinstance(scale, Tensor) and is_written(scale, a.cache):
        written = five_dims(scale.unsqueeze(-2 if a.groups else -1))
        scale = None
    elif a.cache.dtype not in FP8_DTYPES:
        scale = None  # other numbers are stored as they are
    elif isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.reshape(())
    return Half(a.rows, five_dims(a.cache), scale, written)


def facts_of(half: Half) -> HalfFacts:
    """The facts of a half."""
    rows, cache, scale, written = half
    strides = (0, 0, 0, 0, 0)
    kind = "none"
    if written is not None:
        kind, strides = "written", used_strides(written)  # type: ignore[assignment]
    elif isinstance(scale, Tensor):
        kind = "heads" if scale.dim() else "one"
        strides = (0, 0, 0, scale.stride(0) if scale.dim() else 0, 0)
    elif scale is not None:
        kind = "number"
    return HalfFacts(
        dtype=rows.dtype,
        cache_dtype=cache.dtype,
        heads=rows.shape[1],
        d=rows.shape[2],
        groups=1 if written is None else written.shape[-1],
        strides=used_strides(rows),  # type: ignore[arg-type]
        cache_strides=used_strides(cache),  # type: ignore[arg-type]
        align=alignment(rows),
        cache_align=alignment(cache),
        scale=kind,
        number=float(scale) if isinstance(scale, float | int) else 1.0,
        scale_strides=strides,
    )


def make_problem(call: StoreCall) -> StoreProblem:
    """The facts of a call."""
    cache = call.first.cache
    return StoreProblem(
        device=cache.device,
        num_tokens=call.slot_mapping.shape[0],
        slot_stride=call.slot_mapping.stride(0),
        num_pages=cache.shape[0],
        blocks_per_page=cache.shape[1],
        block_size=cache.shape[2],
        first=facts_of(call.first),
        second=facts_of(call.second),
    )
