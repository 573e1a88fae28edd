"""The write side on the CPU: indexed assignment through the strided views."""

from __future__ import annotations

import torch
from torch import Tensor

from anystride.problem import FP8_DTYPES
from anystride.store import Half, StoreCall, StoreProblem


def refusals(problem: StoreProblem) -> list[str]:
    """Every reason why PyTorch on the CPU cannot run the call."""
    if problem.device.type != "cpu":
        return [f"tensors are on {problem.device}; needs tensors on a CPU"]
    return []


def choose_config(problem: StoreProblem) -> None:
    """Nothing to choose."""


def run(problem: StoreProblem, config: None, call: StoreCall) -> None:
    """Store the rows whose slots are not negative."""
    slots = call.slot_mapping.long()
    kept = slots >= 0
    slots = slots[kept]
    block = slots // problem.block_size
    where = (block // problem.blocks_per_page, block % problem.blocks_per_page, slots % problem.block_size)
    for half in (call.first, call.second):
        rows = half.rows[: problem.num_tokens][kept]  # [tokens, heads, d]
        if half.scale is not None or half.written is not None or half.cache.dtype in FP8_DTYPES:
            rows = rows.float()
        if half.written is not None:
            rows, scales = _scaled(rows, half.cache.dtype, half.written.shape[-1])
            half.written[where] = scales
        elif half.scale is not None:
            scale = half.scale
            rows = rows / (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
        _put(half, where, rows)


def _scaled(rows: Tensor, dtype: torch.dtype, groups: int) -> tuple[Tensor, Tensor]:
    """Rows by their scales, and the scales ``[tokens, heads, groups]``: the largest number becomes fp8's."""
    cut = rows.unflatten(-1, (groups, -1))
    scales = cut.abs().amax(-1) / torch.finfo(dtype).max
    scales = torch.where(scales == 0, 1.0, scales)
    return (cut / scales[..., None]).flatten(-2), scales


def _put(half: Half, where: tuple[Tensor, ...], rows: Tensor) -> None:
    cache = half.cache
    if cache.dtype in FP8_DTYPES:
        most = torch.finfo(cache.dtype).max
        # PyTorch moves no fp8 by index; bytes it does.
        cache.view(torch.uint8)[where] = rows.clamp(-most, most).to(cache.dtype).view(torch.uint8)
    else:
        cache[where] = rows.to(cache.dtype)
