"""The benchmark at sizes that a CPU can do: formulas, gate, clock, what is kept, and what is shown."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")

from typer.testing import CliRunner

from anystride import flash_attn_varlen_func, peers
from anystride.bench import __main__ as bare
from anystride.bench import measure, run, store
from anystride.bench.clock import Clock, Spread
from anystride.bench.cost import bytes_of_key, bytes_to_move, operations
from anystride.bench.gate import Gate, gate_for
from anystride.bench.lines import COPY, PLAIN_COPY, PURE_READ, Line, append, compare, load
from anystride.bench.measure import Bench
from anystride.bench.ratios import geometric_mean, overheads, speed_ups
from anystride.bench.suites import SUITES, Row, packed_layouts, rows_of
from anystride.cli import app
from anystride.cli.bench_plots import draw_plots
from anystride.peers import Absent, Peer, Refused
from anystride.testing import Case, Storage, compatible, find_case, find_layout, make_inputs
from anystride.testing.inputs import cache_shape
from anystride.testing.judgement import plain

CPU = torch.device("cpu")
E4M3 = "float8_e4m3fn"

PLAIN = Case("plain", "", (300,) * 3, (1,) * 3, 8, 2, 64, 64)
MLA = Case("mla", "", (300,) * 3, (1,) * 3, 8, 1, 576, 512, "row", 64)
SPLIT = replace(MLA, name="q_v", form="q_v", d_qk=64)
MIXED = replace(SPLIT, name="mixed", kv_dtype=E4M3, rope_as_q=True, scale_caches="groups")

# ---------------------------------------------------------------------------------------------------
# What a case costs: numbers worked out by hand.
# ---------------------------------------------------------------------------------------------------


def stored(case: Case, layout: str = "") -> Storage:
    """A cache of the case, in buffers of their own if no layout is named, or in MLA's row."""
    name = layout or {"kv": "G16", "row": "M1", "q_v": "M9"}[case.form]
    return find_layout(name).build(cache_shape(case))


@pytest.mark.parametrize(
    ("case", "a_key"),
    [
        (PLAIN, 2 * 2 * 64 * 2),
        (replace(PLAIN, kv_dtype=E4M3), 2 * 2 * 64),
        (replace(PLAIN, kv_dtype=E4M3, scale_caches="rows"), 2 * 2 * 64 + 2 * 2 * 4),
        (MLA, 1152),
        (SPLIT, 1152),
        (replace(MLA, kv_dtype=E4M3), 576),
        (MIXED, 656),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_the_bytes_of_a_key(case: Case, a_key: int) -> None:
    there = stored(case)
    assert bytes_of_key(case, there) == a_key
    per_query = case.d_qk + case.d_v * (2 if case.form == "q_v" else 1)
    assert bytes_to_move(case, there) == 900 * a_key + 3 * 8 * per_query * 2


def test_bytes_that_are_shared_count_once_wherever_they_lie() -> None:
    assert bytes_of_key(PLAIN, stored(PLAIN, "A-expanded-heads")) == 2 * 64 * 2
    row = 576 * 2
    assert bytes_of_key(MLA, stored(MLA, "M2")) == row
    assert bytes_of_key(MLA, stored(MLA, "A-gap")) == row + 512 * 2
    assert bytes_of_key(MLA, stored(MLA, "A-overlap")) == row + 256 * 2
    assert bytes_of_key(MLA, stored(MLA, "A-same-pointer")) == row + (512 - 288) * 2


def test_a_window_counts_the_keys_in_it() -> None:
    window = replace(PLAIN, window=(127, 0))
    assert (
        bytes_to_move(PLAIN, stored(PLAIN)) - bytes_to_move(window, stored(window)) == 3 * (300 - 128) * 512
    )
    assert operations(window) * 300 == operations(PLAIN) * 128


@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, q_lens=(5, 1, 3)),
        replace(PLAIN, q_lens=(5, 1, 3), window=(20, 0)),
        replace(PLAIN, q_lens=(5, 1, 3), causal=False, window=(3, 2)),
        replace(PLAIN, seqused_k=(2, 0, 9), q_lens=(5, 1, 3)),
        replace(SPLIT, q_lens=(2, 2, 2)),
    ],
)
def test_pairs_and_rows_are_those_that_are_not_masked(case: Case) -> None:
    pairs = keys = 0
    for length, n in zip(case.seqused_k, case.q_lens, strict=True):
        seen = set()
        for query, key in itertools.product(range(n), range(length)):
            distance = key - (length - n + query)
            left, right = case.window[0], 0 if case.causal else case.window[1]
            if (right < 0 or distance <= right) and (left < 0 or distance >= -left):
                pairs += 1
                seen.add(key)
        keys += len(seen)
    both = case.d_qk + case.d_v * (2 if case.form == "q_v" else 1)
    assert operations(case) == 2 * pairs * 8 * both
    there = stored(case)
    queries = sum(case.q_lens) * 8 * both * 2
    assert bytes_to_move(case, there) == keys * bytes_of_key(case, there) + queries


