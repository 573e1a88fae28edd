"""Who runs a call: the order of the back ends, what is remembered, and what is asked anew."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anystride import InvalidInputError, UnsupportedError, get_scheduler_metadata, memory, plan, warmup
from anystride.backends import reference
from anystride.plan import Plan, find_plan
from anystride.problem import Call, Numbers, Problem, bucket, make_problem
from anystride.testing import Inputs, find_case, find_layout, make_inputs
from anystride.testing.judgement import attend


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan, "_PLANS", {})
    plan.default_backend.cache_clear()
    yield
    plan.default_backend.cache_clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that were checked, one for each plan that was made."""
    problems: list[Problem] = []

    def watched(call: Call, numbers: Numbers) -> Problem:
        problems.append(make_problem(call, numbers))
        return problems[-1]

    monkeypatch.setattr(plan, "make_problem", watched)
    return problems


def inputs_of(case: str = "tiny-gqa", layout: str = "G2", **options: Any) -> Inputs:
    return make_inputs(find_case(case), find_layout(layout), **options)


def plan_of(inputs: Inputs, wanted: str | None = None, **others: Any) -> Plan:
    """The plan that a call with these arguments finds."""
    a = inputs.kwargs | others
    tensors = tuple(a.get(name) for name in Call._fields)
    numbers = Numbers(
        a["max_seqlen_q"], bucket(a["max_seqlen_k"]), a["softmax_scale"], a["causal"],
        tuple(a.get("window_size") or (-1, -1)), a["softcap"], a["num_splits"], False, a["batch_invariant"],
        a.get("cp_world_size", 1), a.get("cp_rank", 0), a.get("cp_interleave", 1), a["return_softmax_lse"],
    )  # fmt: skip
    return find_plan(tensors, numbers, wanted)


def test_the_second_call_of_the_same_shapes_finds_the_plan_of_the_first(made: list[Problem]) -> None:
    # Other tensors, other values, other lengths and tables.
    assert plan_of(inputs_of(seed=0)) is plan_of(inputs_of(seed=1))
    assert len(made) == 1


def test_calls_plan_once_whatever_their_lengths_and_bounds(made: list[Problem]) -> None:
    inputs = inputs_of()
    for lengths in ([0, 5, 33], [0, 0, 0], [0, 3, 1]):
        for bound in (33, 40, 64):  # of one power of two
            attend(inputs, "cpu", seqused_k=torch.tensor(lengths).int(), max_seqlen_k=bound)
    assert len(made) == 1
    assert len(plan._PLANS) == 1


