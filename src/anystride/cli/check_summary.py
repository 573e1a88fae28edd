"""What the terminal and the page both show of the kit's reports: cells, rows, faults, refusals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from anystride.cli import catalogue
from anystride.testing import LAYOUTS
from anystride.testing.report import Finding, Report, Verdict

__all__ = [
    "FAMILIES",
    "FAULTS",
    "MEANINGS",
    "READING",
    "WORST_FIRST",
    "Cell",
    "Group",
    "error_of",
    "groups_of",
    "layout_cell",
    "layouts_by_family",
    "left_out_of",
    "place_of",
    "probe_cell",
    "probes_of",
    "sentence",
    "split",
    "versions_of",
]

WORST_FIRST = tuple(reversed(Verdict))
FAULTS = (Verdict.WRONG, Verdict.CRASHED)

MEANINGS = {
    Verdict.OK: "right, and the cache was read in place",
    Verdict.COPIED: "right, but the cache was copied first: seen from the allocator",
    Verdict.REFUSED: "the kernel said no, in its own words; nothing is held against it",
    Verdict.WRONG: "an answer that is not right, or bytes written that are not its own",
    Verdict.CRASHED: "the process died, hung, or lost its device",
}
READING = (
    "A cell shows the worst of all calls that were taken. 2/3: two of three calls came to that. "
    "It says refused where every call was refused."
)

FAMILIES = catalogue.FAMILIES | {"other": "Not in the catalogue"}


@dataclass(frozen=True)
class Cell:
    """What one kernel's calls about one probe, or in one layout, came to: never empty."""

    findings: tuple[Finding, ...]

    @cached_property
    def counts(self) -> Counter[Verdict]:
        """Calls by verdict."""
        return Counter(finding.verdict for finding in self.findings)

    @property
    def verdict(self) -> Verdict:
        """The worst of those that were taken; refused if none was."""
        taken = [
            verdict for verdict in WORST_FIRST if self.counts[verdict] and verdict is not Verdict.REFUSED
        ]
        return taken[0] if taken else Verdict.REFUSED

    @property
    def share(self) -> str:
        """``2/3``, how many came to the verdict; "" if all did."""
        count, total = self.counts[self.verdict], len(self.findings)
        return "" if count == total else f"{count}/{total}"

    @property
    def text(self) -> str:
        """Verdict and share."""
        return f"{self.verdict.value} {self.share}".strip()

    @property
    def spoken(self) -> str:
        """Every verdict with its count, the worst first."""
        return ", ".join(f"{self.counts[v]} {v.value}" for v in WORST_FIRST if self.counts[v])


@dataclass(frozen=True)
class Group:
    """Calls of one kernel that came to the same, and about which it, or the kit, said the same.

    Attributes:
        verdict: Of all of them.
        message: The words about the first call.
        alike: Whether other calls got the same words with other numbers.
        findings: All of these calls, probes first: they name the cause.
    """

    verdict: Verdict
    message: str
    alike: bool
    findings: tuple[Finding, ...]


def split(reports: Sequence[Report]) -> tuple[list[Report], list[Report]]:
    """Those that were here, and those that were absent."""
    return [r for r in reports if not r.absent], [r for r in reports if r.absent]


def probes_of(reports: Iterable[Report]) -> list[str]:
    """The probes, in the order in which they were first made."""
    return list(dict.fromkeys(f.probe for report in reports for f in report.findings if f.probe))


def layouts_by_family(reports: Iterable[Report]) -> dict[str, list[str]]:
    """The layouts in which cases of the table ran, in the order of the catalogue, by family."""
    found = dict.fromkeys(f.layout for report in reports for f in report.findings if not f.probe)
    names = [*(name for name in LAYOUTS if name in found), *(name for name in found if name not in LAYOUTS)]
    families: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in names:
        families[_family(name)].append(name)
    return {family: names for family, names in families.items() if names}


def _family(name: str) -> str:
    if name not in LAYOUTS:
        return "other"
    return "adversarial" if name.startswith("A-") else LAYOUTS[name].family


def probe_cell(report: Report, probe: str) -> Cell | None:
    """A kernel's findings about a probe; None if there are none."""
    return _cell(f for f in report.findings if f.probe == probe)


def layout_cell(report: Report, layout: str) -> Cell | None:
    """A kernel's findings about the cases of the table in a layout; None if there are none."""
    return _cell(f for f in report.findings if not f.probe and f.layout == layout)


def _cell(findings: Iterable[Finding]) -> Cell | None:
    found = tuple(findings)
    return Cell(found) if found else None


def groups_of(report: Report, *verdicts: Verdict) -> list[Group]:
    """The findings of these verdicts by verdict and message; numbers do not tell messages apart.

    The worst verdict first, and within it the largest group.
    """
    found: dict[tuple[Verdict, str], list[Finding]] = {}
    for finding in sorted(report.findings, key=lambda finding: not finding.probe):
        if finding.verdict in verdicts:
            key = (finding.verdict, re.sub(r"\d+", "0", finding.message))
            found.setdefault(key, []).append(finding)
    groups = [
        Group(verdict, alike[0].message, len({f.message for f in alike}) > 1, tuple(alike))
        for (verdict, _), alike in found.items()
    ]
    return sorted(groups, key=lambda group: (WORST_FIRST.index(group.verdict), -len(group.findings)))


def place_of(finding: Finding) -> str:
    """What was asked: the probe if there is one, the case, the layout."""
    place = f"{finding.case} in {finding.layout}"
    return f"{finding.probe}: {place}" if finding.probe else place


def error_of(finding: Finding) -> str:
    """The error, and what was allowed; "" where nothing was compared."""
    if finding.error is None:
        return ""
    allowed = "" if finding.allowed is None else f", allowed {finding.allowed:.2e}"
    return f"error {finding.error:.2e}{allowed}"


def left_out_of(reports: Iterable[Report]) -> dict[str, list[str]]:
    """What was not tried and why, with the kernels with which it was not."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for why in report.left_out:
            found.setdefault(why, []).append(report.title)
    return found


def sentence(report: Report) -> str:
    """A kernel's findings in a few words, or why it is absent."""
    cell = _cell(report.findings)
    return report.absent or (cell.spoken if cell else "nothing was asked")


def versions_of(reports: Iterable[Report]) -> dict[str, list[str]]:
    """By name, ``device`` first, every version that stands in a report: mostly one."""
    found: dict[str, dict[str, None]] = {}
    for report in reports:
        facts = {"device": report.device, **report.versions} if report.device else report.versions
        for name, version in facts.items():
            found.setdefault(name, {})[version] = None
    return {name: list(versions) for name, versions in found.items()}