# ---------------------------------------------------------------------------------------------------
# Right before fast.
# ---------------------------------------------------------------------------------------------------

GATED = [
    (PLAIN, "G2"),
    (replace(PLAIN, name="uneven", seqused_k=(1, 77, 300), q_lens=(1, 4, 2)), "G3"),
    (replace(PLAIN, name="sinks", sinks=True, window=(20, 0), q_lens=(3, 3, 3)), "G14"),
    (replace(PLAIN, name="softcap", softcap=2.0, causal=False, window=(9, 5)), "G7b"),
    (replace(PLAIN, name="e4m3", kv_dtype=E4M3, descales="scalar"), "G16"),
    (replace(PLAIN, name="heads", kv_dtype=E4M3, descales="per_head"), "G2"),
    (replace(PLAIN, name="rows", kv_dtype=E4M3, scale_caches="rows"), "G2"),
    (MLA, "M2"),
    (replace(SPLIT, q_lens=(2, 2, 2)), "M7"),
    (MIXED, "M9"),
]


@pytest.mark.parametrize(("case", "layout"), GATED, ids=lambda x: getattr(x, "name", x))
def test_the_gate_knows_right_from_wrong(case: Case, layout: str) -> None:
    case = replace(case, lse=False, tags=frozenset({"bench"}))
    inputs = make_inputs(case, find_layout(layout), guard=False)
    gate = gate_for(inputs)
    out = flash_attn_varlen_func(**inputs.kwargs, backend="cpu")
    assert isinstance(out, Tensor)
    assert isinstance(getattr(gate, "__self__", None), Gate)
    assert gate(out) == ""
    assert gate(plain(inputs)[0]) == ""
    assert gate(out.roll(1, 1)).startswith("WRONG: sequence")
    assert gate(out * 1.1).startswith("WRONG")
    poisoned = out + 0
    poisoned[-1, 0, 0] = float("nan")
    assert gate(poisoned).startswith(f"WRONG: sequence {case.batch - 1}")


def test_small_cases_are_held_to_the_law() -> None:
    inputs = make_inputs(replace(find_case("tiny-gqa"), lse=False), find_layout("G2"), guard=False)
    gate = gate_for(inputs)
    out = flash_attn_varlen_func(**inputs.kwargs, backend="cpu")
    assert isinstance(out, Tensor)
    assert gate(out) == ""
    out[1, 2, 3] += 1
    assert gate(out).startswith("WRONG: out[1, 2, 3]")


# ---------------------------------------------------------------------------------------------------
# The clock.
# ---------------------------------------------------------------------------------------------------


def test_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0, 5)


def test_the_first_round_is_lost_and_kernels_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(CPU, rounds=2), []

    def turn(call: Callable[[], str]) -> list[float]:
        order.append(call())
        return [100.0] if len(order) <= 2 else [float(len(order))]

    monkeypatch.setattr(clock, "turn", turn)
    spreads = clock.turns({"a": lambda: "a", "b": lambda: "b"})
    assert order == ["a", "b"] * 3
    assert spreads["a"] == Spread.of([3.0, 5.0])
    assert spreads["b"] == Spread.of([4.0, 6.0])


