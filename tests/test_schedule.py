"""The schedule kernel against a plain model of the cut, under Triton's interpreter.

Run as usual, this file starts itself once more with TRITON_INTERPRET=1, which Triton reads when it is
imported. Everything goes through ``get_scheduler_metadata``; the model lists the axis of cost cell by cell.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import INTERPRETED, assert_passes_interpreted, only_compiled, only_interpreted

from anystride import flash_attn_varlen_func, get_scheduler_metadata
from anystride.problem import bucket
from anystride.testing import find_case, find_layout, make_inputs

if INTERPRETED:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from anystride import launch
    from anystride.backends import triton as backend
    from anystride.kernels.schedule import OVERHEAD_STEPS, own_part

    @triton.jit  # type: ignore[untyped-decorator]
    def own_parts_kernel(  # type: ignore[no-untyped-def]
        cu_seqlens_q_ptr, seqused_k_ptr, metadata_ptr, found_ptr, batch, rows_per_unit, left, right,
        GROUP_SIZE: tl.constexpr, WINDOWED: tl.constexpr, SEQUENCES: tl.constexpr,
    ):  # fmt: skip
        part = tl.program_id(2)
        walk = (metadata_ptr, batch, 1, 0, 0, rows_per_unit, left, right, None)
        lengths = (cu_seqlens_q_ptr, 1, None, 0, seqused_k_ptr, 1, None, 0)
        found = own_part(part, tl.num_programs(2), walk, lengths, GROUP_SIZE, WINDOWED, SEQUENCES)
        for i in tl.static_range(9):
            tl.store(found_ptr + part * 9 + i, found[i])


KEYS_PER_STEP = 64
MOST_SEQUENCES = 8


@only_compiled
def test_schedule_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


class Unit(NamedTuple):
    """A run of rows of one sequence, and its place on the axis of cost."""

    seq: int
    unit: int
    steps: int


@dataclass(frozen=True)
class Step:
    """The shapes and lengths of one step of an engine."""

    lengths: tuple[int, ...]
    q_lens: tuple[int, ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    d: int = 64
    window: tuple[int, int] = (-1, -1)
    causal: bool = True
    max_seqlen_k: int = 1 << 17
    margin: int = 0

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    def metadata(self) -> torch.Tensor:
        starts = torch.tensor([0, *itertools.accumulate(self.q_lens)], dtype=torch.int32)
        return get_scheduler_metadata(
            len(self.lengths), max(1, *self.q_lens), self.max_seqlen_k, self.num_q_heads, self.num_kv_heads,
            self.d, torch.tensor(self.lengths, dtype=torch.int32), cu_seqlens_q=starts, causal=self.causal,
            window_size=self.window, sm_margin=self.margin,
        )  # fmt: skip


class Schedule:
    """What the metadata says, and what the model says of the same step."""

    def __init__(self, step: Step) -> None:
        words = step.metadata().view(-1, 16).tolist()
        self.step, self.header, self.parts = step, words[0], words[1:]
        self.rows_per_unit = self.header[1]
        self.units = [
            Unit(seq, unit, self.nominal_steps(tokens, length))
            for seq, (tokens, length) in enumerate(zip(step.q_lens, step.lengths, strict=True))
            for unit in range(max(1, -(-tokens * step.group_size // self.rows_per_unit)))
        ]

    def nominal_steps(self, tokens: int, length: int) -> int:
        """The steps that every unit of a sequence is charged with."""
        steps = -(-length // KEYS_PER_STEP)
        left, right = self.step.window[0], 0 if self.step.causal else self.step.window[1]
        if left >= 0 and right >= 0:
            apart = min(tokens - 1, (self.rows_per_unit - 1) // self.step.group_size + 1)
            steps = min(steps, (apart + left + right) // KEYS_PER_STEP + 2)
        return max(1, steps)

    def cells(self) -> list[tuple[int, int, int | None]]:
        """The axis of cost, cell by cell: (seq, unit, step), with None for a cell of overhead."""
        overhead = [None] * OVERHEAD_STEPS.value
        return [(u.seq, u.unit, step) for u in self.units for step in (*range(u.steps), *overhead)]

    def walk(self, part: list[int]) -> list[tuple[int, int, int]]:
        """The (seq, unit, step) that a part visits, from its begin to its end."""
        begin, end = tuple(part[:3]), tuple(part[3:6])
        return [
            (u.seq, u.unit, step)
            for u in self.units
            for step in range(u.steps)
            if begin <= (u.seq, u.unit, step) < end
        ]


def assert_parts_find_themselves(schedule: Schedule) -> None:
    """What programs find by themselves is what the schedule says."""
    step, num_parts, batch = schedule.step, len(schedule.parts), len(schedule.step.lengths)
    starts = torch.tensor([0, *itertools.accumulate(step.q_lens)], dtype=torch.int32)
    lengths = torch.tensor(step.lengths, dtype=torch.int32)
    rows, found = (
        torch.zeros(num_parts + 1, 16, dtype=torch.int32),
        torch.zeros(num_parts, 9, dtype=torch.int32),
    )
    right = 0 if step.causal else step.window[1]
    own_parts_kernel[(1, 1, num_parts)](
        starts, lengths, rows, found, batch, schedule.rows_per_unit, step.window[0], right,
        step.group_size, step.window[0] >= 0 and right >= 0, bucket(batch),
    )  # fmt: skip
    assert rows[1:].tolist() == schedule.parts
    assert rows[0].count_nonzero() == 0
    assert found.tolist() == [[*part[:6], *part[8:11]] for part in schedule.parts]


def check(step: Step) -> Schedule:
    """Compare every word of the metadata with the model."""
    schedule = Schedule(step)
    cells = schedule.cells()
    total, num_parts = len(cells), len(schedule.parts)
    used = max(1, min(total // 2, num_parts))
    costs = Counter(cell[0] for cell in cells)
    whole = used // len(costs) * len(costs)
    if len(set(costs.values())) == 1 and whole * 16 >= used * 15:
        used = whole  # equal sequences are not cut, or alike, if that leaves few parts idle
    assert schedule.header == [0x5CED, schedule.rows_per_unit, len(step.lengths), used, num_parts, *[0] * 11]

    shares = [cells[p * total // used : (p + 1) * total // used] for p in range(used)]
    expected = [[cell for cell in share if cell[2] is not None] for share in shares]
    expected += [[] for _ in range(num_parts - used)]
    visited = [schedule.walk(part) for part in schedule.parts]
    assert visited == expected
    everything = [(u.seq, u.unit, s) for u in schedule.units for s in range(u.steps)]
    assert list(itertools.chain(*visited)) == everything  # each exactly once, in order

    holders: dict[tuple[int, int], list[int]] = {}
    for p, visits in enumerate(visited):
        for unit in dict.fromkeys(visit[:2] for visit in visits):
            holders.setdefault(unit, []).append(p)
    for p, part in enumerate(schedule.parts[:used]):
        end_unit = (part[3], part[4])
        sharers = holders.get(end_unit, []) if part[5] > 0 else []
        assert part[6] == (len(sharers) if sharers[:1] == [p] else 0)
        assert part[7] == (part[:2] == part[3:5])
        last = len(step.lengths) - 1
        seq = min(part[0], last)  # a part may have nothing but overhead, behind everything
        assert part[8:11] == [sum(step.q_lens[:seq]), step.q_lens[seq], step.lengths[seq]]
        if visited[p]:
            begin_unit = visited[p][0][:2]
            first = holders[begin_unit][0]
            is_second = tuple(schedule.parts[first][:2]) != begin_unit
            assert part[11:13] == [2 * first + is_second, len(holders[begin_unit])]
        else:
            assert part[12] <= 1  # nothing to combine
        assert part[13] == 0  # nobody has arrived
        seq = min(part[3], last)
        assert part[14:16] == [sum(step.q_lens[:seq]), step.q_lens[seq]]
    if len(step.lengths) <= MOST_SEQUENCES and len(schedule.units) == len(step.lengths):
        assert_parts_find_themselves(schedule)
    for parts in holders.values():
        assert parts == list(range(parts[0], parts[-1] + 1))  # the combine kernel counts on neighbours
        if len(parts) > 1:
            assert schedule.parts[parts[0]][6] == len(parts)  # nobody's partial results are forgotten
    return schedule


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that the device has so many processors."""

    def pretend(count: int) -> None:
        target = launch.Target("cuda", 90, count, 232448)
        for module in (launch, backend):
            monkeypatch.setattr(module, "device_target", lambda device: target)

    return pretend


