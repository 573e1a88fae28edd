"""Copying blocks on the CPU: indexed assignment through the strided views, some blocks at a time."""

from __future__ import annotations

import torch

from anystride.blocks import BlocksCall, BlocksProblem

CHUNK_BYTES = 16 << 20  # of blocks that are held at once


def refusals(problem: BlocksProblem) -> list[str]:
    """Every reason why PyTorch on the CPU cannot run the call."""
    if problem.device.type != "cpu":
        return [f"tensors are on {problem.device}; needs tensors on a CPU"]
    return []


def choose_config(problem: BlocksProblem) -> int:
    """Blocks that are copied at once."""
    block = problem.block_size * problem.heads * problem.d * problem.dtype.itemsize
    return max(1, CHUNK_BYTES // max(1, block))


def run(problem: BlocksProblem, config: int, call: BlocksCall) -> None:
    """Copy the blocks of which neither id is negative."""
    p = problem
    source_ids, target_ids = call.source_ids.long(), call.target_ids
    if target_ids is None:
        target_ids = torch.arange(p.count)
    target_ids = target_ids.long()
    kept = (source_ids >= 0) & (target_ids >= 0)
    for sources, targets in zip(source_ids[kept].split(config), target_ids[kept].split(config), strict=True):
        blocks = call.source[sources // p.source_blocks_per_page, sources % p.source_blocks_per_page]
        call.target[targets // p.target_blocks_per_page, targets % p.target_blocks_per_page] = blocks