def test_a_turn_on_a_cpu_times_each_call() -> None:
    calls: list[int] = []
    samples = Clock(CPU).turn(lambda: calls.append(1))
    assert len(calls) == len(samples) + 1
    assert 5 <= len(samples) <= 200
    assert min(samples) > 0


# ---------------------------------------------------------------------------------------------------
# Suites.
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_suites_have_rows_of_their_own_names(suite: str) -> None:
    rows = rows_of(suite)
    assert len({row.name for row in rows}) == len(rows) > 7
    for row in rows:
        if isinstance(row, Row):
            assert row.suite == suite
            assert find_case(row.case.name) == row.case
            assert compatible(row.case, row.layout) is None


def test_no_other_suite_is_known() -> None:
    with pytest.raises(KeyError, match="no suite 'mal'; there are mla"):
        rows_of("mal")


def test_layouts_begin_with_the_packed_one_and_have_every_other() -> None:
    rows = [row for row in rows_of("layouts") if isinstance(row, Row)]
    for case in dict.fromkeys(row.case for row in rows if "suite-layouts" in row.case.tags):
        of_case = [row for row in rows if row.case == case]
        assert [row.is_packed for row in of_case] == [True] + [False] * (len(of_case) - 1)
        assert len(of_case) > 10
    assert all(row.is_packed for row in rows if "suite-blocks" in row.case.tags)


# ---------------------------------------------------------------------------------------------------
# Everything at once, with peers that are wrong, refuse, or are not there.
# ---------------------------------------------------------------------------------------------------


def _absent(_folder: Path | None) -> str:
    raise Absent("nowhere to be had")


def _refuse(_kwargs: dict[str, Any]) -> Any:
    raise Refused("heads of another colour\nand a line that nobody asked for")


def _wrong(kwargs: dict[str, Any]) -> Any:
    out = torch.zeros(*kwargs["q"].shape[:2], kwargs["v"].shape[-1], dtype=kwargs["q"].dtype)
    return lambda: (out, None)


def _no_memory(_kwargs: dict[str, Any]) -> Any:
    raise torch.OutOfMemoryError("1 GB was asked for")


def _fatal(_kwargs: dict[str, Any]) -> Any:
    raise AssertionError("rows off 16 bytes were given to a peer that loses the device on them")


# On a CPU the gathered one is all that is called: so all go by its name.
PEERS = [
    Peer("gathered-sdpa", "missing", "", _absent, _wrong),
    Peer("gathered-sdpa", "refusing", "", lambda _: "1.0", _refuse),
    Peer("gathered-sdpa", "lying", "", lambda _: "2.0", _wrong),
    Peer("gathered-sdpa", "greedy", "", lambda _: "3.0", _no_memory),
]


@pytest.fixture(scope="module")
def bench() -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PEERS", PEERS)
        return Bench(CPU, ("cpu", "reference"), rounds=1, of_commit="abc1234")


@pytest.mark.parametrize(("layout", "off"), [("A-odd-page", True), ("A-off-by-one", True), ("G20", False)])
def test_a_peer_is_spared_the_rows_on_which_it_loses_the_device(layout: str, off: bool) -> None:
    inputs = make_inputs(find_case("tiny-gqa"), find_layout(layout), CPU)
    fragile = Peer("fragile", "Fragile", "", lambda _: "1.0", _fatal, crashes_off_16_bytes=True)
    with pytest.raises(Refused if off else AssertionError, match="rows off 16 bytes"):
        measure._of_peer(inputs, fragile)


