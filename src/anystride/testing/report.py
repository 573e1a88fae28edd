"""What the conformance kit found: verdicts, findings, a report of one kernel, and its JSON."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Finding", "Report", "Verdict", "load_reports", "save_reports"]


class Verdict(str, enum.Enum):
    """What one call came to, the best first."""

    OK = "ok"  # right, and the cache was read in place
    COPIED = "copied"  # right, but the cache was materialised: the allocator saw it
    REFUSED = "refused"  # an exception, with the kernel's own message
    WRONG = "WRONG"  # an answer that is not the law's, or bytes written that are nobody's
    CRASHED = "crashed"  # the process died, hung, or its device did


@dataclass(frozen=True)
class Finding:
    """One call.

    Attributes:
        case: Name of the case.
        layout: Name of the layout.
        verdict: What it came to.
        probe: What alone was probed, the name of a column (``conformance.PROBES``); "" for a case of the
            table in a layout of the catalogue, with NaN in its gaps.
        message: The kernel's own message, what is wrong in a sentence, or "".
        where: The worst element: ``out[3, 5, 17]: got nan, right 0.12``; "" unless it is wrong.
        error: Largest error against the float64 law, None where nothing was compared.
        allowed: What plain PyTorch's error allows, None where nothing was compared.
        copied_bytes: Of the cache, as far as the allocator saw a copy of it.
        seconds: Of the whole finding, tensors and law included.
    """

    case: str
    layout: str
    verdict: Verdict
    probe: str = ""
    message: str = ""
    where: str = ""
    error: float | None = None
    allowed: float | None = None
    copied_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All findings about one kernel.

    Attributes:
        kernel: The name it was asked for by: ``hopper``, ``flash-mla``, ``module:function``.
        title: As it stands in tables.
        version: Of the kernel's project, "" if it is not known.
        device: Name of the device.
        versions: Of anystride, torch, triton, CUDA, by name.
        findings: In the order in which they were made.
        absent: Why the kernel is not here; then there are no findings.
        left_out: What was not tried, and why, a sentence each.
    """

    kernel: str
    title: str
    version: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    absent: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def is_trustworthy(self) -> bool:
        """Whether it was here, and nothing was wrong and nothing crashed: it may refuse, and copy."""
        bad = (Verdict.WRONG, Verdict.CRASHED)
        return not self.absent and not any(finding.verdict in bad for finding in self.findings)

    def worst(self, *, probe: str | None = None, layout: str | None = None) -> Finding | None:
        """The worst finding about a probe, a layout, or all; None if there is none."""
        order = list(Verdict)
        found = [
            finding
            for finding in self.findings
            if (probe is None or finding.probe == probe) and (layout is None or finding.layout == layout)
        ]
        return max(found, key=lambda finding: order.index(finding.verdict), default=None)


def save_reports(path: Path, reports: Sequence[Report]) -> None:
    """Write reports as one JSON file."""
    path.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")


def load_reports(path: Path) -> list[Report]:
    """Read what :func:`save_reports` wrote."""
    return [_report(entry) for entry in json.loads(path.read_text())]


def _report(entry: dict[str, Any]) -> Report:
    findings = (Finding(**{**found, "verdict": Verdict(found["verdict"])}) for found in entry["findings"])
    return Report(**{**entry, "findings": tuple(findings), "left_out": tuple(entry["left_out"])})
