"""The tables of docs/conformance-results.md are what the stored reports say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("rich")
from anystride.cli.check_summary import Cell, layout_cell, layouts_by_family, probe_cell, probes_of
from anystride.testing.report import Report, load_reports

DOCS = Path(__file__).parents[1] / "docs"
REPORTS = load_reports(DOCS / "conformance-results.json")
SHORT = {
    "anystride hopper": "`hopper`", "anystride triton": "`triton`", "FlashAttention-3": "FA3",
    "FlashInfer fa2": "FI fa2", "FlashInfer fa3": "FI fa3", "FlashInfer decode": "FI decode",
    "vLLM Triton decode": "vLLM decode", "vLLM Triton unified": "vLLM unified",
    "torch FlexAttention": "Flex",
}  # fmt: skip


def table(first: str, names: list[str], look: Callable[[Report, str], Cell | None]) -> str:
    titles = [SHORT.get(report.title, report.title) for report in REPORTS]
    lines = [f"| {first} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name in names:
        cells = (look(report, name) for report in REPORTS)
        lines.append(f"| {name} | {' | '.join('-' if cell is None else cell.text for cell in cells)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    made = {"probes": table("probe", probes_of(REPORTS), probe_cell)}
    for family, layouts in layouts_by_family(REPORTS).items():
        made[family] = table(f"layout, {family}", layouts, layout_cell)
    return made


@pytest.mark.parametrize("name", tables())
def test_a_table_says_what_was_found(name: str) -> None:
    assert tables()[name] in (DOCS / "conformance-results.md").read_text()