def test_who_is_wrong_or_refuses_has_a_note_and_no_time(bench: Bench) -> None:
    assert bench.absent == {"gathered-sdpa": "nowhere to be had"}
    assert bench.facts.commit == "abc1234"
    assert bench.facts.read > 1e8
    assert bench.facts.product > 1e8
    assert not bench.facts.cold
    case = find_case("tiny-gqa")
    lines = {line.kernel: line for line in bench.measure(Row("cpu", case, find_layout("G2")))}
    assert list(lines) == ["anystride cpu", "anystride reference", "refusing", "lying", "greedy"]
    assert lines["refusing"].note == "refused: heads of another colour"
    assert lines["lying"].note.startswith("WRONG: out[")
    assert lines["greedy"].note == "out of memory: 1 GB was asked for"
    for name, line in lines.items():
        is_ours = name.startswith("anystride")
        assert line.is_ours == is_ours
        assert (line.median_us is not None) == is_ours
        assert (line.samples > 0) == is_ours
        assert (line.note == "") == is_ours
        assert (line.suite, line.case, line.layout) == ("cpu", "tiny-gqa", "G2-vllm-nhd")
        assert line.bytes == bytes_to_move(case, stored(case))
        assert line.flop == operations(case)
        assert line.host_us is None
        if line.median_us is not None:
            assert line.q1_us is not None
            assert line.q3_us is not None
            assert 0 < line.q1_us <= line.median_us <= line.q3_us
            assert line.bytes_a_second == line.bytes / (1e-6 * line.median_us)
            assert line.of_read == line.bytes_a_second / line.read


def test_the_copy_that_a_layout_would_need_is_a_row(bench: Bench) -> None:
    case = replace(PLAIN, lse=False)
    for layout, has_copy in (("G16", False), ("G4", True)):
        lines = {line.kernel: line for line in bench.measure(Row("layouts", case, find_layout(layout)))}
        assert (COPY in lines) == has_copy
        if has_copy:
            blocks = 3 * 19  # of 16 tokens, for 300 keys
            assert lines[COPY].bytes == 2 * blocks * 16 * 512
            assert lines[COPY].flop == 0
            assert lines[COPY].is_yardstick
            assert lines[COPY].median_us is not None
    row = replace(MLA, lse=False)
    lines = {line.kernel: line for line in bench.measure(Row("layouts", row, find_layout("M2")))}
    assert lines[COPY].bytes == 2 * 3 * 5 * 64 * 1152  # the row once: V lies in it


def test_a_store_is_timed_beside_a_copy(bench: Bench) -> None:
    row = store.Row("bf16, 24", 24, blocks=8)
    lines = {line.kernel: line for line in bench.measure(row)}
    assert lines["anystride cpu"].median_us is not None
    assert lines[PLAIN_COPY].bytes == lines["anystride cpu"].bytes == 24 * 2 * 8 * 128 * 2 * 2
    assert lines[store.VLLM].note.startswith("refused")  # no folder of peers
    assert (lines["anystride cpu"].suite, lines["anystride cpu"].case) == ("store", "bf16, 24")


# ---------------------------------------------------------------------------------------------------
# Stores.
# ---------------------------------------------------------------------------------------------------

STORES = [
    *(store.Row(kind, 24, blocks=8, **fields) for kind, fields in store.KINDS.items()),
    *(replace(row, tokens=24, blocks=8) for row in store.LAYOUTS),
    *(replace(row, tokens=5 * store.BLOCK, blocks=8) for row in store.BLOCKS),
]


@pytest.mark.parametrize("row", STORES, ids=lambda row: row.name)
def test_a_store_is_built_and_its_check_knows_right_from_wrong(row: store.Row) -> None:
    case = store.build(row, CPU, "cpu")
    call = case.makers["anystride cpu"]()
    assert store.fault_of(case, call) == ""
    assert "numbers off" in store.fault_of(case, lambda: None)
    view, _wanted = case.places[-1]
    taken = set(zip(*(index.tolist() for index in case.where), strict=True))
    places = itertools.product(*map(range, view.shape[: len(case.where)]))
    free = next((place for place in places if place not in taken), None)
    if free is not None:

        def also_beside() -> None:
            call()
            store.bits(view)[free] ^= 1

        assert "beside" in store.fault_of(case, also_beside)
    assert store.fault_of(case, call) == ""
    store.plain_copy(case)()