DIFFERENT: dict[str, dict[str, Any]] = {
    "other_strides": {"layout": "G3"},
    "other_address": {"layout": "A-off-by-one"},
    "rows_of_q": {"rows": "padded_rows"},
    "alignment_of_q": {"rows": "off_by_one"},
    "strides_of_out": {"out": "padded_rows"},
    "table": {"table": "transposed"},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_strides_or_alignments_have_another_plan(name: str) -> None:
    assert plan_of(inputs_of()) is not plan_of(inputs_of(**DIFFERENT[name]))


CHANGED: dict[str, Any] = {
    "max_seqlen_q": 9, "max_seqlen_k": 9, "softmax_scale": 0.1, "causal": False, "window_size": (3, 0),
    "softcap": 1.0, "num_splits": 2, "batch_invariant": True, "return_softmax_lse": False,
    "k_descale": 0.5, "v_descale": torch.tensor(0.5), "s_aux": torch.zeros(4), "alibi_slopes": torch.zeros(4),
    "cp_world_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_the_problem_changes_the_plan(name: str) -> None:
    inputs = inputs_of()
    more = {"cp_tot_seqused_k": inputs.kwargs["seqused_k"]} if name == "cp_world_size" else {}
    before, after = plan_of(inputs, **more), plan_of(inputs, **more | {name: CHANGED[name]})
    assert before is not after
    assert before.problem != after.problem


def test_strides_of_scales_and_where_they_are_given_are_another_problem() -> None:
    inputs = make_inputs(find_case("tiny-scales"), find_layout("G2"))
    scales = inputs.kwargs["k_scale_cache"]
    plans = [
        plan_of(inputs),
        plan_of(inputs, k_scale_cache=scales.clone(memory_format=torch.contiguous_format)),
        plan_of(inputs, k_scale_cache=scales[:1, :1, :1].expand(scales.shape)),
        plan_of(inputs, k_scale_cache=None),
        plan_of(inputs, v_scale_cache=None),
    ]
    facts = [(p.problem.k_scale_groups, p.problem.v_scale_groups, p.problem.k_scale_strides) for p in plans]
    assert len(set(facts)) == len(plans)
    packed = (scales.shape[1] * scales.shape[2], 0, scales.shape[2], 1, 0)
    assert [fact[2] for fact in facts[1:4]] == [packed, (0,) * 5, (0,) * 5]
    assert facts[3][:2] == (0, 1)
    row_bytes = [p.problem.kv_row_bytes for p in plans]
    assert row_bytes == [16 + 16 + 8] * 3 + [16 + 16 + 4] * 2


def test_a_scalar_descale_in_another_place_is_another_problem() -> None:
    # One value is a float in both: only its place differs.
    inputs = inputs_of()
    k_first, v_first = plan_of(inputs, k_descale=0.5), plan_of(inputs, v_descale=0.5)
    assert (k_first.problem.has_k_descale, k_first.problem.has_v_descale) == (True, False)
    assert (v_first.problem.has_k_descale, v_first.problem.has_v_descale) == (False, True)


def test_v_that_moves_into_k_is_another_problem() -> None:
    flat = torch.zeros(4096)
    inputs = inputs_of()
    shape, strides = (4, 8, 2, 16), (512, 64, 32, 1)
    k = flat.as_strided(shape, strides)
    found = []
    for offset in (0, 8, 16, 2048):
        v = flat.as_strided((*shape[:3], 8), strides, offset)
        q, table = inputs.kwargs["q"].float(), inputs.kwargs["block_table"]
        problem = plan_of(inputs, q=q, k=k, v=v, block_table=table).problem
        found.append(tuple(problem.relation))
    assert found == [("v_in_k", 0), ("v_in_k", 8), ("neighbours", 16), ("separate", 0)]


@pytest.mark.parametrize("step_of_k", [0, 1, 2, 7, 2**40])
def test_rows_of_one_element_are_not_taken_for_one_another(step_of_k: int) -> None:
    # K's rows have one element: its last stride says nothing about how far a neighbour is.
    flat = torch.zeros(8192)
    inputs = inputs_of()
    q = torch.zeros(4, 4, 1)
    k = flat.as_strided((4, 8, 2, 1), (1024, 128, 64, step_of_k), 4096)
    kinds = []
    for offset in (4096 - 16, 0, 4096 + 2):
        v = flat.as_strided((4, 8, 2, 8), (1024, 128, 64, 2), offset)
        kinds.append(tuple(plan_of(inputs, q=q, k=k, v=v).problem.relation))
    assert kinds == [("neighbours", -8), ("separate", 0), ("neighbours", 1)]


def test_absurd_strides_of_dimensions_of_size_1_do_not_reach_the_problem() -> None:
    inputs = inputs_of("tiny-one-head", "A-absurd-strides")
    assert max(inputs.kwargs["k"].stride()) >= 2**40
    problem = plan_of(inputs).problem
    assert max(problem.k_strides + problem.v_strides) < 2**20


def test_the_memory_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST_PLANS", 4)
    inputs = inputs_of()
    for size in range(1, 20):
        plan_of(inputs, softcap=float(size))
        assert len(plan._PLANS) <= 4
    assert plan_of(inputs, softcap=19.0) is plan_of(inputs, softcap=19.0)


def test_a_problem_that_cannot_run_is_not_remembered(made: list[Problem]) -> None:
    for _ in range(2):
        with pytest.raises(UnsupportedError):
            plan_of(inputs_of(), "triton")
    assert plan._PLANS == {}
    assert len(made) == 2


# Who runs


class Stub:
    """A back end that runs what it is told to and keeps what it was asked."""

    def __init__(self, name: str, refuses: list[str]) -> None:
        self.NAME, self.reasons = name, refuses
        self.ran = 0

    def refusals(self, problem: Problem) -> list[str]:
        return self.reasons

    def choose_config(self, problem: Problem) -> Any:
        return reference.Config()

    def run(self, problem: Problem, config: Any, call: Call) -> None:
        self.ran += 1
        call.out.zero_()


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stub]:
    named = {name: Stub(name, []) for name in plan.NAMES}
    monkeypatch.setattr(plan, "backend_named", named.__getitem__)
    return named


@pytest.mark.parametrize(
    ("refusing", "runs"),
    [
        ((), "hopper"),
        (("hopper",), "triton"),
        (("hopper", "triton"), "cpu"),
        (("triton", "cpu"), "hopper"),
        (plan.AUTOMATIC, None),
    ],
)
def test_the_first_back_end_that_can_runs_the_call(
    stubs: dict[str, Stub], refusing: tuple[str, ...], runs: str | None
) -> None:
    for name in refusing:
        stubs[name].reasons = [f"{name} is tired"]
    if runs is None:
        with pytest.raises(UnsupportedError) as caught:
            attend(inputs_of(), None)
        assert caught.value.refusals == {name: [f"{name} is tired"] for name in plan.AUTOMATIC}
        return
    attend(inputs_of(), None)
    assert {name: stub.ran for name, stub in stubs.items() if stub.ran} == {runs: 1}


@pytest.mark.parametrize("wanted", plan.NAMES)
def test_the_back_end_that_is_asked_for_is_obeyed_or_refused(stubs: dict[str, Stub], wanted: str) -> None:
    attend(inputs_of(), wanted)
    assert {name: stub.ran for name, stub in stubs.items() if stub.ran} == {wanted: 1}
    plan._PLANS.clear()
    stubs[wanted].reasons = ["one", "two"]
    with pytest.raises(UnsupportedError, match=f"backend '{wanted}' was asked for and refuses") as caught:
        attend(inputs_of(), wanted)
    assert caught.value.refusals == {wanted: ["one", "two"]}
    assert sum(stub.ran for stub in stubs.values()) == 1


def test_the_reference_is_never_chosen_automatically() -> None:
    assert "reference" in plan.NAMES
    assert "reference" not in plan.AUTOMATIC
    assert set(plan.AUTOMATIC) < set(plan.NAMES)


def test_the_same_call_asked_of_another_back_end_is_another_plan() -> None:
    inputs = inputs_of()
    plans = [plan_of(inputs, name) for name in (None, "cpu", "reference")]
    assert [p.backend.NAME for p in plans] == ["cpu", "cpu", "reference"]
    assert list(plans[0].refused) == ["hopper", "triton"]
    assert plans[1].refused == {}


def test_the_environment_names_the_default(monkeypatch: pytest.MonkeyPatch, stubs: dict[str, Stub]) -> None:
    monkeypatch.setenv("ANYSTRIDE_BACKEND", "reference")
    plan.default_backend.cache_clear()
    attend(inputs_of(), None)
    assert stubs["reference"].ran == 1
    attend(inputs_of(), "cpu")  # an argument outranks it
    assert stubs["cpu"].ran == 1


def test_an_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYSTRIDE_BACKEND", "cutlass")
    plan.default_backend.cache_clear()
    with pytest.raises(InvalidInputError, match="backend = 'cutlass'"):
        attend(inputs_of(), None)


@pytest.mark.parametrize("value", ["reference", "", None])
def test_the_environment_is_read_when_the_first_call_is_made(value: str | None) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "ANYSTRIDE_BACKEND"}
    environment |= {} if value is None else {"ANYSTRIDE_BACKEND": value}
    code = "from anystride.plan import default_backend; print(default_backend())"
    assert run_python(code, environment) == (value or "None")