STEPS = {
    "one": Step((1,), (1,)),
    "one-long": Step((5000,), (1,)),
    "equal": Step((640,) * 6, (1,) * 6),
    "varied": Step((1, 63, 64, 65, 128, 1000, 7), (1,) * 7),
    "zero-lengths": Step((0, 130, 0, 0, 700, 0), (1,) * 6),
    "all-zero": Step((0,) * 5, (1,) * 5),
    "rows-of-no-token": Step((100, 200, 0, 300), (1, 0, 0, 2)),
    "padded-rows": Step((100, 0, 0), (1, 0, 0)),
    "speculative": Step((300, 90, 400), (4, 4, 4)),
    "prefill": Step((900, 300, 70), (500, 1, 70)),
    "mla": Step((900, 5, 130), (1, 1, 1), 128, 1, 512),
    "window": Step((5000, 100, 900), (1, 1, 3), window=(200, 0)),
    "window-both": Step((5000, 100, 900), (3, 40, 3), window=(100, 90), causal=False),
    "window-left": Step((500, 100), (1, 1), window=(100, -1), causal=False),
    "margin": Step((640,) * 6, (1,) * 6, margin=3),
}


@only_interpreted
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("count", [1, 7])
def test_parts_cover_every_step_once(name: str, count: int, processors: Callable[[int], None]) -> None:
    processors(count)
    check(STEPS[name])


