"""The write side: rows of the table, their tensors, and who stored them right.

Slots are in a random order. Nothing is timed before the cache holds what plain PyTorch computes, bit for
bit, and not a byte beside it has changed; vLLM's kernels may be one fp8 number off, as they divide less
exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystride import cache
from anystride.peers.store import vllm_store
from anystride.problem import BITS

__all__ = ["ROWS", "VLLM", "Case", "Row", "build", "bytes_to_move", "fault_of", "plain_copy"]

HEADS, D = 8, 128
LATENT, ROPE, GROUPS = 512, 64, 4
BLOCK = 16  # tokens
E4M3 = torch.float8_e4m3fn
VLLM = "vLLM Triton store"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Unique.
        tokens: That are stored.
        form: ``gqa``; ``mla``: one row; ``mixed``: its row of 656 bytes; ``blocks``: copied, gathered.
        fp8: Whether the cache is e4m3.
        scale: "", a ``number``, ``one`` on the device, one for each of the ``heads``; those of the ``rows``
            are written with them.
        layout: K and V ``apart``, in ``halves`` of a block, ``heads first`` within each half; of blocks
            ``copy`` or ``gather``.
        layers: That share the buffer.
        pad: Elements behind each half of a block.
        blocks: Of the cache.
    """

    name: str
    tokens: int
    form: str = "gqa"
    fp8: bool = False
    scale: str = ""
    layout: str = "apart"
    layers: int = 1
    pad: int = 0
    blocks: int = 2048


KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "e4m3, scale a number": {"fp8": True, "scale": "number"},
    "e4m3, scale a tensor": {"fp8": True, "scale": "one"},
    "e4m3, scales of heads": {"fp8": True, "scale": "heads"},
    "e4m3, scales written": {"fp8": True, "scale": "rows"},
    "MLA, bf16": {"form": "mla"},
    "MLA, e4m3": {"form": "mla", "fp8": True, "scale": "number"},
    "MLA, 656 bytes": {"form": "mixed", "fp8": True, "scale": "rows"},
}
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
LAYOUTS = (
    Row("bf16, 4096, layer of 4", 4096, layout="halves", layers=4),
    Row("bf16, 4096, heads first", 4096, layout="heads first"),
    Row("bf16, 4096, halves of a block", 4096, layout="halves"),
    Row("bf16, 4096, padded by 64 bytes", 4096, pad=32),
)
BLOCKS = tuple(Row(f"{what} 256 blocks", 256 * BLOCK, "blocks", layout=what) for what in ("copy", "gather"))
ROWS: tuple[Row, ...] = (
    *(Row(f"{kind}, {tokens}", tokens, **fields) for kind, fields in KINDS.items() for tokens in TOKENS),
    *LAYOUTS,
    *BLOCKS,
)


@dataclass(frozen=True)
class Case:
    """A row's tensors, what must become of them, and who can do it.

    Attributes:
        where: Indices of what is written.
        places: A view of a cache, or of scales, and what is wanted there.
        buffers: All memory behind them, as bytes.
        read: Bytes of the rows.
        makers: Of the calls, by the names of their kernels.
    """

    where: tuple[Tensor, ...]
    places: list[tuple[Tensor, Tensor]]
    buffers: list[Tensor]
    read: int
    makers: dict[str, Callable[[], Call]]


def bytes_to_move(case: Case) -> int:
    """Each row read and written once, scales that are written, too."""
    return case.read + sum(wanted.numel() * wanted.itemsize for _view, wanted in case.places)


def _filled(*shape: int, dtype: torch.dtype, on: str | torch.device) -> Tensor:
    """A buffer full of any bytes."""
    bits = torch.empty(*shape, dtype=dtype, device=on).view(BITS[dtype.itemsize])
    bits.view(torch.uint8).random_()
    return bits.view(dtype)


