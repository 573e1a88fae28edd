"""``explain``: who would run a call and how, who would not and why, and what it has to move."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from anystride.errors import UnsupportedError
from anystride.plan import AUTOMATIC, describe, make_plan, refusals_of
from anystride.problem import Call, Numbers, Problem, Relation, make_problem

__all__ = ["Explanation", "explain_call"]


@dataclass(frozen=True)
class Explanation:
    """What would happen to a call.

    Attributes:
        backend: Who would run it; None if nobody can.
        refusals: For every back end that cannot: all its reasons.
        relation: How V lies in memory, seen from K.
        config: The back end's configuration: tiles, splits, parts.
        bytes_moved: Bytes that any implementation must move: each valid row of the cache once (bytes that
            K and V share once), q, out and the table entries in use.
        bandwidth: Bytes a second, measured on this device by a copy; counts bytes read and written.
        call: The call in one line.
    """

    backend: str | None
    refusals: dict[str, list[str]]
    relation: Relation
    config: Any
    bytes_moved: int
    bandwidth: float
    call: str

    @property
    def floor_seconds(self) -> float:
        """The time that the bytes alone cost."""
        return self.bytes_moved / self.bandwidth

    def __str__(self) -> str:
        """A few lines for a terminal or a log."""
        kind, offset = self.relation
        where = "" if kind == "separate" else f", V at element {offset} of K's row"
        lines = [
            f"backend   {self.backend or 'none'}",
            f"call      {self.call}",
            f"relation  {kind}{where}",
        ]
        tiles = getattr(self.config, "tiles", None)
        if tiles is not None:
            lines.append(f"tiles     {tiles}")
            split = self.config.split
            splits = (
                f"{split.parts} parts of equal cost, cut on the device"
                if split.scheduled
                else f"{split.splits_per_unit} splits a unit"
            )
            lines.append(f"splits    {splits}")
        elif self.config is not None:
            lines.append(f"config    {self.config}")
        lines.append(
            f"moves     {self.bytes_moved:,} bytes: {self.floor_seconds * 1e6:.1f} us "
            f"at {self.bandwidth / 1e9:.0f} GB/s (measured)"
        )
        for name, reasons in self.refusals.items():
            lines += [f"{name + ' refuses':<18}{reason}" for reason in reasons]
        return "\n".join(lines)


def explain_call(call: Call, numbers: Numbers, backend: str | None) -> Explanation:
    """See :func:`anystride.explain`."""
    problem = make_problem(call, numbers)
    refusals = {name: reasons for name in AUTOMATIC if (reasons := refusals_of(name, problem))}
    name, config = None, None
    try:
        plan = make_plan(problem, backend)
        name, config = plan.backend.NAME, plan.config
    except UnsupportedError as error:
        refusals |= error.refusals
    bandwidth = copy_bandwidth(problem.device)
    return Explanation(
        name, refusals, problem.relation, config, bytes_to_move(problem, call), bandwidth,
        describe(problem),
    )  # fmt: skip


def bytes_to_move(problem: Problem, call: Call) -> int:
    """Bytes that must move, from the lengths: valid rows once, q, q_v, out, table entries in use."""
    if call.seqused_k is not None:
        lengths = call.seqused_k.tolist()
    else:
        assert call.cu_seqlens_k is not None  # the checks demand one of the two
        lengths = call.cu_seqlens_k.diff().tolist()
    tokens: int = sum(lengths)
    entries = sum(-(-n // problem.block_size) for n in lengths) if problem.paged else 0
    per_head = problem.d_qk + problem.d_v * (2 if problem.has_q_v else 1)
    queries = problem.total_q * problem.num_q_heads * per_head * problem.dtype.itemsize
    return tokens * problem.num_kv_heads * problem.kv_row_bytes + queries + 4 * entries


@lru_cache(maxsize=8)
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written; the best of five."""
    size = (1 << 28) if device.type != "cpu" else (1 << 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            began = time.perf_counter()
            target.copy_(source)
            seconds = time.perf_counter() - began
        best = min(best, seconds)
    return 2 * size / best