def test_a_store_counts_what_it_reads_and_what_it_writes() -> None:
    kinds = (
        "bf16",
        "e4m3, scale a number",
        "e4m3, scales written",
        "MLA, bf16",
        "MLA, e4m3",
        "MLA, 656 bytes",
    )
    moved = [
        store.bytes_to_move(store.build(store.Row(kind, 3, blocks=4, **store.KINDS[kind]), CPU, "cpu"))
        for kind in kinds
    ]
    gqa, mla = 2 * 8 * 128, 576
    a_token = [gqa * 4, gqa * 3, gqa * 3 + 2 * 8 * 4, mla * 4, mla * 3, mla * 2 + 656]
    assert moved == [3 * n for n in a_token]


def test_fp8_numbers_are_counted() -> None:
    numbers = torch.tensor([-448.0, -1.0, -0.0, 0.0, 0.001953125, 1.0, 448.0]).to(torch.float8_e4m3fn)
    assert store.steps(numbers, numbers) == 0
    assert store.steps(numbers[2:4], numbers[3:5]) == 1
    assert store.steps(numbers[:1], numbers[-1:]) == 2 * 0x7E


# ---------------------------------------------------------------------------------------------------
# What is kept, and how two runs compare.
# ---------------------------------------------------------------------------------------------------


def line(
    kernel: str = "anystride hopper", us: float | None = 100.0, spread: float = 1.0, **more: Any
) -> Line:
    """A line with quartiles at ``spread`` on both sides of the median."""
    facts: dict[str, Any] = {
        "suite": "mla", "case": "one", "layout": "M1-combined", "version": "1", "samples": 50,
        "host_us": 12.5, "bytes": 10**9, "flop": 10**11, "note": "", "read": 3e12, "product": 7e14,
        "cold": True, "device": "A GPU", "torch": "2", "triton": "3", "anystride": "0", "commit": "abc",
        "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    q1, q3 = (None, None) if us is None else (us - spread, us + spread)
    return Line(**(facts | {"kernel": kernel, "median_us": us, "q1_us": q1, "q3_us": q3} | more))


def test_lines_come_back_as_they_were_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mla.jsonl"
    append(path, [line(), line("FA3", None, note="refused: no")])
    append(path, [line(us=90.0), line("FA3", case="two")])
    assert len(path.read_text().splitlines()) == 4
    assert load(path) == [line(us=90.0), line("FA3", None, note="refused: no"), line("FA3", case="two")]
    assert json.loads(path.read_text().splitlines()[0]) == asdict(line())


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (line(us=100), line(us=110), "slower"),
        (line(us=100), line(us=90), "faster"),
        (line(us=100), line(us=101.5), ""),  # quartiles overlap
        (line(us=100, spread=1), line(us=110, spread=20), ""),
        (line(us=100, spread=20), line(us=110, spread=1), ""),
        (line(us=100), line(us=100), ""),
        # Quartiles are apart, but one of the medians lies far from one of its own.
        (line(us=100, q1_us=80.0, q3_us=101.0), line(us=110, q1_us=105.0, q3_us=111.0), ""),
        (line(us=100), line(us=None, note="WRONG"), "no longer timed"),
    ],
)
def test_slower_is_what_is_slower_beyond_the_spread(old: Line, new: Line, verdict: str) -> None:
    (change,) = compare([old], [new])
    assert change.verdict == verdict


def test_only_what_both_runs_have_is_compared() -> None:
    assert compare([line()], [line("FA3")]) == []
    assert compare([line(us=None)], [line()]) == []
    for other in (line(device="another"), line(cold=False)):
        with pytest.raises(ValueError, match="no comparison: these are times of"):
            compare([line()], [other])


