"""Where results and scratch come from."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Scratch", "allocate", "kept_scratch"]


@cache
def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor of this shape without gaps."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, packed. Results come from here, and scratch that is not kept."""
    # Two thirds of what torch.empty takes on the host.
    return torch.empty_strided(shape, packed_strides(shape), dtype=dtype, device=device)


class Scratch(NamedTuple):
    """What the kernels of a call need besides its results."""

    partial: Tensor  # float32: results of parts
    schedule: Tensor  # int32


_KEPT: dict[tuple[int | None, int], tuple[int, int, Scratch]] = {}


def kept_scratch(device: torch.device, stream: int, values: int, words: int) -> Scratch:
    """Scratch that the calls on one stream use, one after the other: for calls of one launch, and no others.

    A launch waits for the one before it on its stream, whichever thread started that. Between two launches of
    one call another thread's could come; and a CUDA graph may be replayed on any stream. Both need scratch of
    their own.

    Args:
        device: Where.
        stream: The handle of its current stream.
        values: Elements of ``partial``, at least.
        words: Elements of ``schedule``, at least.

    Returns:
        Buffers that stay for the next call. Both are zeros when they are new; ``schedule`` has counters,
        which are 0 again after each call.
    """
    key = device.index, stream
    found = _KEPT.get(key)
    if found is None or found[0] < values or found[1] < words:
        if found is not None:
            values, words = max(values, found[0]), max(words, found[1])
        partial = torch.zeros(values, dtype=torch.float32, device=device)
        schedule = torch.zeros(words, dtype=torch.int32, device=device)
        found = _KEPT[key] = values, words, Scratch(partial, schedule)
    return found[2]
