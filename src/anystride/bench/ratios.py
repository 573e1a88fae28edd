"""What a table of times says: ours against the best peer, and a layout against a packed cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from anystride.bench.lines import COPY, Line

__all__ = ["Overhead", "SpeedUp", "by_row", "geometric_mean", "overheads", "speed_ups"]


def by_row(lines: Iterable[Line]) -> dict[tuple[str, str, str], list[Line]]:
    """The lines of each suite, case and layout, in the order in which they came."""
    rows: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        rows.setdefault((line.suite, line.case, line.layout), []).append(line)
    return rows


class SpeedUp(NamedTuple):
    """One row: the fastest of ours, the fastest peer, and the peer's time by ours."""

    ours: Line
    peer: Line
    ratio: float


def speed_ups(lines: Iterable[Line]) -> list[SpeedUp]:
    """Of every row that both one of ours and a peer were timed on."""
    found = []
    for row in by_row(lines).values():
        ours = _fastest([line for line in row if line.is_ours])
        peer = _fastest([line for line in row if not line.is_ours and not line.is_yardstick])
        if ours is not None and peer is not None:
            found.append(SpeedUp(ours, peer, _time(peer) / _time(ours)))
    return found


class Overhead(NamedTuple):
    """One kernel on one case in one layout.

    Attributes:
        line: The measurement, or the refusal.
        ratio: Its time by that of the same kernel in a packed cache; where it refused, of the copy and the
            packed call together; NaN where one of them is not known.
        is_copied: Whether it refused, so that the cache must be copied first.
    """

    line: Line
    ratio: float
    is_copied: bool


def overheads(lines: Sequence[Line], packed: Sequence[str]) -> list[Overhead]:
    """What layouts cost, for each kernel that was timed on the same case in a packed cache.

    Args:
        lines: Of the suite ``layouts``.
        packed: The names of packed layouts.
    """
    there = {
        (line.case, line.kernel): line.median_us for line in lines if line.layout in packed and line.median_us
    }
    copies = {(line.case, line.layout): line.median_us for line in lines if line.kernel == COPY}
    found = []
    for line in lines:
        base = there.get((line.case, line.kernel))
        if line.is_yardstick or base is None:
            continue
        if line.median_us is not None:
            found.append(Overhead(line, line.median_us / base, False))
        else:
            copy = copies.get((line.case, line.layout)) if line.note.startswith("refused") else None
            found.append(Overhead(line, math.nan if copy is None else (copy + base) / base, copy is not None))
    return found


def geometric_mean(ratios: Sequence[float]) -> float:
    """Of one ratio or more."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _fastest(lines: Sequence[Line]) -> Line | None:
    return min((line for line in lines if line.median_us), key=_time, default=None)


def _time(line: Line) -> float:
    assert line.median_us is not None
    return line.median_us