def test_ours_is_held_against_the_best_peer() -> None:
    lines = [
        line("anystride triton", 60.0),
        line("anystride hopper", 50.0),
        line("FA3", 80.0),
        line("FlashMLA", 75.0),
        line("FlashInfer", None, note="refused: no"),
        line(PURE_READ, 10.0),
        line("anystride hopper", 50.0, case="alone"),
    ]
    (one,) = speed_ups(lines)
    assert (one.ours.kernel, one.peer.kernel, one.ratio) == ("anystride hopper", "FlashMLA", 1.5)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def of_layouts() -> list[Line]:
    packed: dict[str, Any] = {"suite": "layouts", "layout": "M1-combined"}
    other: dict[str, Any] = {"suite": "layouts", "layout": "M2-cross-layer"}
    return [
        line("anystride hopper", 50.0, **packed),
        line("FlashMLA", 60.0, **packed),
        line("FA3", None, note="refused: no", **packed),
        line("anystride hopper", 51.0, **other),
        line("FlashMLA", None, note="refused: no such stride", **other),
        line("FA3", 70.0, **other),
        line(COPY, 120.0, **other),
        line(PURE_READ, 10.0, **other),
    ]


def test_a_layout_costs_its_time_or_the_copy() -> None:
    assert "M1-combined" in packed_layouts()
    found = {(one.line.layout, one.line.kernel): one for one in overheads(of_layouts(), packed_layouts())}
    assert found["M2-cross-layer", "anystride hopper"].ratio == 51 / 50
    assert found["M2-cross-layer", "FlashMLA"].ratio == 180 / 60
    assert found["M2-cross-layer", "FlashMLA"].is_copied
    assert {kernel for _, kernel in found} == {"anystride hopper", "FlashMLA"}
    wrong = [replace(one, note="WRONG") if one.note else one for one in of_layouts()]
    found = {(one.line.layout, one.line.kernel): one for one in overheads(wrong, packed_layouts())}
    assert found["M2-cross-layer", "FlashMLA"].ratio != found["M2-cross-layer", "FlashMLA"].ratio


# ---------------------------------------------------------------------------------------------------
# Both command lines.
# ---------------------------------------------------------------------------------------------------


