"""Every layout of the catalogue against the law, with q, out and the block table in strides of their own.

``test_layouts.py`` shows that a layout changes no bit, ``test_cpu.py`` that cases are right. Here all of it
meets: layout, strides, poison around what is read, canaries around what is written.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from anystride.testing import LAYOUTS, Case, Inputs, Layout, compatible, make_inputs, select
from anystride.testing.judgement import assert_right, attend
from anystride.testing.rows import ROW_RECIPES, TABLE_RECIPES


@dataclass(frozen=True)
class Meeting:
    """A case in a layout, and the strides of the tensors that are no cache."""

    case: Case
    layout: Layout
    rows: str
    table: str
    out: str | None

    def inputs(self, **options: Any) -> Inputs:
        return make_inputs(self.case, self.layout, rows=self.rows, table=self.table, out=self.out, **options)


def meetings(cases: tuple[Case, ...]) -> list[Any]:
    """All layouts with all of the cases that they can hold; strides take turns, at unlike paces."""
    rows, tables = itertools.cycle(ROW_RECIPES), itertools.cycle(TABLE_RECIPES)
    outs = itertools.cycle([*reversed(ROW_RECIPES), None])
    found = []
    for layout in LAYOUTS.values():
        for case in cases:
            if compatible(case, layout) is None:
                one = Meeting(case, layout, next(rows), next(tables), next(outs))
                name = f"{layout.name}-{case.name}-{one.rows}-{one.table}-{one.out}"
                found.append(pytest.param(one, id=name))
    return found


TINY, QUICK = meetings(select("tiny")), meetings(select("quick", "cpu"))


@pytest.mark.parametrize("meeting", TINY)
def test_tiny_cases_in_every_layout_are_right(meeting: Meeting) -> None:
    world = meeting.case.cp.world_size if meeting.case.cp else 1
    for rank in range(world):
        inputs = meeting.inputs(rank=rank)
        assert_right(inputs, *attend(inputs, "cpu"))


@pytest.mark.parametrize("meeting", QUICK[::7])  # 7 divides neither the layouts nor the cases
def test_quick_cases_in_every_layout_are_right(meeting: Meeting) -> None:
    inputs = meeting.inputs(seed=1)
    assert_right(inputs, *attend(inputs, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_quick_cases_in_a_layout_are_right(layout: str) -> None:
    for parameter in QUICK:
        if parameter.values[0].layout.name == layout:
            inputs = parameter.values[0].inputs()
            assert_right(inputs, *attend(inputs, "cpu"))


def test_everything_meets_everything() -> None:
    met: list[Meeting] = [parameter.values[0] for parameter in TINY]
    sampled: list[Meeting] = [parameter.values[0] for parameter in QUICK[::7]]
    assert {one.layout.name for one in met} == set(LAYOUTS)
    assert {one.case.name for one in met} == {case.name for case in select("tiny")}
    assert {one.case.name for one in sampled} == {case.name for case in select("quick", "cpu")}
    for layout in LAYOUTS:
        mine = [one for one in met if one.layout.name == layout]
        assert len({one.rows for one in mine}) == min(len(mine), len(ROW_RECIPES))
        assert len({one.out for one in mine}) == min(len(mine), len(ROW_RECIPES) + 1)
        assert len({one.table for one in mine}) == min(len(mine), len(TABLE_RECIPES))


def test_strides_of_the_slow_run_and_of_ci_are_as_drawn() -> None:
    # The recipes reach the call: q, out and the table have the strides that their names say.
    seen = set()
    for parameter in TINY:
        one: Meeting = parameter.values[0]
        if one.case.name == "tiny-gqa":
            a = one.inputs().kwargs
            seen.add((one.rows, a["q"].stride()))
            assert ("out" in a) == (one.out is not None)
    assert len({strides for _, strides in seen}) == len(ROW_RECIPES) - 1  # off_by_one has those of packed