def _quantised(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows as they are stored. The scale is on their device: PyTorch multiplies by what a number inverts."""
    if scale is None:
        return rows.to(dtype)
    most = torch.finfo(dtype).max
    return (rows.float() / scale).clamp(-most, most).to(dtype)


def _own_scales(rows: Tensor, groups: int = 1) -> Tensor:
    """``[tokens, heads, groups]``: the largest number of each becomes fp8's largest."""
    most = torch.tensor(torch.finfo(E4M3).max, device=rows.device)
    largest: Tensor = rows.float().unflatten(-1, (groups, -1)).abs().amax(-1)
    return largest / most


def build(row: Row, on: str | torch.device, backend: str, folder: Path | None = None) -> Case:
    """The row's case.

    Args:
        row: What is stored.
        on: The device.
        backend: Of ours.
        folder: Of the peers that are not installed.
    """
    torch.manual_seed(0)
    slots = torch.randperm(row.blocks * BLOCK, device=on)[: row.tokens]
    if row.form == "blocks":
        return _build_blocks(row, on, backend)
    build_rows = _build_gqa if row.form == "gqa" else _build_mla
    return build_rows(row, slots, backend, folder)


def _new_rows(tokens: int, heads: int, d: int, d_too: int, on: torch.device) -> tuple[Tensor, Tensor]:
    """Both halves of new tokens."""
    first, second = (torch.randn(tokens, heads, n, dtype=torch.bfloat16, device=on) for n in (d, d_too))
    return first, second


def _given_scale(row: Row, on: torch.device) -> tuple[Any, Tensor | None]:
    """A scale as an argument, and as what ``[tokens, heads, d]`` can be divided by."""
    one = torch.tensor(0.02, device=on)
    heads = torch.linspace(0.02, 0.03, HEADS, device=on)
    return {"number": (0.02, one), "one": (one, one), "heads": (heads, heads[:, None])}.get(
        row.scale, (None, None)
    )


def _build_gqa(row: Row, slots: Tensor, backend: str, folder: Path | None) -> Case:
    """K and V with heads."""
    on, ours = slots.device, f"anystride {backend}"
    rows = key, value = _new_rows(row.tokens, HEADS, D, D, on)
    dtype = E4M3 if row.fp8 else torch.bfloat16
    width = HEADS * BLOCK * D
    if row.layout == "apart":
        store = _filled(2, row.blocks, row.layers, width + row.pad, dtype=dtype, on=on)
        halves = store[:, :, row.layers // 2]
    else:
        store = _filled(row.blocks, row.layers, 2, width + row.pad, dtype=dtype, on=on)
        halves = store[:, row.layers // 2].transpose(0, 1)
    shape = (HEADS, BLOCK, D) if row.layout == "heads first" else (BLOCK, HEADS, D)
    k, v = (half[:, :width].unflatten(1, shape) for half in halves)
    if row.layout == "heads first":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    where = (slots // BLOCK, slots % BLOCK)
    read = sum(x.numel() * x.itemsize for x in rows)
    if row.scale == "rows":
        beside = _filled(2, row.blocks, BLOCK, HEADS, dtype=torch.float32, on=on)
        scales = (beside[0], beside[1])
        own = [_own_scales(x) for x in rows]
        places = [(scale, x[..., 0]) for scale, x in zip(scales, own, strict=True)]
        places += [(view, _quantised(x, s, dtype)) for view, x, s in zip((k, v), rows, own, strict=True)]
        return Case(
            where, places, [store.view(torch.uint8), beside.view(torch.uint8)], read,
            {
                ours: lambda: lambda: cache.store_kv(key, value, k, v, slots, *scales, backend=backend),
                VLLM: lambda: vllm_store(key, value, (k, v), slots, scales, folder),
            },
        )  # fmt: skip
    scale, factors = _given_scale(row, on)
    places = [(view, _quantised(x, factors, dtype)) for view, x in zip((k, v), rows, strict=True)]
    return Case(
        where, places, [store.view(torch.uint8)], read,
        {
            ours: lambda: lambda: cache.store_kv(key, value, k, v, slots, scale, scale, backend=backend),
            VLLM: lambda: vllm_store(key, value, (k, v), slots, scale, folder),
        },
    )  # fmt: skip


def _build_mla(row: Row, slots: Tensor, backend: str, folder: Path | None) -> Case:
    """The latent and the rope part in one row of one dtype, or of two with scales between them."""
    on, ours = slots.device, f"anystride {backend}"
    rows = kv_c, k_pe = _new_rows(row.tokens, 1, LATENT, ROPE, on)
    where = (slots // BLOCK, slots % BLOCK)
    read = sum(x.numel() * x.itemsize for x in rows)
    if row.form == "mixed":
        end = LATENT + 4 * GROUPS
        store = _filled(row.blocks, BLOCK, end + 2 * ROPE, dtype=torch.uint8, on=on)
        parts = (store[..., :LATENT].view(E4M3), store[..., end:].view(torch.bfloat16))
        scales = store[..., LATENT:end].view(torch.float32)
        own = _own_scales(kv_c, GROUPS)[:, 0]
        latent = _quantised(kv_c[:, 0], own.repeat_interleave(LATENT // GROUPS, -1), E4M3)
        return Case(
            where, [(scales, own), (parts[0], latent), (parts[1], k_pe[:, 0])], [store], read,
            {ours: lambda: lambda: cache.store_mla(kv_c, k_pe, parts, slots, scales, backend=backend)},
        )  # fmt: skip
    dtype = E4M3 if row.fp8 else torch.bfloat16
    one = _filled(row.blocks, BLOCK, 1, LATENT + ROPE, dtype=dtype, on=on)  # with a head, as vLLM wants it
    scale, factors = _given_scale(row, on)
    wanted = _quantised(torch.cat(rows, -1), factors, dtype)
    return Case(
        where, [(one, wanted)], [one.view(torch.uint8)], read,
        {
            ours: lambda: lambda: cache.store_mla(kv_c, k_pe, one, slots, scale, backend=backend),
            VLLM: lambda: vllm_store(kv_c, k_pe, (one,), slots, scale, folder),
        },
    )  # fmt: skip


def _build_blocks(row: Row, on: str | torch.device, backend: str) -> Case:
    """Blocks from a cache into another: one after the other from or to a random order."""
    count, ours = row.tokens // BLOCK, f"anystride {backend}"
    few, many = (
        _filled(n, BLOCK, HEADS, D, dtype=torch.bfloat16, on=on) for n in (count, max(count, row.blocks))
    )
    ids = torch.randperm(len(many), device=on)[:count]
    order = torch.arange(count, device=on)
    read = few.numel() * few.itemsize
    # As integers: PyTorch might take a NaN for another.
    small, large = few.view(torch.int16), many.view(torch.int16)
    if row.layout == "copy":
        mapping = torch.stack([order, ids], 1)
        return Case(
            (ids,), [(many, few)], [many.view(torch.uint8)], read,
            {
                ours: lambda: lambda: cache.copy_blocks(few, many, mapping, backend=backend),
                "torch index_copy_": lambda: lambda: large.index_copy_(0, ids, small),
            },
        )  # fmt: skip
    return Case(
        (order,), [(few, many[ids])], [few.view(torch.uint8)], read,
        {
            ours: lambda: lambda: cache.gather_blocks(many, ids, few, backend=backend),
            "torch index_select": lambda: lambda: torch.index_select(large, 0, ids, out=small),
        },
    )  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    """The same as integers: PyTorch moves no fp8 by index."""
    return tensor.view(BITS[tensor.itemsize])


def steps(got: Tensor, wanted: Tensor) -> int:
    """How many numbers of their dtype lie between two tensors, at most."""
    ordered = []
    for x in (got, wanted):
        sign = 1 << (8 * x.itemsize - 1)
        code = bits(x).long() & (2 * sign - 1)
        ordered.append(torch.where(code >= sign, sign - code, code))
    return int((ordered[0] - ordered[1]).abs().max())


def fault_of(case: Case, call: Call, exact: bool = True) -> str:
    """Run a call: what is wrong with what it stored, or "". The caches are as before then.

    Args:
        case: Whose call it is.
        call: Stores once.
        exact: Whether every bit counts; else fp8 may be one number off, and scales, which are two divisions
            of float32, four.
    """
    before = [torch.empty(buffer.shape, dtype=buffer.dtype, device=buffer.device).copy_(buffer)
              for buffer in case.buffers]  # fmt: skip
    old = [bits(view)[case.where] for view, _wanted in case.places]
    call()
    fault = ""
    for (view, wanted), was in zip(case.places, old, strict=True):
        now = bits(view)[case.where]
        off = steps(now.view(view.dtype), wanted)
        allowed = 0 if exact else {torch.float32: 4, E4M3: 1}.get(view.dtype, 0)
        if off > allowed:
            fault = f"WRONG: {off} numbers off, allowed {allowed}"
        bits(view)[case.where] = was
    if not all(map(torch.equal, before, case.buffers)):
        fault = fault or "WRONG: wrote beside its rows"
        for buffer, kept in zip(case.buffers, before, strict=True):
            buffer.copy_(kept)
    return fault


def plain_copy(case: Case) -> Call:
    """PyTorch's copy of as many bytes, between contiguous tensors: a yardstick and no peer."""
    half = bytes_to_move(case) // 2
    source, target = (torch.zeros(half, dtype=torch.uint8, device=case.buffers[0].device) for _ in "ab")
    return lambda: target.copy_(source)
