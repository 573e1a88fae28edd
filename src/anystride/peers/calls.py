"""What peers have in common: reading a call of the entry, and refusing what a peer has no argument for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anystride.peers.peer import Refused
from anystride.problem import alignment, used_strides

__all__ = [
    "blocks_in_use", "demand", "four_dims", "query_counts", "refuse_but", "rows_off_16_bytes", "whole",
]  # fmt: skip


def demand(reasons: dict[str, bool]) -> None:
    """Refuse with every reason whose demand does not hold.

    Args:
        reasons: What is needed, in words, and whether it is so.

    Raises:
        Refused: Something is not so.
    """
    missing = [text for text, holds in reasons.items() if not holds]
    if missing:
        raise Refused("; ".join(missing))


def _features(kwargs: dict[str, Any]) -> dict[str, str]:
    """The arguments of a call that ask for something, and what that is in words."""
    given = {name for name, value in kwargs.items() if value is not None}
    found = {
        "q_v": "queries in two parts (q_v)",
        "alibi_slopes": "alibi slopes",
        "s_aux": "sinks",
        "q_descale": "a scale of the queries",
        "k_descale": "a scale of K",
        "v_descale": "a scale of V",
        "k_scale_cache": "scales of K's rows",
        "v_scale_cache": "scales of V's rows",
    }
    found = {name: text for name, text in found.items() if name in given}
    if tuple(kwargs.get("window_size") or (-1, -1)) != (-1, -1):
        found["window_size"] = "a window"
    if kwargs.get("softcap"):
        found["softcap"] = "a softcap"
    if kwargs.get("cp_world_size", 1) > 1:
        found["cp_world_size"] = "context parallelism"
    if kwargs.get("batch_invariant"):
        found["batch_invariant"] = "a promise of the same bits in any batch"
    if kwargs.get("block_table") is None:
        found["block_table"] = "a cache without a block table"
    if kwargs.get("num_splits"):
        found["num_splits"] = "a number of splits"
    return found


def refuse_but(kwargs: dict[str, Any], *takes: str) -> None:
    """Refuse a call that asks for something but for the arguments named in ``takes``.

    Raises:
        Refused: Naming each.
    """
    asked = [text for name, text in _features(kwargs).items() if name not in takes]
    if asked:
        raise Refused(f"no argument for {', '.join(asked)}")


def rows_off_16_bytes(cache: Tensor) -> bool:
    """Whether some row of ``[..., d]`` begins at no multiple of 16 bytes."""
    return alignment(cache) < 16 or any(step * cache.itemsize % 16 for step in used_strides(cache)[:-1])


def query_counts(kwargs: dict[str, Any]) -> list[int]:
    """Query tokens of each sequence, read from the device."""
    counts: list[int] = kwargs["cu_seqlens_q"].diff().tolist()
    return counts


def four_dims(cache: Tensor, name: str) -> Tensor:
    """``[num_blocks, block_size, num_kv_heads, d]``, a view: a 5-D cache too, if one stride says it.

    Raises:
        Refused: Blocks of a page and pages have no single stride.
    """
    if cache.dim() == 4:
        return cache
    pages, blocks = cache.shape[:2]
    if pages > 1 and cache.stride(0) != blocks * cache.stride(1):
        raise Refused(
            f"{name} has pages of {blocks} blocks with a gap between them: no one stride from block to block"
        )
    size = (pages * blocks, *cache.shape[2:])
    return cache.as_strided(size, cache.stride()[1:], cache.storage_offset())


def blocks_in_use(table: Tensor, lengths: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Where each sequence's blocks begin among all block ids in use, ``[batch + 1]``, and these ids."""
    counts = (lengths + block_size - 1) // block_size
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=table.device)
    starts[1:] = counts.cumsum(0)
    there = torch.arange(table.shape[1], device=table.device) < counts[:, None]
    return starts, table[there]


def whole(rows: Tensor, total: int) -> Tensor:
    """``rows``, and zeros up to ``total`` rows: rows of q that belong to no sequence have a place."""
    if rows.shape[0] == total:
        return rows
    padded = rows.new_zeros((total, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    return padded