def ask(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"}).invoke(app, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_plots_are_drawn_as_png_and_as_svg(tmp_path: Path) -> None:
    rows = [line("FA3", 80.0), line(), line(PURE_READ, 40.0)]
    files = draw_plots([*rows, *of_layouts()], tmp_path / "plots")
    names = {
        "roofline-mla", "speed-up-mla", "roofline-layouts", "speed-up-layouts", "overhead-one",
    }  # fmt: skip
    assert {path.stem for path in files} == names
    assert {path.suffix for path in files} == {".png", ".svg"}
    assert len(files) == 2 * len(names)
    for path in files:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert len(content) > 5000
    before = {path: path.read_bytes() for path in files if path.suffix == ".svg"}
    draw_plots([*rows, *of_layouts()], tmp_path / "plots")
    assert before == {path: path.read_bytes() for path in before}


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert draw_plots([line(us=None, note="refused: no")], tmp_path) == []


def test_the_command_times_stores_shows_and_draws(tmp_path: Path) -> None:
    results, plots = tmp_path / "results", tmp_path / "plots"
    code, text = ask(
        "--suite", "cpu", "--only", "tiny-gqa", "--rounds", 1, "--results", results, "--plots", plots,
        "--commit", "abc1234",
    )  # fmt: skip
    assert code == 0, text
    assert "anystride cpu" in text
    assert "gather and SDPA" in text
    assert "commit abc1234" in text
    (path,) = results.iterdir()
    assert path.name.startswith("cpu-")
    assert path.name.endswith(".jsonl")
    lines = load(path)
    assert [one.kernel for one in lines] == ["anystride cpu", "gather and SDPA"]
    assert all(one.median_us for one in lines)
    assert {path.name for path in plots.iterdir()} >= {"roofline-cpu.png", "speed-up-cpu.svg"}
    code, text = ask("--from", path)
    assert code == 0, text
    assert f"{lines[0].median_us:.1f}" in text


def test_stored_lines_are_shown_with_refusals_faults_and_overheads(tmp_path: Path) -> None:
    path = tmp_path / "mla.jsonl"
    append(path, [line(), line("FA3", None, note="WRONG: sequence 3"), line("FlashMLA", 90.0), *of_layouts()])
    code, text = ask("--from", path)
    assert code == 0, text
    assert "WRONG: sequence 3" in text
    assert "refused: no such stride" in " ".join(text.split())
    assert "geometric mean of 1 rows: 0.90" in text
    assert "slower than FlashMLA: one M1-combined: 0.90" in text
    assert "3.00 copied" in text
    assert "1.02" in text
    append(path, [line(us=None, note="WRONG: sequence 0")])
    assert ask("--from", path)[0] == 1


def test_a_comparison_leaves_with_1_if_ours_is_slower(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    append(old, [line(), line("FA3"), line(case="two")])
    append(new, [line(us=101.0), line("FA3", 150.0), line(us=50.0, case="two")])
    code, text = ask("--compare", old, new)
    assert code == 0, text
    assert "3 measurements: 1 slower, 1 faster, 1 within the spread" in text
    append(new, [line(us=150.0)])
    code, text = ask("--compare", old, new)
    assert code == 1, text
    assert "1.50" in text
    append(new, [line(us=None, note="WRONG: all of it")])
    assert ask("--compare", old, new)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give --suite, --from or --compare"),
        (("--suite", "mal"), "there is no suite 'mal'; near: "),
        (("--suite", "cpu", "--only", "nothing"), "no row has 'nothing'"),
        (("--suite", "cpu", "--suite", "mla"), "in a run of its own"),
        (("--suite", "cpu", "--device", "cuda"), "timed on cpu, not on cuda"),
        (("--suite", "cpu", "--backend", "fast"), "there is no back end 'fast'"),
        (("--suite", "cpu", "--without", "FA3"), "there is no peer 'FA3'"),
        (("--from", "nowhere.jsonl"), "no lines are stored there"),
    ],
)
def test_what_cannot_be_asked_is_said(arguments: tuple[str, ...], told: str) -> None:
    code, text = ask(*arguments)
    assert code == 2
    assert told in " ".join(text.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_suites_say_so() -> None:
    with pytest.raises(ValueError, match="timed on a GPU, and there is none"):
        run.device_for(["mla", "gqa"])


def test_a_bare_machine_times_without_the_extra_packages(tmp_path: Path) -> None:
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rich", "typer", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from anystride.bench.__main__ import main
sys.exit(main(["--suite", "cpu", "--only", "tiny-gqa", "--rounds", "1", "--results", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "anystride cpu" in done.stdout
    (path,) = tmp_path.iterdir()
    assert len(load(path)) == 2


def test_a_bare_machine_says_what_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bare.main(["--suite", "cpu", "mla"])
    assert left.value.code == 2
    assert "in a run of its own" in capsys.readouterr().err


def test_a_run_ends_as_its_lines_say() -> None:
    wrong = line(us=None, note="WRONG: all of it")
    assert run.exit_code([line()]) == 0
    assert run.exit_code([line(), wrong]) == 1
    assert run.exit_code([line(), replace(wrong, kernel="FA3")]) == 0
    assert run.exit_code([line(us=None, note="refused: no")]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("hot", [False, True])
def test_one_row_is_timed_on_a_gpu(hot: bool) -> None:
    bench = Bench(
        torch.device("cuda"), ("triton",), without=[peer.name for peer in peers.PEERS], hot=hot, rounds=1
    )
    assert bench.facts.cold is not hot
    (row,) = run.rows_asked_for("mla", "bench-mla-b1-h16-kv8k ")
    lines = {one.kernel: one for one in bench.measure(row)}
    assert set(lines) == {"anystride triton", PURE_READ}
    for one in lines.values():
        assert one.median_us is not None
        assert 1 < one.median_us < 1e4
    assert lines["anystride triton"].host_us is not None