def test_one_log_line_says_once_who_runs_a_problem(caplog: pytest.LogCaptureFixture) -> None:
    inputs = inputs_of()
    with caplog.at_level(logging.INFO, logger="anystride"):
        for _ in range(3):
            attend(inputs, None)
    (record,) = (r for r in caplog.records if r.name == "anystride")
    message = record.getMessage()
    assert message.startswith("cpu runs q bf16 [4, 4, 16] strides (64, 16, 1), k bf16 [")
    assert "refused: {'hopper': [" in message


def test_a_back_end_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing_one!r}", name=missing_one)

    problem = plan_of(inputs_of()).problem
    monkeypatch.setattr(plan, "import_module", missing)
    plan.backend_named.cache_clear()
    try:
        missing_one = "triton.language"
        (reason,) = plan.refusals_of("triton", problem)
        assert reason == "triton is not installed; needs the package triton (pip install triton)"
        plan.backend_named.cache_clear()
        missing_one = "numpy"  # anything else that is missing is a fault, not a refusal
        with pytest.raises(ModuleNotFoundError, match="numpy"):
            plan.refusals_of("triton", problem)
    finally:
        plan.backend_named.cache_clear()


# What is allocated


def test_all_results_and_scratch_are_allocated_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fresh = memory.allocate

    def counted(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        sizes.append((tuple(shape), dtype))
        return fresh(shape, dtype, device)

    monkeypatch.setattr(memory, "allocate", counted)
    inputs = inputs_of()
    out, lse = attend(inputs, "cpu")
    assert lse is not None
    assert sizes[:2] == [(tuple(out.shape), out.dtype), (tuple(lse.shape), lse.dtype)]
    assert sizes[2:] == list(plan_of(inputs, "cpu").config.scratch)
    sizes.clear()
    attend(inputs_of(out="packed"), "cpu", return_softmax_lse=False)
    assert (tuple(out.shape), out.dtype) not in sizes


# Schedules and warming up, where nothing is scheduled and nothing compiled


def test_a_schedule_on_a_cpu_is_a_header_of_zeros() -> None:
    for batch in (1, 3, 200):
        lengths = torch.full((batch,), 100, dtype=torch.int32)
        metadata = get_scheduler_metadata(batch, 1, 100, 16, 1, 576, lengths, headdim_v=512)
        assert metadata.tolist() == [0] * 16
        assert metadata.dtype == torch.int32


def test_warming_up_reads_nothing_of_the_cache() -> None:
    for case, layout in (("tiny-gqa", "G2"), ("tiny-q_v", "M9"), ("tiny-pages", "G11")):
        inputs, q_v = inputs_of(case, layout), case == "tiny-q_v"
        k, v = inputs.kwargs["k"], inputs.kwargs["v"]
        warmup(k, v, 4, max_batch=3, max_seqlen_q=(1, 2), q_v=q_v, causal=True)
        inputs.assert_untouched()


def test_warming_up_plans_what_calls_will_ask(made: list[Problem]) -> None:
    inputs = inputs_of()
    k, v = inputs.kwargs["k"], inputs.kwargs["v"]
    warmup(k, v, 4, max_batch=200, max_seqlen_q=(1, 4), causal=True, window_size=(9, 0))
    assert {bucket(p.batch) for p in made} == {1 << i for i in range(9)}  # every bucket of batch sizes
    assert max(p.batch for p in made) == 200
    assert {p.max_seqlen_q for p in made} == {1, 4}
    assert {p.has_lse for p in made} == {True, False}
    assert {p.metadata_words > 0 for p in made} == {True, False}
    assert {(p.causal, p.window_left) for p in made} == {(True, 9)}
    assert {p.max_keys for p in made} == {bucket(k.shape[0] * k.shape[1])}


# Imports


def run_python(code: str, environment: dict[str, str] | None = None) -> str:
    """What a fresh interpreter prints, with nothing imported yet."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_nothing_but_torch() -> None:
    optional = ("triton", "numpy", "rich", "typer", "matplotlib", "hypothesis", "pytest", "vllm")
    code = f"""
import sys
import torch
before = set(sys.modules)
class Never:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {optional!r}:
            raise ImportError(name + ' was imported')
sys.meta_path.insert(0, Never())
import anystride
import anystride.testing
new = {{name.partition('.')[0] for name in set(sys.modules) - before}}
print(sorted(new & {set(optional)!r}))
print(sorted(name for name in sys.modules if name.startswith('anystride.backends.')))
"""
    assert run_python(code) == "[]\n[]"


def test_a_call_on_a_cpu_works_without_triton() -> None:
    code = """
import sys
sys.modules['triton'] = None  # import triton raises ModuleNotFoundError
from anystride import explain
from anystride.testing import find_case, find_layout, make_inputs
from anystride import flash_attn_varlen_func
inputs = make_inputs(find_case('tiny-gqa'), find_layout('G2'))
out, lse = flash_attn_varlen_func(**inputs.kwargs)
print(tuple(out.shape), explain(**inputs.kwargs).refusals)
"""
    refusals = {
        name: [f"{name} is not installed; needs the package triton (pip install triton)"]
        for name in plan.SCHEDULED
    }
    assert run_python(code) == f"(4, 4, 16) {refusals}"