@only_interpreted
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the pretence is meant to last
)
@given(data=st.data())
def test_parts_cover_every_step_of_random_batches(
    data: st.DataObject, processors: Callable[[int], None]
) -> None:
    processors(data.draw(st.integers(1, 9), label="processors"))
    batch = data.draw(st.integers(1, 12), label="batch")
    lengths = data.draw(st.tuples(*[st.integers(0, 1500)] * batch), label="lengths")
    q_lens = data.draw(st.tuples(*[st.integers(0, 40)] * batch), label="q_lens")
    heads = data.draw(st.sampled_from([(8, 2), (7, 1), (48, 1), (4, 4)]), label="heads")
    window = data.draw(st.sampled_from([(-1, -1), (70, 0), (0, 300)]), label="window")
    causal = window[1] <= 0
    check(Step(lengths, q_lens, *heads, window=window, causal=causal))


@only_interpreted
def test_a_batch_larger_than_a_tile(processors: Callable[[int], None]) -> None:
    processors(2)
    check(Step(tuple(11 * n % 300 for n in range(1100)), (1,) * 1100, d=16))


@only_interpreted
def test_one_long_sequence_spreads_over_all_parts(processors: Callable[[int], None]) -> None:
    processors(132)
    lengths = (1024,) * 20 + (128 * 1024,) + (1024,) * 43
    schedule = check(Step(lengths, (1,) * 64, 16, 1, 512))
    loads = [len(schedule.walk(part)) for part in schedule.parts]
    assert len(loads) >= 132
    assert min(loads) > 0
    assert max(loads) == -(-len(schedule.cells()) // len(loads))
    # Parts of short sequences do fewer steps: they are charged with beginning and finishing each.
    assert max(loads) / (sum(loads) / len(loads)) < 1.25


@only_interpreted
@pytest.mark.parametrize("name", ["window", "window-both"])
def test_steps_charged_in_a_window_are_enough(name: str, processors: Callable[[int], None]) -> None:
    processors(3)
    step = STEPS[name]
    schedule = Schedule(step)
    left, right = step.window[0], 0 if step.causal else step.window[1]
    for unit in schedule.units:
        tokens, length = step.q_lens[unit.seq], step.lengths[unit.seq]
        rows = range(unit.unit * schedule.rows_per_unit, (unit.unit + 1) * schedule.rows_per_unit)
        centres = {length - tokens + row // step.group_size for row in rows if row < tokens * step.group_size}
        seen = {key // KEYS_PER_STEP for c in centres for key in range(max(0, c - left), c + right + 1)}
        seen = {key_step for key_step in seen if key_step * KEYS_PER_STEP < length}
        assert max(seen) - min(seen) + 1 <= unit.steps


@only_interpreted
def test_the_length_of_the_schedule_depends_on_shapes_only(processors: Callable[[int], None]) -> None:
    processors(7)
    sizes = {
        Step(lengths, (1,) * 4, max_seqlen_k=longest).metadata().shape
        for lengths in ((0, 0, 0, 0), (1, 1, 1, 1), (1900, 2, 0, 7), (1500,) * 4)
        for longest in (1900, 2048)
    }
    assert len(sizes) == 1


@only_interpreted
def test_a_margin_leaves_processors_free(processors: Callable[[int], None]) -> None:
    processors(8)
    step = STEPS["one-long"]
    whole, half = (len(Schedule(s).parts) for s in (step, Step(step.lengths, step.q_lens, margin=4)))
    assert half * 2 == whole


@only_interpreted
@pytest.mark.parametrize("num_splits", [0, 3])
def test_every_grid_depends_on_shapes_only(num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(find_case("tiny-gqa"), seqused_k=(0, 70, 200))
    inputs = make_inputs(case, find_layout("G2"))
    run, grids = InterpretedFunction.run, []

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        grids.append((self.fn.__name__, grid))
        run(self, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    runs = []
    for shorter in (0, 20, 200):  # no longer than before: the table has no more blocks
        lengths = [max(0, length - shorter) for length in inputs.lengths]
        grids.clear()
        used = torch.tensor(lengths, dtype=torch.int32)
        changed = {"seqused_k": used, "num_splits": num_splits, "backend": "triton"}
        flash_attn_varlen_func(**(inputs.kwargs | changed))
        runs.append(list(grids))
    assert len(runs[0]) >= 2
    assert runs[0] == runs[1] == runs[2]
