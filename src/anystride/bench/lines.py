"""What is kept of a benchmark: one line of JSON a measurement, and how two runs compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Change", "Line", "append", "compare", "load"]


@dataclass(frozen=True)
class Line:
    """One kernel on one case in one layout, in one run.

    Attributes:
        suite: Name of the suite.
        case: Name of the case.
        layout: Name of the layout.
        kernel: ``anystride hopper``, a peer's title, ``pure read``, ``copy into packed``.
        version: Of the kernel's project.
        median_us: Device time in microseconds; None where it was not timed.
        q1_us: First quartile.
        q3_us: Third quartile.
        samples: How many calls.
        host_us: Host time of a call; None on a CPU.
        bytes: That must move.
        flop: Floating-point operations.
        note: Why there is no time: the refusal in the kernel's own words, or how wrong it was.
        read: The read ceiling of the run, bytes a second.
        product: The matrix ceiling of the run, operations a second.
        cold: Whether the L2 cache was flushed before each call.
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
    """What has changed between two runs, for the lines that both have.

    Slower is only what is slower beyond the spread of both: the quartiles do not overlap, and the medians
    differ by more than the larger distance of a median from its quartiles.
    """
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
        apart = line.q1_us > was.q3_us or line.q3_us < was.q1_us  # type: ignore[operator]
        difference = line.median_us - was.median_us
        if apart and abs(difference) > max(_spread(was), _spread(line)):
            verdict = "slower" if difference > 0 else "faster"
        changes.append(Change(was, line, line.median_us / was.median_us, verdict))
    return changes


def _spread(line: Line) -> float:
    assert line.median_us is not None
    assert line.q1_us is not None
    assert line.q3_us is not None
    return max(line.q3_us - line.median_us, line.median_us - line.q1_us)
