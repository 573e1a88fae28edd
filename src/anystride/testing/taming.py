"""Take the poison out of inputs, a kind at a time: to see which kind a kernel cannot bear."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from anystride.testing import storage as memory
from anystride.testing.inputs import Inputs
from anystride.testing.storage import Storage

__all__ = ["POISONS", "tame"]

POISONS = {
    "gaps": "NaN in all memory that no row of K or V takes: gaps, padding, other layers",
    "tails": "NaN in the rows of a sequence's last block past its length",
    "unused": "NaN in the blocks that no sequence uses, block 0 among them",
    "ids": "garbage in the block table past a sequence's blocks",
}


def tame(inputs: Inputs, keep: Collection[str]) -> Inputs:
    """The same call with zeros for NaN, and block 0 for garbage ids, but for the poisons in ``keep``.

    Args:
        inputs: Changed in place, apart from its copy of the cache.
        keep: Keys of ``POISONS``.

    Returns:
        The inputs, with a new copy of the cache if they had one.
    """
    storage, table = inputs.storage, inputs.kwargs.get("block_table")
    valid = memory.slots(storage.shape, table, _lengths(inputs), inputs.kwargs.get("cu_seqlens_k"))
    if "gaps" not in keep and not storage.lazy:
        _zero_gaps(storage)
    for name, places in zip(("tails", "unused"), _idle_rows(storage, valid), strict=True):
        if name not in keep:
            bits = storage.bits()
            for geometry in (storage.k_geometry, storage.v_geometry):
                view = geometry.view(bits)
                if geometry.stride[3] == 0:  # all heads are one: it may be written only once
                    view = view[..., :1, :]
                view[places] = 0
    if "ids" not in keep and table is not None:
        for row, length in zip(table, inputs.lengths, strict=True):
            row[-(-length // storage.shape.block_size) :] = 0
    return replace(inputs, before=None if inputs.before is None else memory.canary(storage))


def _lengths(inputs: Inputs) -> Tensor:
    return torch.tensor(inputs.lengths, dtype=torch.int32, device=inputs.kwargs["q"].device)


def _zero_gaps(storage: Storage) -> None:
    """Write zeros wherever no row of K or V lies."""
    twins = [torch.ones(flat.numel(), dtype=torch.bool, device=flat.device) for flat in storage.buffers]
    for geometry in (storage.k_geometry, storage.v_geometry):
        geometry.view(twins).fill_(False)
    for flat, is_gap in zip(storage.bits(), twins, strict=True):
        flat[is_gap] = 0


def _idle_rows(
    storage: Storage, valid: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Page, block and token of the rows that hold no token: in blocks that are used, and in others."""
    shape = storage.shape
    size = (shape.num_pages, shape.blocks_per_page, shape.block_size)
    holds = torch.zeros(size, dtype=torch.bool, device=valid[0].device)
    holds[valid] = True
    used = holds.any(-1, keepdim=True)
    tails, unused = ~holds & used, (~holds & ~used)
    return tails.nonzero(as_tuple=True), unused.nonzero(as_tuple=True)
