"""What is kept of a benchmark: one line of JSON a measurement, and how two runs compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["COPY", "OURS", "PLAIN_COPY", "PURE_READ", "Change", "Line", "append", "compare", "load"]

OURS = "anystride"  # begins the names of our kernels
PURE_READ = "pure read"  # PyTorch's x.max() over as many bytes: a yardstick of this method, and no peer
COPY = "copy into packed"  # what a kernel needs first that reads packed caches alone
PLAIN_COPY = "copy"  # of as many bytes as a store reads and writes
YARDSTICKS = (PURE_READ, COPY, PLAIN_COPY)


@dataclass(frozen=True)
class Line:
    """One kernel on one case in one layout, in one run.

    Attributes:
        suite: Name of the suite.
        case: Name of the case.
        layout: Name of the layout.
        kernel: ``anystride hopper``, a peer's title, or a yardstick, ``YARDSTICKS``.
        version: Of the kernel's project.
        median_us: Device time in microseconds, on a CPU wall time; None where it was not timed.
        q1_us: First quartile.
        q3_us: Third quartile.
        samples: How many calls.
        host_us: Host time of a call; None on a CPU.
        bytes: That must move; of a copy, all that it reads and writes.
        flop: Floating-point operations; 0 of a copy and of a read.
        note: Why there is no time: the refusal in the kernel's own words, or how wrong it was.
        read: The read ceiling of the run, bytes a second.
        product: The matrix ceiling of the run, operations a second.
        cold: Whether the L2 cache was flushed before each call; never on a CPU.
        device: Name of the device.
        torch: Version.
        triton: Version.
        anystride: Version.
        commit: Of anystride.
        date: UTC, of the run.
    """

    suite: str
    case: str
    layout: str
    kernel: str
    version: str
    median_us: float | None
    q1_us: float | None
    q3_us: float | None
    samples: int
    host_us: float | None
    bytes: int
    flop: int
    note: str
    read: float
    product: float
    cold: bool
    device: str
    torch: str
    triton: str
    anystride: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the line is about."""
        return self.suite, self.case, self.layout, self.kernel

    @property
    def is_ours(self) -> bool:
        """Whether it is about a kernel of this project."""
        return self.kernel.startswith(OURS)

    @property
    def is_yardstick(self) -> bool:
        """Whether it is about no kernel: a read or a copy of PyTorch's."""
        return self.kernel in YARDSTICKS

    @property
    def bytes_a_second(self) -> float:
        """NaN where it was not timed."""
        return self.bytes / (1e-6 * self.median_us) if self.median_us else math.nan

    @property
    def of_read(self) -> float:
        """Share of the read ceiling."""
        return self.bytes_a_second / self.read

    @property
    def of_product(self) -> float:
        """Share of the matrix ceiling."""
        return self.flop / (1e-6 * self.median_us) / self.product if self.median_us else math.nan


def append(path: Path, lines: Iterable[Line]) -> None:
    """Add lines to the end of a file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(asdict(line)) + "\n")


def load(path: Path) -> list[Line]:
    """Read what :func:`append` wrote; of several lines about the same, the last."""
    found = (Line(**json.loads(text)) for text in path.read_text().splitlines() if text.strip())
    return list({line.key: line for line in found}.values())


class Change(NamedTuple):
    """A kernel on a case, before and after."""

    old: Line
    new: Line
    ratio: float  # the new median over the old one
    verdict: str  # "slower", "faster", "" for neither, or what became of it: "no longer timed"


def compare(old: Sequence[Line], new: Sequence[Line]) -> list[Change]:
    """What has changed between two runs, for what the old one timed and the new one has a line of.

    Slower is only what is slower beyond the spread of both: the quartiles do not overlap, and the medians
    differ by more than the larger distance of a median from its quartiles.

    Raises:
        ValueError: They are of different devices, or one of them left the caches as they were.
    """
    kinds = {(line.device, line.cold) for line in (*old, *new)}
    if len(kinds) > 1:
        told = ", ".join(f"{device} {'cold' if cold else 'hot'}" for device, cold in sorted(kinds))
        raise ValueError(f"no comparison: these are times of {told}")
    before = {line.key: line for line in old}
    changes = []
    for line in new:
        was = before.get(line.key)
        if was is None or was.median_us is None:
            continue
        if line.median_us is None:
            changes.append(Change(was, line, math.nan, "no longer timed"))
            continue
        verdict = ""
        (low, high), (was_low, was_high) = _quartiles(line), _quartiles(was)
        difference = line.median_us - was.median_us
        spread = max(
            line.median_us - low, high - line.median_us, was.median_us - was_low, was_high - was.median_us
        )
        if (low > was_high or high < was_low) and abs(difference) > spread:
            verdict = "slower" if difference > 0 else "faster"
        changes.append(Change(was, line, line.median_us / was.median_us, verdict))
    return changes


def _quartiles(line: Line) -> tuple[float, float]:
    assert line.q1_us is not None
    assert line.q3_us is not None
    return line.q1_us, line.q3_us
