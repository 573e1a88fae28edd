"""The tables of docs/conformance-results.md are what the stored reports say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich")
from anystride.cli.check_summary import layout_cell, layouts_by_family, probe_cell, probes_of
from anystride.testing.report import Report, load_reports

DOCS = Path(__file__).parents[1] / "docs"
REPORTS = load_reports(DOCS / "conformance-results.json")
SHORT = {
    "anystride hopper": "`hopper`", "anystride triton": "`triton`", "FlashAttention-3": "FA3",
    "FlashInfer fa2": "FI fa2", "FlashInfer fa3": "FI fa3", "FlashInfer decode": "FI decode",
    "vLLM Triton decode": "vLLM decode", "vLLM Triton unified": "vLLM unified",
    "torch FlexAttention": "Flex",
}  # fmt: skip


def cell(found: object) -> str:
    """A verdict, and how many of the calls that were taken came to it."""
    return str(found) if found is not None else "-"


def table(first: str, names: list[str], look: object) -> str:
    titles = [SHORT.get(report.title, report.title) for report in REPORTS]
    lines = [f"| {first} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name in names:
        cells = [cell(look(report, name)) for report in REPORTS]  # type: ignore[operator]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_probe(report: Report, probe: str) -> str | None:
    found = probe_cell(report, probe)
    return None if found is None else found.text


def of_layout(report: Report, layout: str) -> str | None:
    found = layout_cell(report, layout)
    return None if found is None else found.text


def tables() -> dict[str, str]:
    made = {"probes": table("probe", probes_of(REPORTS), of_probe)}
    for family, layouts in layouts_by_family(REPORTS).items():
        made[family] = table(f"layout, {family}", layouts, of_layout)
    return made


@pytest.mark.parametrize("name", tables())
def test_a_table_says_what_was_found(name: str) -> None:
    assert tables()[name] in (DOCS / "conformance-results.md").read_text()
