"""What both command lines share: devices and rows that were asked for, where lines go, and how it ended."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from anystride.bench import store
from anystride.bench.lines import Line
from anystride.bench.measure import Bench, device_type
from anystride.bench.suites import Row, rows_of
from anystride.peers import PEERS
from anystride.plan import NAMES

__all__ = ["RESULTS", "device_for", "exit_code", "file_of", "head_of", "rows_asked_for", "start"]

RESULTS = Path("benchmarks/results")  # where lines go if nothing else is said


def device_for(suites: Sequence[str], asked: str = "") -> torch.device:
    """The device on which all of the suites are timed.

    Args:
        suites: Names of suites.
        asked: A device; "" for the first of the kind that the suites are for.

    Raises:
        ValueError: The suites need two kinds of devices, or one that is not there or was not asked for.
    """
    kinds = sorted({device_type(suite) for suite in suites})
    if len(kinds) > 1:
        raise ValueError("the suite cpu is timed on a CPU, the others on a GPU: time it in a run of its own")
    device = torch.device(asked or kinds[0])
    if device.type != kinds[0]:
        raise ValueError(f"{', '.join(suites)}: timed on {kinds[0]}, not on {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{', '.join(suites)}: timed on a GPU, and there is none; --suite cpu needs none")
    return device


def start(
    device: torch.device,
    backends: Sequence[str],
    peers: Path | None,
    without: Collection[str],
    hot: bool,
    rounds: int,
    of_commit: str,
) -> Bench:
    """See :class:`Bench`; measures the ceilings.

    Raises:
        ValueError: A name is that of no back end, or of no peer.
    """
    known = [peer.name for peer in PEERS]
    for names, there, what in ((backends, NAMES, "back end"), (without, known, "peer")):
        for name in names:
            if name not in there:
                raise ValueError(f"there is no {what} {name!r}; there are {', '.join(there)}")
    if rounds < 1:
        raise ValueError(f"{rounds} rounds time nothing")
    return Bench(device, backends, peers, without, hot, rounds, of_commit)


def rows_asked_for(suite: str, only: str = "") -> list[Row] | list[store.Row]:
    """The rows of a suite whose names contain ``only``."""
    return [row for row in rows_of(suite) if only in row.name]  # type: ignore[return-value]


def file_of(folder: Path, suite: str, facts: Line) -> Path:
    """Where the lines of a suite go: a file for each suite, device and day."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", facts.device).strip("-")
    return folder / f"{suite}-{device}-{facts.date[:10]}.jsonl"


def head_of(facts: Line) -> str:
    """Device, versions, and ceilings, in a line."""
    return (
        f"{facts.device}, torch {facts.torch}, Triton {facts.triton or 'none'}, commit {facts.commit}, "
        f"{'cold' if facts.cold else 'hot'}: "
        f"read {facts.read / 1e9:.0f} GB/s, product {facts.product / 1e12:.3g} TFLOP/s"
    )


def exit_code(lines: Sequence[Line]) -> int:
    """0; 1 if a kernel of ours was wrong; 2 if nothing was timed."""
    if any(line.is_ours and line.note.startswith("WRONG") for line in lines):
        return 1
    return 0 if any(line.median_us for line in lines) else 2
