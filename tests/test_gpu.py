"""What needs a CUDA device: the whole table on the ``triton`` back end, and its promises about the device.

pytest tests/test_gpu.py -n 8         one device; compiling kernels takes most of the time
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compilations import compilations
from device import (
    DEVICE,
    FAULTS,
    STEP,
    Engine,
    OperatorArguments,
    Result,
    assert_alone_is_the_same,
    assert_same_bits,
    assert_spoilt_gives_nan,
    metadata_of,
    run,
    seconds_of,
)
from torch import Tensor
from twins import layouts_of, packed_twin

from anystride import UnsupportedError, explain, flash_attn_varlen_func, memory, warmup
from anystride.testing import LAYOUTS, Case, compatible, find_case, find_layout, make_inputs, select
from anystride.testing.judgement import assert_right, attend
from anystride.testing.rows import ROW_RECIPES, TABLE_RECIPES

pytestmark = pytest.mark.gpu

# The table


@pytest.mark.parametrize("case", select("full"), ids=lambda case: case.name)
def test_case_is_right(case: Case) -> None:
    ranks = 1 if case.cp is None else case.cp.world_size
    for rank in range(ranks):
        run(make_inputs(case, layouts_of(case)[0], DEVICE, rank=rank))


@pytest.mark.parametrize("name", ["bench-mla-b1-h16-kv128k", "bench-gqa-b1-h32-8-d128-kv32k"])
def test_long_context_is_right(name: str) -> None:
    case = find_case(name)
    run(make_inputs(case, layouts_of(case)[0], DEVICE, guard=False))


# Layouts

LAYOUT_CASES = ("llama-3-8b", "deepseek-v3-mtp", "deepseek-v3-q_v")
SPECIAL_CASES = ("pages-4x16", "pages-row-2x64", "fp8-row", "mistral-small-4")


def cases_of_layouts() -> Iterator[Any]:
    for name, layout in LAYOUTS.items():
        cases = [find_case(case) for case in LAYOUT_CASES]
        fitting = [case for case in cases if compatible(case, layout) is None]
        # Pages, fp8 and other widths only for the layouts that exist for them.
        fitting = fitting or [
            case for case in map(find_case, SPECIAL_CASES) if compatible(case, layout) is None
        ]
        assert fitting, f"no case fits {name}"
        if layout.huge and compatible(find_case("dense"), layout) is None:
            fitting.append(find_case("dense"))
        marks = [pytest.mark.large] if layout.huge else []
        for case in fitting:
            yield pytest.param(case, name, marks=marks, id=f"{name}-{case.name}")


@pytest.mark.parametrize(("case", "name"), list(cases_of_layouts()))
def test_layout_changes_no_bit(case: Case, name: str) -> None:
    inputs = make_inputs(case, LAYOUTS[name], DEVICE)
    result = run(inputs)
    twin = packed_twin(inputs, DEVICE)
    if twin is not None:
        assert_same_bits(result, run(twin))


@pytest.mark.parametrize("rows", ROW_RECIPES)
@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_strides_of_q_and_out_change_no_bit(name: str, rows: str) -> None:
    case = find_case(name)
    layout = layouts_of(case)[0]
    packed = run(make_inputs(case, layout, DEVICE))
    assert_same_bits(packed, run(make_inputs(case, layout, DEVICE, rows=rows, out=rows)))


@pytest.mark.parametrize("table", TABLE_RECIPES)
def test_strides_of_the_table_change_no_bit(table: str) -> None:
    case = find_case("llama-3-8b")
    layout = layouts_of(case)[0]
    packed = run(make_inputs(case, layout, DEVICE))
    assert_same_bits(packed, run(make_inputs(case, layout, DEVICE, table=table)))


@pytest.mark.large
def test_queries_and_results_beyond_32_bits() -> None:
    case = replace(find_case("llama-3-8b"), seqused_k=(70, 200), q_lens=(1, 1))
    inputs = make_inputs(case, find_layout("G2"), DEVICE)
    far, q = 2**31 + 8, inputs.kwargs["q"]
    flat = torch.empty(far + q.numel(), dtype=q.dtype, device=DEVICE)
    strides = (far, case.d_qk, 1)
    expected = run(inputs)
    far_q = flat.as_strided(q.shape, strides)
    far_q.copy_(q)
    assert_same_bits(attend(inputs, "triton", q=far_q), expected)
    far_out = flat.as_strided(q.shape, strides)  # d_v = d_qk: the same place serves
    out, lse = attend(inputs, "triton", out=far_out)
    assert out.data_ptr() == far_out.data_ptr()
    assert_same_bits((out, lse), expected)


# One plan, other lengths


@pytest.mark.parametrize("name", ["llama-3-8b", "deepseek-v3-h16", "mixed-row", "all-features"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    first = run(inputs)
    for _ in range(20):
        assert_same_bits(first, attend(inputs, "triton"))


@pytest.mark.parametrize("name", ["llama-3-8b", "mixed", "gpt-oss"])
def test_metadata_gives_the_same_bits(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    assert_same_bits(run(inputs), run(inputs, scheduler_metadata=metadata_of(inputs)))


@pytest.mark.parametrize(
    "name", ["deepseek-v3-h16", "deepseek-v3-q_v", "deepseek-v3-h128", "mistral-small-4", "llama-3-8b"]
)
def test_metadata_for_another_back_end_serves_as_well(name: str) -> None:
    # On Hopper these schedules have as many parts as the hopper back end wants.
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    run(inputs, scheduler_metadata=metadata_of(inputs))


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_of_another_step_gives_nan(fault: str) -> None:
    inputs = make_inputs(find_case("llama-3-8b"), find_layout("G2"), DEVICE)
    assert_spoilt_gives_nan(inputs, fault, "triton")


@pytest.mark.parametrize("name", ["batch-invariant", "row-batch-invariant"])
def test_batch_invariant_bits_do_not_depend_on_neighbours(name: str) -> None:
    assert_alone_is_the_same(name, "triton")


# CUDA graphs


CAPTURES = {
    "gqa": (Case("graph-gqa", "test", (700,) * 6, (1,) * 6, 32, 8, 128, 128), "G4"),
    "mla": (Case("graph-mla", "test", (700,) * 6, (1,) * 6, 16, 1, 576, 512, "row", 64), "M2"),
    "q_v": (Case("graph-q_v", "test", (700,) * 6, (2,) * 6, 16, 1, 64, 512, "q_v", 64), "M9"),
    "speculative": (Case("graph-mtp", "test", (700,) * 6, (3,) * 6, 10, 2, 64, 64, window=(200, 0)), "G3"),
    "splits": (Case("graph-splits", "test", (700,) * 6, (1,) * 6, num_splits=4), "G2"),
    "invariant": (Case("graph-fixed", "test", (2500,) * 6, (1,) * 6, batch_invariant=True), "G2"),
}


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        (name, metadata)
        for name, (case, _) in CAPTURES.items()
        for metadata in ("none", "captured", "copied")
        if metadata == "none" or not (case.num_splits or case.batch_invariant)  # these have no schedule
    ],
)
def test_graph_replays_right_at_other_lengths(name: str, metadata: str) -> None:
    Engine(*CAPTURES[name], metadata).replay_at_all_lengths()


# The operator


@pytest.mark.filterwarnings("default")  # warnings of torch's own about itself
@pytest.mark.parametrize("name", ["llama-3-8b", "deepseek-v3-mtp", "deepseek-v3-q_v", "all-features"])
def test_operator_passes_opcheck(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[-1], DEVICE, guard=False)
    with OperatorArguments() as seen:  # type: ignore[no-untyped-call]
        attend(inputs, "triton")
    torch.library.opcheck(torch.ops.anystride.attention.default, seen.args)


@pytest.mark.filterwarnings("default")  # warnings of torch's own about itself
@pytest.mark.parametrize(
    ("name", "layout"), [("llama-3-8b", "G4"), ("deepseek-v3-mtp", "M2"), ("gpt-oss", "G15")]
)
def test_compiled_call_gives_the_same_bits(name: str, layout: str) -> None:
    inputs = make_inputs(find_case(name), find_layout(layout), DEVICE)
    kwargs = inputs.kwargs | {"backend": "triton"}

    def layer(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Result:
        changed = {"q": q * 2, "k": k, "v": v, "seqused_k": used}  # doubling rounds nothing
        out, lse = flash_attn_varlen_func(**(kwargs | changed))
        return out * 2, lse

    compiled = torch.compile(layer, fullgraph=True)
    used = kwargs["seqused_k"]
    for lengths in (used, used // 2):
        arguments = (kwargs["q"], kwargs["k"], kwargs["v"], lengths)
        assert_same_bits(compiled(*arguments), layer(*arguments))
    inputs.assert_untouched()


# The work is shared out


def loads_of(metadata: Tensor, lengths: Sequence[int]) -> list[int]:
    """Steps of each part of a schedule of one unit a sequence."""
    steps = [max(1, -(-length // STEP)) for length in lengths]
    before = [0, *itertools.accumulate(steps)]
    rows = metadata.view(-1, 16)[1:].tolist()
    return [before[row[3]] + row[5] - before[row[0]] - row[2] for row in rows]


UNEVEN = (1024,) * 31 + (128 * 1024,) + (1024,) * 32
EVEN = (sum(UNEVEN) // 64,) * 64


def test_uneven_batch_spreads_over_all_processors(record_property: Callable[[str, object], None]) -> None:
    times = []
    for lengths in (EVEN, UNEVEN):
        case = Case("uneven", "test", lengths, (1,) * 64, 16, 1, 576, 512, "row", 64, lse=False)
        inputs = make_inputs(case, find_layout("M1"), DEVICE, guard=False)
        metadata = metadata_of(inputs)
        loads = loads_of(metadata, lengths)
        assert sum(loads) == sum(-(-length // STEP) for length in lengths)
        processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        busy = [load for load in loads if load]  # sequences of one length are cut at their ends only
        assert len(busy) >= processors * 15 // 16
        # Parts of short sequences do fewer steps: they are charged with beginning and finishing each.
        assert max(busy) / (sum(busy) / len(busy)) < 1.25
        times.append(seconds_of(lambda: attend(inputs, "triton", scheduler_metadata=metadata)))  # noqa: B023
    record_property("uneven_over_even", times[1] / times[0])
    # In one processor's hands the long sequence would take 90 times as long as the even batch does.
    assert times[1] < 2 * times[0]


# Compilations, host time, synchronisation


def test_lengths_strides_and_batches_compile_nothing_new() -> None:
    def call(batch: int, layout: str, lengths: Sequence[int], longest: int) -> None:
        case = Case("again", "test", tuple(lengths) * batch, (1,) * batch * len(lengths), 32, 8, 128, 128)
        inputs = make_inputs(case, find_layout(layout), DEVICE)
        out, lse = attend(inputs, "triton", max_seqlen_k=longest)
        assert_right(inputs, out, lse)

    call(20, "G2", (300, 7, 100), 1 << 16)
    with compilations() as compiled:
        call(20, "G2", (5, 400, 0), 1 << 16)
        call(19, "G2", (300, 7, 100), 1 << 16)
        call(20, "G9", (300, 7, 100), (1 << 16) - 1000)
        call(20, "G4", (300, 7, 1), 1 << 16)
    assert compiled == []


@pytest.mark.parametrize("name", ["llama-3-8b", "deepseek-v3-h16", "deepseek-v3-q_v"])
def test_warmup_leaves_nothing_to_compile(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    warmup(
        inputs.kwargs["k"], inputs.kwargs["v"], case.num_q_heads, max_batch=64, max_seqlen_k=1 << 16,
        q_v="q_v" in inputs.kwargs, causal=case.causal, softmax_scale=case.scale, backend="triton",
    )  # fmt: skip
    with compilations() as compiled:
        run(inputs)
        run(inputs, scheduler_metadata=metadata_of(inputs))
        attend(inputs, "triton", return_softmax_lse=False, max_seqlen_k=1 << 15)
    assert compiled == []


CALLS_AHEAD = 200  # fewer launches than the device queues before it makes the host wait
ALLOCATE, KEPT_SCRATCH = memory.allocate, memory.kept_scratch


def host_microseconds(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    for _ in range(CALLS_AHEAD):
        step()
    return (time.perf_counter_ns() - begin) / CALLS_AHEAD / 1000


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others take the host's time: run without -n")
@pytest.mark.parametrize("schedule", ["given", "none"])
@pytest.mark.parametrize("name", ["llama-3-8b", "deepseek-v3-h16", "deepseek-v3-q_v"])
def test_host_time_of_a_call(
    name: str, schedule: str, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the poison, which costs launches.
    monkeypatch.setattr(memory, "allocate", ALLOCATE)
    monkeypatch.setattr(memory, "kept_scratch", KEPT_SCRATCH)
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE, guard=False)
    arguments = dict(inputs.kwargs)
    if schedule == "given":
        arguments["scheduler_metadata"] = metadata_of(inputs)
    one = torch.zeros(64, device=DEVICE)

    def call() -> object:
        return flash_attn_varlen_func(**arguments)

    def add() -> object:
        return one.add_(1)

    call()
    # Hosts differ by a factor of two, and from minute to minute: beside what PyTorch takes for one kernel.
    calls, adds = zip(*((host_microseconds(call), host_microseconds(add)) for _ in range(20)), strict=True)
    microseconds, yardstick = (sorted(times)[len(times) // 2] for times in (calls, adds))
    record_property("host_microseconds", microseconds)
    record_property("host_microseconds_of_add_", yardstick)
    print(f"{name}: {microseconds:.1f} us on the host a call, {yardstick:.1f} for add_")  # noqa: T201
    assert microseconds < 5 * yardstick


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "name", ["llama-3-8b", "deepseek-v3-q_v", "mixed", "splits-3", "batch-invariant", "dense"]
)
def test_call_never_synchronises(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    try:
        torch.cuda.set_sync_debug_mode("error")
        metadata = metadata_of(inputs) if case.paged else None
        first = attend(inputs, "triton")
        second = attend(inputs, "triton", scheduler_metadata=metadata)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_right(inputs, *first)
    assert_right(inputs, *second)


# Who runs, and where


def test_triton_is_the_choice_and_the_cpu_says_why_it_is_not() -> None:
    inputs = make_inputs(find_case("d-80"), find_layout("G2"), DEVICE)  # hopper has no kernel for it
    explanation = explain(**inputs.kwargs)
    assert explanation.backend == "triton"
    assert "triton" in str(explanation)
    assert_same_bits(attend(inputs, None), attend(inputs, "triton"))
    with pytest.raises(UnsupportedError, match="cuda") as refused:
        attend(inputs, "cpu")
    assert list(refused.value.refusals) == ["cpu"]


def test_triton_refuses_tensors_on_the_cpu() -> None:
    inputs = make_inputs(find_case("llama-3-8b"), find_layout("G2"))
    with pytest.raises(UnsupportedError, match="tensors are on cpu"):
        attend(inputs, "triton")


def test_calls_on_several_streams_do_not_meet() -> None:
    names = ("llama-3-8b", "deepseek-v3-h16", "mixed", "gpt-oss")
    calls = [make_inputs(find_case(name), layouts_of(find_case(name))[0], DEVICE) for name in names]
    expected = [run(inputs) for inputs in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Result]] = [[] for _ in calls]
    for _ in range(10):
        for stream, inputs, mine in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                mine.append(attend(inputs, "triton"))
    torch.cuda.synchronize()
    for right, mine in zip(expected, results, strict=True):
        for result in mine:
            assert_same_bits(right, result)


def test_call_waits_for_its_stream() -> None:
    inputs = make_inputs(find_case("llama-3-8b"), find_layout("G2"), DEVICE)
    expected = run(inputs)
    q = torch.empty_like(inputs.kwargs["q"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # clock ticks, tens of milliseconds: q is written late
        q.copy_(inputs.kwargs["q"])
        result = attend(inputs, "triton", q=q)
    side.synchronize()
    assert_same_bits(expected, result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    inputs = make_inputs(find_case("llama-3-8b"), find_layout("G2"), "cuda:1")
    for _ in range(2):  # the second one takes the short way
        run(inputs, scheduler_metadata=metadata_of(inputs))
    assert torch.cuda.current_device() == 0
