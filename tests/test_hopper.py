"""The ``hopper`` back end: what it takes and refuses, its kernels compiled, and all of it on a device.

pytest tests/test_hopper.py -m gpu -n 8
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import attend
from twins import layouts_of, packed_twin

from anystride import UnsupportedError, explain, flash_attn_varlen_func, plan, warmup
from anystride.problem import Problem
from anystride.testing import CASES, Case, Layout, find_case, find_layout, make_inputs
from anystride.testing.rows import ROW_RECIPES, TABLE_RECIPES

pytest.importorskip("triton")
from compilations import compilations
from device import (
    DEVICE,
    Engine,
    OperatorArguments,
    assert_same_bits,
    metadata_of,
    run,
)
from offline import compile_call
from test_compile import Shape

from anystride.backends import hopper

# Triton 3.9 says at the first compilation that a default will change in 3.10.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
gpu = pytest.mark.gpu

ROWS_OF_TWO_BYTES = ("A-off-by-one", "A-inner-step-2", "A-dim-major")


def takes(case: Case) -> bool:
    """Whether the shapes, dtypes and features of a case are among those of these kernels."""
    rope = case.d_qk - (case.d_v if case.form == "row" else 0)
    rows = case.group_size * (1 if case.batch_invariant else max(case.q_lens, default=1))
    return (
        case.form != "kv"
        and case.d_v in hopper.LATENTS
        and rope in hopper.ROPES
        and case.torch_dtype.itemsize == 2
        and case.torch_kv_dtype == case.torch_dtype
        and 0 < rows <= hopper.MOST_ROWS
        and not case.alibi
        and not case.descales
    )


TAKEN = [case for case in CASES if takes(case) and "bench" not in case.tags]


def meetings() -> Iterator[Any]:
    """Every case that these kernels take, in every layout that holds it."""
    for case in TAKEN:
        for layout in layouts_of(case):
            marks = [pytest.mark.large] if layout.huge else []
            yield pytest.param(case, layout, marks=marks, id=f"{case.name}-{layout.name}")


# What is taken, and what is refused


def problem_of(case: Case, layout: Layout, **others: Any) -> Problem:
    """The facts of a call on a CPU."""
    caught: list[Problem] = []

    def catch(problem: Problem) -> list[str]:
        caught.append(problem)
        return ["only asked"]

    inputs = make_inputs(case, layout, guard=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "refusals", catch)
        with pytest.raises(UnsupportedError):
            attend(inputs, "hopper", **others)
    return caught[0]


def test_a_share_of_the_table_is_taken() -> None:
    names = {case.name for case in TAKEN}
    assert {
        "deepseek-v3-h16",
        "deepseek-v3-q_v",
        "deepseek-v3-mtp",
        "mistral-small-4",
        "glm-4.7-flash",
    } <= names
    assert len(names) > 30


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_what_should_be_taken_is(case: Case) -> None:
    problem = problem_of(case, layouts_of(case)[0])
    assert hopper.shape_refusals(problem) == []
    assert hopper.stride_refusals(problem) == []
    (reason,) = hopper.refusals(problem)
    assert reason == "tensors are on cpu; needs an NVIDIA GPU"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gqa": ("llama-3-8b", {}, "K and V are separate; needs V in K's row, or q_v"),
    "float32": ("deepseek-v3-h16", {"dtype": "float32"}, "q is torch.float32; needs float16 or bfloat16"),
    "fp8": (
        "deepseek-v3-h16", {"kv_dtype": "float8_e4m3fn"},
        "the cache is torch.float8_e4m3fn and torch.float8_e4m3fn; needs q's torch.bfloat16",
    ),
    "heads": (
        "deepseek-v3-h16", {"num_q_heads": 40},
        "40 rows (query tokens x heads of a group); needs at most 32",
    ),
    "tokens": (
        "deepseek-v3-h16", {"q_lens": (3,) * 4, "seqused_k": (70,) * 4},
        "48 rows (query tokens x heads of a group); needs at most 32",
    ),
    "rank": (
        "deepseek-v3-h16", {"d_qk": 448, "d_v": 384},
        "V of 384 and 64 more dimensions of K; needs (64, 256, 512) and (32, 64) of them",
    ),
    "rope": (
        "deepseek-v3-h16", {"d_qk": 528},
        "V of 512 and 16 more dimensions of K; needs (64, 256, 512) and (32, 64) of them",
    ),
    "alibi": ("deepseek-v3-h16", {"alibi": "heads"}, "alibi_slopes were given; needs None"),
    "descales": ("deepseek-v3-h16", {"descales": "floats"}, "descales were given; needs None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_and_features_are_refused_with_their_reason(name: str) -> None:
    case_name, changes, reason = REFUSED[name]
    case = replace(find_case(case_name), **changes)
    assert hopper.shape_refusals(problem_of(case, layouts_of(case)[0])) == [reason]


def test_v_in_the_middle_of_a_row_is_refused() -> None:
    case = find_case("deepseek-v3-h16")
    inputs = make_inputs(case, find_layout("M1"), guard=False)
    k = inputs.kwargs["k"]
    problem = problem_of(case, find_layout("M1"), k=k, v=k[..., 32:544])
    assert hopper.shape_refusals(problem) == ["V begins at element 32 of K's row; needs its begin or its end"]


@pytest.mark.parametrize("name", ROWS_OF_TWO_BYTES)
def test_rows_that_cannot_be_copied_are_refused_with_their_strides(name: str) -> None:
    case = find_case("d-row-96-64")
    problem = problem_of(case, find_layout(name))
    reasons = hopper.stride_refusals(problem)
    assert reasons
    last = problem.k_strides[4]
    if last != 1:
        assert f"the last stride of k is {last}; needs 1" in reasons
    else:
        assert "rows of the cache begin at multiples of 2 bytes" in reasons[0]
        assert str(problem.k_strides[:4]) in reasons[0]


def test_every_reason_is_told_at_once() -> None:
    case = replace(find_case("deepseek-v3-h16"), dtype="float32", alibi="heads", num_q_heads=128)
    problem = problem_of(case, find_layout("A-inner-step-2"))
    assert len(hopper.shape_refusals(problem) + hopper.stride_refusals(problem)) >= 5


def test_strides_of_size_1_dimensions_do_not_matter() -> None:
    problem = problem_of(find_case("deepseek-v3-h16"), find_layout("A-absurd-strides"))
    assert hopper.stride_refusals(problem) == []


# Compiled for a device that is not here


SHAPES = {
    "h16": Shape("deepseek-v3-h16", "M1"),
    "h8": Shape("deepseek-v3-h8", "M1"),
    "speculative": Shape("deepseek-v3-mtp", "M2"),
    "q_v": Shape("deepseek-v3-q_v", "M7"),
    "h20": Shape("glm-4.7-flash", "M1"),
    "rank-256": Shape("mistral-small-4", "M15"),
    "block-1": Shape("deepseek-v3-h16", "M3", {"block_size": 1}),
    "pages": Shape("pages-row-2x64", "M1", {"q_lens": (1,)}),
    "splits": Shape("deepseek-v3-h16", "M1", {"num_splits": 4}),
    "float16": Shape("deepseek-v3-h16", "M1", {"dtype": "float16"}),
    "features": Shape(
        "deepseek-v3-h16", "M1", {"window": (200, 0), "softcap": 30.0, "sinks": True, "q_lens": (1,)}
    ),
}


def main_loops(sass: str) -> list[str]:
    """Instructions between the first and the last product of each consumer: its main loop."""
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,5}\*/", line)]
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    # The two warpgroups' code lies one after the other: the largest gap between products is between them.
    gaps = [after - before for before, after in itertools.pairwise(products)]
    cut = gaps.index(max(gaps)) + 1
    spans = (products[:cut], products[cut:])
    return [line for span in spans for line in lines[span[0] : span[-1]]]


@pytest.mark.parametrize("name", SHAPES)
def test_compiles_and_fits(name: str) -> None:
    binaries = compile_call(SHAPES[name].kwargs(), "sm_90", "hopper")
    names = [binary.kernel for binary in binaries]
    assert names[-2:] == ["mla_narrow_kernel", "combine_kernel"]
    decode = binaries[-2]
    assert decode.shared_bytes <= 232448
    assert "wgmma.mma_async" in decode.assembly
    assert decode.assembly.count("setmaxnreg") >= 4, "the registers asked for were not granted"


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_spilled_where_it_matters(name: str) -> None:
    decode = compile_call(SHAPES[name].kwargs(), "sm_90", "hopper")[-2]
    loops = main_loops(decode.sass)
    assert sum("HGMMA" in line for line in loops) > 10
    assert not [line for line in loops if re.search(r"\b(LDL|STL)\b", line)], "spilled in a main loop"
    if name not in ("speculative", "h20", "rank-256"):  # 32 rows: some addresses of the results are
        assert decode.spilled_bytes == 0


# On a device


@gpu
@pytest.mark.parametrize(("case", "layout"), list(meetings()))
def test_case_in_layout_is_right_and_its_bits_are_those_of_packed(case: Case, layout: Layout) -> None:
    for rank in range(case.cp.world_size if case.cp else 1):
        inputs = make_inputs(case, layout, DEVICE, rank=rank)
        reasons = hopper.stride_refusals(problem_of(case, layout))
        if reasons:
            with pytest.raises(UnsupportedError) as refused:
                attend(inputs, "hopper")
            assert refused.value.refusals == {"hopper": reasons}
            assert_same_bits(attend(inputs, None), run(inputs, "triton"))  # the floor runs it
            continue
        result = run(inputs, "hopper")
        twin = packed_twin(inputs, DEVICE)
        if twin is not None:
            assert_same_bits(result, run(twin, "hopper"))


@gpu
@pytest.mark.parametrize("rows", ROW_RECIPES)
@pytest.mark.parametrize("name", ["deepseek-v3-mtp", "deepseek-v3-q_v"])
def test_strides_of_q_and_out_change_no_bit(name: str, rows: str) -> None:
    case = find_case(name)
    layout = layouts_of(case)[0]
    packed = run(make_inputs(case, layout, DEVICE), "hopper")
    inputs = make_inputs(case, layout, DEVICE, rows=rows, out=rows)
    if inputs.kwargs["q"].stride(2) != 1:
        assert explain(**inputs.kwargs).backend == "triton"
        return
    assert_same_bits(packed, run(inputs, "hopper"))


@gpu
@pytest.mark.parametrize("table", TABLE_RECIPES)
def test_strides_of_the_table_change_no_bit(table: str) -> None:
    case = find_case("deepseek-v3-h16")
    layout = layouts_of(case)[0]
    packed = run(make_inputs(case, layout, DEVICE), "hopper")
    assert_same_bits(packed, run(make_inputs(case, layout, DEVICE, table=table), "hopper"))


LONG = {
    "h16": Case("long-h16", "test", (8192, 5000, 64, 0, 20000), (1,), 16, 1, 576, 512, "row", 64),
    "h8": Case("long-h8", "test", (3000, 1, 70000), (1,), 8, 1, 576, 512, "row", 16),
    "h32": Case("long-h32", "test", (9000, 129, 40000, 63), (1,), 32, 1, 576, 512, "row", 528),
    "tokens": Case("long-q", "test", (9000, 129, 40000, 63), (8,), 4, 1, 576, 512, "row", 64),
    "q_v": Case("long-q_v", "test", (9000, 129, 4000), (2,), 16, 1, 64, 512, "q_v", 48),
    "heads": Case("long-heads", "test", (9000, 129, 4000), (3,), 14, 2, 96, 64, "row", 64),
    "window": Case(
        "long-window", "test", (9000, 129, 400), (2,), 16, 1, 576, 512, "row", 64, window=(700, 0)
    ),
    "softcap": Case("long-softcap", "test", (9000, 129), (1,), 16, 1, 576, 512, "row", 64, softcap=20.0),
    "sinks": Case("long-sinks", "test", (9000, 129, 0), (1,), 16, 1, 576, 512, "row", 64, sinks=True),
    "float16": Case("long-half", "test", (9000, 129), (1,), 16, 1, 576, 512, "row", 64, dtype="float16"),
}


@gpu
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_are_right_cut_and_whole(name: str) -> None:
    case = replace(LONG[name], q_lens=LONG[name].q_lens * len(LONG[name].seqused_k))
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE, guard=False)
    result = run(inputs, "hopper")
    assert_same_bits(result, run(inputs, "hopper", scheduler_metadata=metadata_of(inputs)))
    for splits in (1, 3, 40):
        run(inputs, "hopper", num_splits=splits)
    run(inputs, "hopper", batch_invariant=True)


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "deepseek-v3-mtp", "deepseek-v3-q_v", "mistral-small-4"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    first = run(inputs, "hopper")
    for _ in range(50):
        assert_same_bits(first, attend(inputs, "hopper"))


@gpu
@pytest.mark.parametrize("fault", ["zeroed", "of another batch", "of other heads"])
def test_metadata_of_another_step_gives_nan(fault: str) -> None:
    inputs = make_inputs(find_case("deepseek-v3-h16"), find_layout("M1"), DEVICE)
    metadata = metadata_of(inputs)
    if fault == "zeroed":
        metadata.zero_()
    else:
        metadata[1 if fault == "of other heads" else 2] += 16
    out, lse = attend(inputs, "hopper", scheduler_metadata=metadata)
    assert lse is not None
    assert out.isnan().all()
    assert lse.isnan().all()
    inputs.assert_untouched()


@gpu
def test_batch_invariant_bits_do_not_depend_on_neighbours() -> None:
    case = replace(find_case("row-batch-invariant"), seqused_k=(5000, 40, 2049, 65))
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    out, lse = run(inputs, "hopper")
    assert lse is not None
    kwargs = inputs.kwargs
    starts = kwargs["cu_seqlens_q"]
    for seq, begin in enumerate(itertools.accumulate((0, *case.q_lens[:-1]))):
        rows = slice(begin, begin + case.q_lens[seq])
        alone = attend(
            inputs, "hopper", q=kwargs["q"][rows], max_seqlen_q=case.q_lens[seq],
            cu_seqlens_q=starts[seq : seq + 2] - starts[seq], seqused_k=kwargs["seqused_k"][seq : seq + 1],
            block_table=kwargs["block_table"][seq : seq + 1],
        )  # fmt: skip
        assert_same_bits(alone, (out[rows], lse[:, rows]))


CAPTURES = {
    "row": (Case("graph-mla", "test", (700,) * 6, (1,) * 6, 16, 1, 576, 512, "row", 64), "M2"),
    "h32": (Case("graph-h32", "test", (700,) * 6, (1,) * 6, 32, 1, 576, 512, "row", 64), "M3"),
    "q_v": (Case("graph-q_v", "test", (700,) * 6, (2,) * 6, 16, 1, 64, 512, "q_v", 64), "M9"),
    "small": (Case("graph-64", "test", (700,) * 6, (3,) * 6, 10, 2, 96, 64, "row", 16), "M1"),
}


@gpu
@pytest.mark.parametrize("metadata", ["none", "captured", "copied"])
@pytest.mark.parametrize("name", CAPTURES)
def test_graph_replays_right_at_other_lengths(name: str, metadata: str) -> None:
    Engine(*CAPTURES[name], metadata, "hopper").replay_at_all_lengths()


@gpu
@pytest.mark.filterwarnings("default")  # warnings of torch's own about itself
@pytest.mark.parametrize("name", ["deepseek-v3-mtp", "deepseek-v3-q_v"])
def test_operator_passes_opcheck(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[-1], DEVICE, guard=False)
    with OperatorArguments() as seen:  # type: ignore[no-untyped-call]
        attend(inputs, "hopper")
    torch.library.opcheck(torch.ops.anystride.attention.default, seen.args)


@gpu
@pytest.mark.filterwarnings("default")  # warnings of torch's own about itself
def test_compiled_call_gives_the_same_bits() -> None:
    inputs = make_inputs(find_case("deepseek-v3-mtp"), find_layout("M2"), DEVICE)
    kwargs = inputs.kwargs | {"backend": "hopper"}

    def layer(q: torch.Tensor, used: torch.Tensor) -> Any:
        return flash_attn_varlen_func(**(kwargs | {"q": q * 2, "seqused_k": used}))  # doubling rounds nothing

    compiled = torch.compile(layer, fullgraph=True)
    for used in (kwargs["seqused_k"], kwargs["seqused_k"] // 2):
        assert_same_bits(compiled(kwargs["q"], used), layer(kwargs["q"], used))
    inputs.assert_untouched()


@gpu
def test_lengths_strides_and_batches_compile_nothing_new() -> None:
    def call(batch: int, layout: str, lengths: tuple[int, ...], longest: int) -> None:
        case = Case("again", "test", lengths * batch, (1,) * batch * len(lengths), 16, 1, 576, 512, "row", 64)
        run(make_inputs(case, find_layout(layout), DEVICE), "hopper", max_seqlen_k=longest)

    call(20, "M1", (300, 7, 100), 1 << 16)
    with compilations() as compiled:
        call(20, "M1", (5, 400, 0), 1 << 16)
        call(19, "M1", (300, 7, 100), 1 << 16)
        call(20, "M2", (300, 7, 100), (1 << 16) - 1000)
        call(20, "M3", (300, 7, 1), 1 << 16)
    assert compiled == []


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "deepseek-v3-q_v"])
def test_warmup_leaves_nothing_to_compile(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    warmup(
        inputs.kwargs["k"], inputs.kwargs["v"], case.num_q_heads, max_batch=64, max_seqlen_k=1 << 16,
        q_v="q_v" in inputs.kwargs, causal=case.causal, softmax_scale=case.scale,
    )  # fmt: skip
    with compilations() as compiled:
        run(inputs, "hopper")
        run(inputs, "hopper", scheduler_metadata=metadata_of(inputs))
        attend(inputs, "hopper", return_softmax_lse=False, max_seqlen_k=1 << 15)
    assert compiled == []


@gpu
def test_hopper_is_the_choice_and_triton_the_floor() -> None:
    inputs = make_inputs(find_case("deepseek-v3-h16"), find_layout("M2"), DEVICE)
    explanation = explain(**inputs.kwargs)
    assert explanation.backend == "hopper"
    assert "parts of equal cost, cut on the device" in str(explanation)
    assert_same_bits(attend(inputs, None), attend(inputs, "hopper"))
    inputs = make_inputs(find_case("llama-3-8b"), find_layout("G2"), DEVICE)
    explanation = explain(**inputs.kwargs)
    assert explanation.backend == "triton"
    assert explanation.refusals["hopper"] == ["K and V are separate; needs V in K's row, or q_v"]
    with pytest.raises(UnsupportedError, match="K and V are separate"):
        attend(inputs, "hopper")
    assert plan.AUTOMATIC[0] == "hopper"
