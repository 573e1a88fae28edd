"""The kit against kernels with one fault each: it must catch every one, name it, and blame nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutants
import pytest
import torch
from mutants import FAULTS, mutant

from anystride.testing import LAYOUTS, compatible, find_case, find_layout
from anystride.testing.child import Child
from anystride.testing.conformance import CASES_CHECKED, check, trials
from anystride.testing.probes import PROBES
from anystride.testing.report import Report, Verdict, load_reports, save_reports
from anystride.testing.trial import LeftOut, Trial, Trials

CPU = torch.device("cpu")
COLUMNS = [probe.name for probe in PROBES]
STRIDED = {"page stride", "token stride", "head stride", "last-dim stride", "K and V strides unlike"}
STRIDED |= {"padded pages", "alignment", "5-D pages", "NaN in gaps"}

# The columns that are not ok, by their verdicts. Where a fault shows in more than the column of its name, the
# others ask for the same thing on the way: a block stride that is computed is wrong beyond 2^31 as well. What
# is refused was not probed, because the same call without NaN is wrong already.
NAMED: dict[str, dict[str, set[str]]] = {
    "packed page": {
        "WRONG": {"page stride", "64-bit offsets", "padded pages", "alignment", "5-D pages"},
        "refused": {"NaN in gaps"},
    },
    "page from token": {
        "WRONG": {"page stride", "token stride", "K and V strides unlike", "64-bit offsets", "padded pages",
                  "alignment", "5-D pages"},
        "refused": {"NaN in gaps"},
    },
    "packed token": {
        "WRONG": {"token stride", "K and V strides unlike", "64-bit offsets", "alignment"},
        "refused": {"NaN in gaps"},
    },
    "packed head": {
        "WRONG": {"head stride", "last-dim stride", "K and V strides unlike", "64-bit offsets", "alignment"},
        "refused": {"NaN in gaps"},
    },
    "packed row": {"WRONG": {"last-dim stride"}},
    "32 bits": {"WRONG": {"64-bit offsets"}},
    "V as K": {"WRONG": {"K and V strides unlike"}},
    "tail scores": {
        "WRONG": {"uneven lengths"},
        "refused": {"garbage ids past the end", "NaN tails", "NaN null block"},
    },
    "tail values": {"WRONG": {"NaN tails"}},
    "null block": {"WRONG": {"NaN null block"}},
    "checks all ids": {"refused": {"garbage ids past the end"}},
    "table from shape": {"WRONG": {"sliced block table", "strided block table"}},
    "table columns": {"WRONG": {"strided block table"}},
    "power of two": {"WRONG": {"odd blocks"}},
    "empty unwritten": {"WRONG": {"empty sequences", "stale output", "lse convention"}},
    "empty divides": {"WRONG": {"empty sequences", "several query tokens", "stale output"}},
    "wide rows": {"WRONG": {"NaN tails", "NaN null block", "NaN in gaps"}},
    "base 2": {"WRONG": {"lse convention"}},
    "lse +inf": {"WRONG": {"lse convention"}},
    "lse transposed": {"WRONG": {"lse convention"}},
    "causal top": {"WRONG": {"several query tokens"}},
    "one block stride": {"WRONG": {"5-D pages"}},
    "contiguous": {"copied": STRIDED},
    "gathers": {"copied": set(COLUMNS)},
    "writes padded rows": {"WRONG": {"padded graph rows"}},
    "writes the cache": {"WRONG": {"baseline"}, "refused": set(COLUMNS) - {"baseline"}},
    "adds to out": {"WRONG": {"padded graph rows", "stale output", "strided out"}},
    "packed out": {"WRONG": {"strided out"}},
    "packed q": {"WRONG": {"strided q"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The calls are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def probed(fault: str, form: str = "kv") -> Report:
    """All probes of a family."""
    run = Trials(mutant(fault), CPU)
    found = tuple(run.find(trial) for trial in trials([], []) if trial.case.form == form)
    return Report(fault, fault, "", "cpu", findings=found)


def columns_of(report: Report) -> dict[str, set[str]]:
    """Columns that are not ok, by verdict."""
    found: dict[str, set[str]] = {}
    for name in COLUMNS:
        worst = report.worst(probe=name)
        if worst is not None and worst.verdict is not Verdict.OK:
            found.setdefault(worst.verdict.value, set()).add(name)
    return found


def test_every_fault_has_columns_that_name_it_and_every_column_a_fault() -> None:
    assert list(NAMED) == list(FAULTS)
    named = set().union(*(columns for one in NAMED.values() for columns in one.values()))
    assert named == set(COLUMNS)
    wrong = set().union(*(one.get("WRONG", set()) for one in NAMED.values()))
    # No kernel can be wrong of small blocks alone, nor of ids that it does not check; all else is caught.
    assert set(COLUMNS) - wrong == {"small blocks", "garbage ids past the end"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_else_is_blamed(fault: str) -> None:
    report = probed(fault)
    assert columns_of(report) == NAMED[fault]
    for finding in report.findings:
        assert (finding.verdict is Verdict.OK) or finding.message
        assert not finding.where or finding.verdict is Verdict.WRONG
        if finding.verdict is Verdict.OK:
            assert finding.error is not None
            assert finding.allowed is not None
            assert finding.error <= finding.allowed


@pytest.mark.parametrize(
    ("fault", "probe", "text"),
    [
        ("base 2", "lse convention", "lse is a logarithm to base 2; "),
        ("lse +inf", "lse convention", "lse of a row without keys is +inf; "),
        ("lse transposed", "lse convention", "lse is [total_q, num_q_heads]; "),
        ("writes padded rows", "padded graph rows", "elements around out were written"),
        ("writes the cache", "baseline", "elements of the cache were written"),
        ("tail values", "NaN tails", "elements are NaN, first"),
        ("packed row", "last-dim stride", "out: off by more than twice plain PyTorch in the storage dtype"),
        ("checks all ids", "garbage ids past the end", "ValueError: an id of the table names no block"),
        ("contiguous", "page stride", "memory grew by "),
    ],
)
def test_the_message_says_what_is_wrong(fault: str, probe: str, text: str) -> None:
    run = Trials(mutant(fault), CPU)
    found = [run.find(trial) for trial in trials([], [], [probe]) if trial.case.form == "kv"]
    assert any(text in finding.message for finding in found)


def test_the_kernel_without_a_fault_passes_every_probe_of_both_families() -> None:
    for form in ("kv", "row"):
        report = probed("", form)
        assert columns_of(report) == {}
        assert report.is_trustworthy


def test_the_kernel_without_a_fault_passes_in_every_layout() -> None:
    run = Trials(mutant(""), CPU)
    cases = ["tiny-gqa", "tiny-row", "tiny-q_v", "tiny-pages", "tiny-row-pages"]
    found = [run.find(trial) for trial in trials(cases, probes=[])]
    assert {finding.verdict for finding in found} == {Verdict.OK}
    assert {finding.layout for finding in found} == set(LAYOUTS) - {"M14-fp8-row"}


@pytest.mark.slow
def test_the_kernel_without_a_fault_passes_whatever_check_asks() -> None:
    run = Trials(mutant(""), CPU)
    found = [run.find(trial) for trial in trials()]
    assert {finding.verdict for finding in found} == {Verdict.OK}
    # All but those for fp8 caches, and for MLA rows other than 512 + 64.
    assert {finding.layout for finding in found} >= set(LAYOUTS) - {"M14-fp8-row", "M15-other-dims"}


def test_a_fault_of_strides_shows_in_the_layouts_that_have_them() -> None:
    run = Trials(mutant("packed page"), CPU)
    cases = [find_case("tiny-gqa")]
    found = {trial.layout.name: run.find(trial).verdict for trial in trials(cases, None, [])}
    assert found["G16-sglang-pool"] is Verdict.OK
    assert found["G1-kv-outermost"] is Verdict.OK
    for name in ("G2-vllm-nhd", "G4-cross-layer-nhd", "G9-hybrid-page-nhd", "A-odd-page"):
        assert found[name] is Verdict.WRONG
    assert set(found) == {name for name, layout in LAYOUTS.items() if compatible(cases[0], layout) is None}


def test_a_refusal_is_told_in_the_words_of_the_kernel() -> None:
    report = check(mutants.refuses, ["tiny-gqa"], ["G2"], probes=["baseline"], isolate=False)
    assert {finding.verdict for finding in report.findings} == {Verdict.REFUSED}
    assert {finding.message for finding in report.findings} == {
        "NotImplementedError: no KV cache <of this kind> see the manual"
    }
    assert report.is_trustworthy


def test_a_kernel_without_lse_is_judged_on_out_alone() -> None:
    def without(**kwargs: Any) -> Any:
        return mutant("")(**kwargs | {"return_softmax_lse": False})

    run = Trials(without, CPU)
    found = run.find(Trial(find_case("tiny-gqa"), find_layout("G2")))
    assert (found.verdict, found.message) == (Verdict.OK, "no lse")
    found = run.find(next(trial for trial in trials([], [], ["lse convention"])))
    assert (found.verdict, found.message) == (Verdict.REFUSED, "it returns no lse")


def test_a_crash_ends_one_trial_and_the_run_goes_on(tmp_path: Path) -> None:
    told = []
    report = check(
        mutants.crashes,
        ["tiny-gqa"],
        ["G16"],
        probes=["5-D pages", "strided q"],
        progress=lambda done, total, finding: told.append((done, total, finding)),
    )
    assert report.kernel == "mutants:crashes"
    verdicts = [(finding.probe, finding.verdict) for finding in report.findings]
    pages = [("5-D pages", Verdict.CRASHED), ("5-D pages", Verdict.OK)]  # of GQA, and of MLA
    assert verdicts == [*pages, *[("strided q", Verdict.OK)] * 4, ("", Verdict.OK)]
    assert report.findings[0].message == "the process died of SIGSEGV"
    assert not report.is_trustworthy
    assert [(done, finding) for done, _, finding in told] == list(enumerate(report.findings, 1))
    save_reports(tmp_path / "reports.json", [report])
    assert load_reports(tmp_path / "reports.json") == [report]


def test_a_hang_is_a_crash_and_the_next_trial_has_a_new_process() -> None:
    child = Child(mutants.hangs, CPU, 300.0, None)
    asked = trials([], [], ["baseline", "5-D pages"])
    try:
        assert child.find(asked[0]).verdict is Verdict.OK
        child._timeout = 3.0
        hung = child.find(next(trial for trial in asked if trial.probe == "5-D pages"))
        assert (hung.verdict, hung.message) == (Verdict.CRASHED, "the process gave no answer within 3 s")
        child._timeout = 300.0
        assert child.find(asked[0]).verdict is Verdict.OK
    finally:
        child.close()


def test_what_has_no_name_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)cannot be sent .* do .*top of a module, or pass isolate=False"
    ):
        check(lambda **kwargs: None)
    with pytest.raises(KeyError, match="no probe 'page'; there are baseline, page stride"):
        check("cpu", probes=["page"])
    with pytest.raises(KeyError, match="no case 'llama'"):
        check("cpu", cases=["llama"])
    with pytest.raises(KeyError, match="no layout 'G99'"):
        check("cpu", layouts=["G99"])


def test_what_cannot_be_tried_here_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_little(self: Trials, needed: int) -> None:
        raise LeftOut(f"layouts beyond 2^31 elements need {needed >> 30} GB of free memory")

    monkeypatch.setattr(Trials, "_demand", too_little)
    report = check(mutant(""), ["tiny-gqa"], ["G2", "A-huge-blocks"], probes=[], isolate=False)
    assert [finding.layout for finding in report.findings] == ["G2-vllm-nhd"]
    assert report.left_out == ("A-huge-blocks: layouts beyond 2^31 elements need 12 GB of free memory",)


def test_a_peer_that_is_absent_is_said_to_be(tmp_path: Path) -> None:
    report = check("flash-mla", peers_folder=tmp_path)
    assert report.absent
    assert report.findings == ()
    assert not report.is_trustworthy


def test_our_own_back_ends_are_right() -> None:
    report = check("cpu", ["tiny-gqa", "tiny-q_v"], probes=["baseline", "NaN tails"], isolate=False)
    assert {finding.verdict for finding in report.findings} == {Verdict.OK}
    # The reference gathers the rows of a sequence, in float64: it is no kernel to be used.
    report = check("reference", [], probes=["baseline", "NaN tails"], isolate=False)
    assert {finding.verdict for finding in report.findings} == {Verdict.COPIED}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_mla_too_or_has_no_meaning_there(fault: str) -> None:
    # One KV head; V is a part of K's row; a tile of this kernel is a block, so that it never looks beyond.
    meaningless = ("packed head", "V as K", "null block")
    assert bool(columns_of(probed(fault, "row"))) is (fault not in meaningless)


def test_the_cases_checked_are_small_and_of_each_family() -> None:
    cases = [find_case(name) for name in CASES_CHECKED]
    assert {case.form for case in cases} == {"kv", "row", "q_v"}
    assert {case.blocks_per_page > 1 for case in cases} == {False, True}
    assert all("cpu" in case.tags for case in cases)
