"""The ``hopper`` back end: what it takes and refuses, its kernels compiled, and all of it on a device.

pytest tests/test_hopper.py -m gpu -n 8
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from twins import layouts_of, packed_twin

from anystride import UnsupportedError, explain, flash_attn_varlen_func, launch, memory, plan, warmup, work
from anystride.problem import FP8_DTYPES, Problem, bucket
from anystride.testing import CASES, Case, Inputs, Layout, find_case, find_layout, make_inputs
from anystride.testing.cases import GROUPS
from anystride.testing.judgement import assert_right, attend
from anystride.testing.rows import ROW_RECIPES, TABLE_RECIPES

triton = pytest.importorskip("triton")
from compilations import compilations  # noqa: E402
from device import (  # noqa: E402
    DEVICE,
    FAULTS,
    Engine,
    OperatorArguments,
    assert_alone_is_the_same,
    assert_same_bits,
    assert_spoilt_gives_nan,
    by_tma,
    metadata_of,
    run,
)
from offline import Binary, compile_call  # noqa: E402
from test_compile import BATCH, Shape  # noqa: E402

from anystride.backends import hopper  # noqa: E402

# Triton 3.9 says at the first compilation that a default will change in 3.10.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
gpu = pytest.mark.gpu
KEPT_SCRATCH = memory.kept_scratch

ROWS_OF_TWO_BYTES = ("A-off-by-one", "A-inner-step-2", "A-dim-major", "A-blocks-innermost", "A-odd-page")
SEPARATE = ("A-same-pointer", "A-overlap", "A-gap")  # V is no part of K's row, though it looks like one
NOT_TAKEN = (*ROWS_OF_TWO_BYTES, *SEPARATE, "G15-v-dim-major")


def is_wide(case: Case) -> bool:
    """Whether the kernel for tiles of 64 rows runs it."""
    return case.group_size * (1 if case.batch_invariant else max(case.q_lens, default=1)) > hopper.NARROW_ROWS


def takes(case: Case) -> bool:
    """Whether the shapes, dtypes and features of a case are among those of these kernels."""
    if case.torch_dtype.itemsize != 2 or case.torch_kv_dtype not in (case.torch_dtype, *FP8_DTYPES):
        return False
    grouped = case.scale_caches == "groups"
    if case.form == "kv":
        return (case.d_qk, case.d_v) in hopper.HEAD_DIMS and not grouped
    if case.scale_caches and (case.form == "row" or (grouped and case.d_v % (GROUPS * 128))):
        return False
    rope = case.d_qk - (case.d_v if case.form == "row" else 0)
    wide = is_wide(case)
    return (
        case.d_v in (hopper.WIDE_LATENTS if wide else hopper.LATENTS)
        and rope in (hopper.WIDE_ROPES if wide else hopper.ROPES)
        and not case.alibi
    )


# More shapes over fp8 caches than the table has: other dimensions, rows and dtypes of products.
FP8_SHAPES: dict[str, dict[str, Any]] = {
    "gpt-oss": {}, "d-96": {}, "d-192-128": {}, "gemma-2-9b": {}, "heads-128-1": {},
    "llama-3-70b": {"q_lens": (4,) * 4, "kv_dtype": "float8_e5m2"},
    "deepseek-v3-h16": {}, "deepseek-v3-q_v": {"descales": "per_head"}, "glm-4.7-flash": {},
    "mistral-small-4": {"kv_dtype": "float8_e5m2", "dtype": "float16"}, "d-row-96-64": {},
    "deepseek-v3-mtp": {}, "kimi-k2": {"descales": "per_head"},
    "deepseek-v3-h128": {"q_lens": (2,) * 4, "kv_dtype": "float8_e5m2", "dtype": "float16"},
    "glm-5": {"descales": "floats", "window": (100, 0), "softcap": 30.0, "sinks": True},
}  # fmt: skip
AS_FP8 = [
    *(
        replace(find_case(name), **({"name": f"{name}-fp8", "kv_dtype": "float8_e4m3fn"} | changes))
        for name, changes in FP8_SHAPES.items()
    ),
    replace(
        find_case("deepseek-v3-q_v"),
        name="q_v-h128-fp8",
        num_q_heads=128,
        descales="per_head",
        kv_dtype="float8_e4m3fn",
    ),
    replace(find_case("scales-q_v-groups"), name="mixed-h128-fp8", num_q_heads=128),
    replace(find_case("scales-q_v"), name="mixed-rows-h64-fp8", num_q_heads=64, window=(40, 0)),
]
TAKEN = [case for case in (*CASES, *AS_FP8) if takes(case) and "bench" not in case.tags]


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
    "heads": (
        "llama-3-8b", {"d_qk": 80, "d_v": 80},
        "K and V are separate, of 80 and 80 dimensions; needs V in K's row, q_v, or one of "
        "((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))",
    ),
    "float32": ("deepseek-v3-h16", {"dtype": "float32"}, "q is torch.float32; needs float16 or bfloat16"),
    "many-rows": (
        "d-row-96-64", {"num_q_heads": 40},
        "V of 64 and 32 more dimensions of K, with 80 rows (query tokens x heads of a group); "
        "needs (256, 512) and (64,) of them",
    ),
    "rank": (
        "deepseek-v3-h16", {"d_qk": 448, "d_v": 384},
        "V of 384 and 64 more dimensions of K, with 16 rows (query tokens x heads of a group); "
        "needs (64, 256, 512) and (32, 64) of them",
    ),
    "rope": (
        "deepseek-v3-h16", {"d_qk": 528},
        "V of 512 and 16 more dimensions of K, with 16 rows (query tokens x heads of a group); "
        "needs (64, 256, 512) and (32, 64) of them",
    ),
    "alibi": ("deepseek-v3-h16", {"alibi": "heads"}, "alibi_slopes were given for MLA; needs None"),
    "descales": (
        "deepseek-v3-h16", {"descales": "floats"},
        "descales were given for a cache of torch.bfloat16; needs an fp8 cache, or None",
    ),
    "scales-of-groups": (
        "scales-groups", {}, "rows have 4 and 4 scales; needs one at most",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_and_features_are_refused_with_their_reason(name: str) -> None:
    case_name, changes, reason = REFUSED[name]
    case = replace(find_case(case_name), **changes)
    assert hopper.shape_refusals(problem_of(case, layouts_of(case)[0])) == [reason]


def test_two_fp8_dtypes_are_refused() -> None:
    case = replace(find_case("deepseek-v3-q_v"), kv_dtype="float8_e4m3fn")
    v = make_inputs(case, find_layout("M9"), guard=False).kwargs["v"].view(torch.float8_e5m2)
    assert hopper.shape_refusals(problem_of(case, find_layout("M9"), v=v)) == [
        "the cache is torch.float8_e4m3fn and torch.float8_e5m2; needs q's torch.bfloat16 or one fp8 dtype, "
        "or fp8 for V alone"
    ]


def test_scales_of_rows_that_k_and_v_share_are_refused() -> None:
    case = find_case("scales-row")
    assert hopper.shape_refusals(problem_of(case, layouts_of(case)[0])) == [
        "k_scale_cache was given for MLA; needs None",
        "v_scale_cache has 1 scales for 512 dimensions; needs q_v, and one of (1, 2, 4)",
    ]


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
    if hopper.row_vectors(problem)[0] == 1:
        assert "rows of the cache begin at multiples of 2 bytes" in reasons[-1]
        assert str(problem.k_strides[:4]) in reasons[-1]


@pytest.mark.parametrize("name", ["deepseek-v3-h16", "d-row-96-64", "d-q_v-2-heads", "pages-row-2x64"])
def test_all_other_layouts_are_read(name: str) -> None:
    case = find_case(name)
    for layout in layouts_of(case):
        if not layout.huge and layout.name not in NOT_TAKEN:
            problem = problem_of(case, layout)
            assert hopper.shape_refusals(problem) + hopper.stride_refusals(problem) == [], layout.name


def test_every_reason_is_told_at_once() -> None:
    case = replace(find_case("deepseek-v3-h16"), dtype="float32", alibi="heads", d_qk=568)
    problem = problem_of(case, find_layout("A-inner-step-2"))
    # dtype, dimensions, slopes; the last strides of K and of V
    assert len(hopper.shape_refusals(problem)) == 3
    assert len(hopper.stride_refusals(problem)) == 2


def test_strides_of_size_1_dimensions_do_not_matter() -> None:
    problem = problem_of(find_case("deepseek-v3-h16"), find_layout("A-absurd-strides"))
    assert hopper.stride_refusals(problem) == []


FIT: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "packed": ("deepseek-v3-h128", "M1", {}, True),
    "one layer of many": ("deepseek-v3-h128", "M2", {}, True),
    "two buffers": ("deepseek-v3-q_v", "M9", {}, True),
    "pages of blocks": ("pages-row-2x64", "M1", {}, True),
    "without a table": ("dense-row", "M1", {"d_qk": 128}, True),
    "absurd strides": ("deepseek-v3-h128", "A-absurd-strides", {}, True),
    "blocks of a quarter of a tile": ("deepseek-v3-h128", "M1", {"block_size": 16}, False),
    "blocks of no whole tiles": ("deepseek-v3-h128", "M1", {"block_size": 528}, False),
    "rope of half a box": ("d-row-96-64", "M1", {"block_size": 64}, False),
}


@pytest.mark.parametrize("name", FIT)
def test_tma_reads_what_its_maps_can_say(name: str) -> None:
    case_name, layout, changes, fits = FIT[name]
    problem = problem_of(replace(find_case(case_name), **changes), find_layout(layout))
    assert hopper.maps_fit(problem) == fits


@pytest.mark.parametrize("elements", [1, 4, 8])
def test_tma_wants_strides_and_a_base_of_16_bytes(elements: int) -> None:
    case = find_case("deepseek-v3-h128")
    inputs = make_inputs(case, find_layout("M1"), guard=False)
    k = inputs.kwargs["k"]
    flat = torch.empty(elements + k.shape[0] * (64 * 576 + elements), dtype=k.dtype)
    for offset, more in ((elements, 0), (0, elements)):
        strides = (64 * 576 + more, 576, 576, 1)
        view = flat.as_strided(k.shape, strides, offset)
        problem = problem_of(case, find_layout("M1"), k=view, v=view[..., :512])
        assert hopper.maps_fit(problem) == (elements == 8)


def test_tma_has_no_use_for_expanded_blocks() -> None:
    case = find_case("deepseek-v3-h128")
    inputs = make_inputs(case, find_layout("M1"), guard=False)
    k = inputs.kwargs["k"][:1].expand(inputs.kwargs["k"].shape)
    assert not hopper.maps_fit(problem_of(case, find_layout("M1"), k=k, v=k[..., :512]))


def test_tma_has_no_use_for_a_cache_of_no_blocks() -> None:
    case = find_case("deepseek-v3-h128")
    k = torch.empty(0, 64, 1, 576, dtype=case.torch_dtype)
    empty = torch.zeros(case.batch, dtype=torch.int32)
    problem = problem_of(case, find_layout("M1"), k=k, v=k[..., :512], seqused_k=empty)
    assert not hopper.maps_fit(problem)


def test_a_plan_keeps_no_cache_alive_and_describes_that_of_each_call() -> None:
    class Kernel:
        """Stands for a compiled kernel."""

        function, packed_metadata = 1, ()

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: self

        def run(self, *arguments: Any) -> None:
            started.append(arguments)

    started: list[tuple[Any, ...]] = []
    first, second = torch.empty(2, 2, 64, 1, 576, dtype=torch.bfloat16)
    problem = problem_of(find_case("deepseek-v3-h128"), find_layout("M1"))
    described = hopper.tensor_map(problem, "k", problem.k_strides, problem.d_qk)
    asked = launch.Launch(Kernel(), (1, 1, 1), (described, launch.Pointer("k")), {}, {})
    ready = launch.first_start(asked, dict.fromkeys(launch.SOURCES) | {"k": first})
    assert ready is not None
    assert all(value is not first for _place, _source, facts in ready.maps for value in facts.values())
    launch.run_again([ready], 7, tuple(second if name == "k" else None for name in launch.SOURCES))
    ((*_grid, stream, _function, _metadata, _none, _enter, _exit, descriptor, address),) = started
    assert stream == 7
    assert descriptor.base is second
    assert descriptor.shape == list(described.sizes)
    assert address == second.data_ptr()


def test_a_tensor_map_has_the_cache_as_it_lies() -> None:
    problem = problem_of(find_case("pages-row-2x64"), find_layout("M2"))
    page, block, token, _head, _dim = problem.k_strides
    found = hopper.tensor_map(problem, "k", problem.k_strides, problem.d_qk)
    assert found.sizes == (problem.num_pages, 2, 1, 64, problem.d_qk)
    # The stride of the one head is of no account, and must be one that could be.
    assert found.strides == (page, block, 64, token, 1)
    assert found.box == (1, 1, 1, 64, 64)


# Compiled for a device that is not here


FP8 = {"kv_dtype": "float8_e4m3fn", "descales": "per_head"}
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
    "alone": Shape("deepseek-v3-h16", "M1"),
    "few": Shape("deepseek-v3-h16", "M1"),
    "h20-alone": Shape("glm-4.7-flash", "M1"),
    "h20-few": Shape("glm-4.7-flash", "M1"),
    "d64-alone": Shape("d-row-96-64", "M1", {"num_q_heads": 16}),
    "h16-fp8": Shape("deepseek-v3-h16", "M14", FP8),
    "h8-fp8": Shape("deepseek-v3-h8", "M14", FP8),
    "h20-fp8": Shape("glm-4.7-flash", "M14", FP8),
    "h16-fp8-alone": Shape("deepseek-v3-h16", "M14", FP8),
    "q_v-fp8": Shape("deepseek-v3-q_v", "M7", FP8),
    "q_v-fp8-mixed": Shape("scales-q_v-groups", "M9"),
    "q_v-fp8-mixed-rows": Shape("scales-q_v", "M9"),
    "rank-256-fp8": Shape("mistral-small-4", "M15", FP8 | {"dtype": "float16", "kv_dtype": "float8_e5m2"}),
    "d64-fp8": Shape("d-row-96-64", "M1", FP8),
    "h64": Shape("kimi-k2", "M1"),
    "h128": Shape("deepseek-v3-h128", "M2"),
    "h128-q_v": Shape("deepseek-v3-q_v", "M9", {"num_q_heads": 128}),
    "h128-block-1": Shape("deepseek-v3-h128", "M3", {"block_size": 1}),
    "tma": Shape("deepseek-v3-h128", "M2"),
    "tma-q_v": Shape("deepseek-v3-q_v", "M9", {"num_q_heads": 128}),
    "tma-rank-256": Shape("mistral-small-4", "M15", {"num_q_heads": 128}),
    "h128-speculative": Shape("deepseek-v3-h128", "M1", {"q_lens": (2,)}),
    "h128-rank-256": Shape("mistral-small-4", "M15", {"num_q_heads": 128}),
    "h128-alone": Shape("deepseek-v3-h128", "M2"),
    "h128-fp8": Shape("deepseek-v3-h128", "M14", FP8),
    "h64-fp8": Shape("kimi-k2", "M14", FP8),
    "h128-fp8-mixed": Shape(
        "deepseek-v3-q_v",
        "M9",
        {"kv_dtype": "float8_e4m3fn", "rope_as_q": True, "scale_caches": "groups", "num_q_heads": 128},
    ),
    "h128-q_v-fp8": Shape("deepseek-v3-q_v", "M9", FP8 | {"num_q_heads": 128}),
    "h128-rank-256-fp8": Shape("mistral-small-4", "M15", FP8 | {"num_q_heads": 128}),
    "h128-few": Shape("deepseek-v3-h128", "M2"),
    "h128-rank-256-few": Shape("mistral-small-4", "M15", {"num_q_heads": 128}),
    "h128-features": Shape("deepseek-v3-h128", "M1", {"window": (200, 0), "softcap": 30.0, "sinks": True}),
    "gqa": Shape("llama-3-8b", "G2"),
    "gqa-16-rows": Shape("llama-3-70b", "G5", {"q_lens": (2,)}),
    "gqa-32-rows": Shape("llama-3-70b", "G2", {"q_lens": (4,)}),
    "gqa-64-rows": Shape("llama-3-70b", "G2", {"q_lens": (8,)}),
    "gqa-two-tiles": Shape("heads-128-1", "G2"),
    "gqa-d64": Shape("gpt-oss", "G2"),
    "gqa-d96": Shape("d-96", "G4"),
    "gqa-d192": Shape("d-192-128", "G2"),
    "gqa-d256": Shape("gemma-2-9b", "G2"),
    "gqa-d256-64-rows": Shape("gemma-2-9b", "G2", {"q_lens": (32,)}),
    "gqa-block-1": Shape("llama-3-8b", "G2", {"block_size": 1}),
    "gqa-pages": Shape("pages-4x16", "G11"),
    "gqa-alibi": Shape("llama-3-8b", "G2", {"alibi": "heads"}),
    "gqa-features": Shape(
        "llama-3-8b", "G2", {"window": (200, 0), "softcap": 30.0, "sinks": True, "q_lens": (2,)}
    ),
    "gqa-ranks": Shape("cp-2-16", "G2", {"q_lens": (1,)}),
    "gqa-splits": Shape("llama-3-8b", "G2", {"num_splits": 4}),
    "gqa-float16": Shape("llama-3-8b", "G2", {"dtype": "float16"}),
    "gqa-fp8": Shape("llama-3-8b", "G2", FP8),
    "gqa-fp8-e5m2": Shape("llama-3-8b", "G5", FP8 | {"kv_dtype": "float8_e5m2", "dtype": "float16"}),
    "gqa-fp8-16-rows": Shape("llama-3-70b", "G5", FP8 | {"q_lens": (2,)}),
    "gqa-fp8-64-rows": Shape("llama-3-70b", "G2", FP8 | {"q_lens": (8,)}),
    "gqa-fp8-d64": Shape("gpt-oss", "G2", FP8),
    "gqa-fp8-d96": Shape("d-96", "G4", FP8),
    "gqa-fp8-d192": Shape("d-192-128", "G2", FP8),
    "gqa-fp8-d256": Shape("gemma-2-9b", "G2", FP8),
    "gqa-fp8-d256-64-rows": Shape("gemma-2-9b", "G2", FP8 | {"q_lens": (32,)}),
    "gqa-fp8-alone": Shape("llama-3-8b", "G2", FP8),
    "gqa-alone": Shape("llama-3-8b", "G2"),
    "gqa-dense": Shape("dense", "G2"),
    "dense": Shape("dense-row", "M1"),
    "h128-dense": Shape("deepseek-v3-h128", "M1", {"paged": False}),
}
MANY = 80  # sequences, so many that it pays to load by TMA
FEW = {"alone": 1, "few": 12}  # so few that many parts share a unit, and combine other tiles of it
WIDE = tuple(name for name in SHAPES if name.startswith(("h64", "h128", "tma")))
GQA = tuple(name for name in SHAPES if name.startswith("gqa"))
# Too many rows for two programs to share a processor's registers, or too wide for its memory.
ALONE = (
    "gqa-32-rows", "gqa-64-rows", "gqa-two-tiles", "gqa-d256", "gqa-d256-64-rows",
    "gqa-fp8-64-rows", "gqa-fp8-d256-64-rows",
)  # fmt: skip
BY_TMA = ("tma", "tma-q_v", "tma-rank-256", "h128-speculative")
# Where nothing spills at all, not even at the ends of a unit or in the producer.
CLEAN = (
    "h16", "h8", "q_v", "block-1", "splits", "float16", "few",
    "gqa", "gqa-d64", "gqa-block-1", "gqa-splits", "gqa-float16", "gqa-alone",
)  # fmt: skip
# What ptxas keeps on the stack in the loops: that of 3.9 some addresses, that of 3.6 a counter where programs
# find their parts themselves; over fp8 caches all of them a register of the maximum that nobody needs, and
# keys where rows are many.
TRITON = int(triton.__version__.split(".")[1])
ALLOWED = {
    "h16-fp8": 4, "h16-fp8-alone": 4, "q_v-fp8": 4, "q_v-fp8-mixed": 6, "q_v-fp8-mixed-rows": 4,
    "h20-fp8": 28, "gqa-fp8-d256-64-rows": 64,
} | {
    6: {"gqa-alone": 2, "h16-fp8": 6, "q_v-fp8": 6},
    8: {"h8-fp8": 2, "h128-fp8": 4, "h64-fp8": 4, "h128-fp8-mixed": 2, "h128-q_v-fp8": 4},
    9: {
        "speculative": 4, "h20-alone": 4, "h128-features": 6, "gqa-d256-64-rows": 20,
        "h20-fp8": 22, "q_v-fp8-mixed": 17, "q_v-fp8-mixed-rows": 13, "gqa-fp8-16-rows": 2,
        "gqa-fp8-d256-64-rows": 96,
        "h128-fp8": 13, "h64-fp8": 13, "h128-fp8-mixed": 21, "h128-q_v-fp8": 15,
    },
}.get(TRITON, {})  # fmt: skip


# With --slow only: CI compiles what differs most.
SLOW = (
    "h8-fp8", "h16-fp8-alone", "q_v-fp8", "rank-256-fp8", "d64-fp8", "h64-fp8", "h128-q_v-fp8",
    "h128-rank-256-fp8", "gqa-fp8-e5m2", "gqa-fp8-16-rows", "gqa-fp8-d64", "gqa-fp8-d192",
    "gqa-fp8-d256-64-rows", "gqa-fp8-alone",
)  # fmt: skip
COMPILED = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SHAPES]


def compiled(name: str) -> list[Binary]:
    """The kernels of a shape."""
    batch = MANY if name.startswith("tma") else FEW.get(name.split("-")[-1], BATCH)
    return compile_call(SHAPES[name].kwargs(batch), "sm_90", "hopper")


def decode_kernel(name: str) -> Binary:
    """The one of them that decodes."""
    (decode,) = (binary for binary in compiled(name) if binary.kernel.startswith(("mla_", "gqa_")))
    return decode


@pytest.mark.parametrize("batch", [1, 2, 3, 12, 16, 31, 64, 200])
@pytest.mark.parametrize(
    "name",
    ["deepseek-v3-h16", "deepseek-v3-h8", "glm-4.7-flash", "deepseek-v3-h128", "llama-3-8b", "d-96"],
)
def test_what_is_combined_at_once_is_a_share_and_fits(name: str, batch: int) -> None:
    case = find_case(name)
    problem = replace(problem_of(case, layouts_of(case)[0]), batch=batch, max_keys=1 << 17)
    target = launch.Target("cuda", 90, 132, 232448)
    split = work.split_work(problem, target, hopper.programs(problem, target))
    shares, lines, dims = hopper.combine_shape(problem, split, target)
    tiles = hopper.choose_tiles(problem)
    tile_rows = tiles.m
    assert shares * lines * dims <= hopper.WARPGROUP_VALUES
    assert tile_rows % lines == 0
    assert problem.d_v % dims == 0
    assert dims % 32 == 0  # a line of memory
    most = split.parts // batch + 2  # of a unit
    if batch in (12, 16, 64):
        assert shares >= split.parts // bucket(batch), "several turns for what is read in one"
    assert shares < 4 * most
    at_once = tiles.warpgroups * most * lines * dims
    assert at_once >= tile_rows * problem.d_v / 8, "each warpgroup has many tiles to combine"


RINGS = {  # programs of a processor, tiles in the ring of each
    "gpt-oss": ((), (2, 4)),
    "llama-3-8b": ((), (2, 2)),
    "d-96": ((), (2, 2)),
    "d-192-128": ((), (2, 2)),
    "gemma-2-9b": ((), (1, 2)),
    "llama-3-70b": ((4,), (1, 4)),
    "heads-128-1": ((), (1, 8)),
}


@pytest.mark.parametrize("name", RINGS)
def test_rings_hold_64_kb_of_each_of_two_programs(name: str) -> None:
    q_lens, (programs, stages) = RINGS[name]
    case = find_case(name)
    case = replace(case, q_lens=(q_lens or case.q_lens[:1]) * case.batch)
    tiles = hopper.choose_tiles(problem_of(case, layouts_of(case)[0]))
    assert (tiles.programs, tiles.stages) == (programs, stages)
    assert tiles.warpgroups == 1


def test_who_combines() -> None:
    target = launch.Target("cuda", 90, 132, 232448)
    case = find_case("deepseek-v3-h16")
    problem = problem_of(case, layouts_of(case)[0])
    assert hopper.config_for(problem, target).constants["SHARES"] > 0
    for change in ({"num_splits": 3}, {"batch_invariant": True}, {"max_seqlen_q": 200}):
        # Parts that count no arrivals, and more programs than run at once.
        assert hopper.config_for(replace(problem, **change), target).constants["SHARES"] == 0, change


def test_few_sequences_need_no_schedule() -> None:
    target = launch.Target("cuda", 90, 132, 232448)
    for name in ("deepseek-v3-h16", "deepseek-v3-h128", "llama-3-8b"):
        case = find_case(name)
        problem = problem_of(case, layouts_of(case)[0])
        for batch, sequences in ((1, 1), (3, 4), (8, 8), (9, 0)):
            config = hopper.config_for(replace(problem, batch=batch), target)
            assert config.constants["SEQUENCES"] == sequences
            # Two launches need scratch of their own, and a graph may run beside whatever uses what is kept.
            assert (config.captured is not None) == (sequences > 0)
            if config.captured is not None:
                assert config.captured.constants["SEQUENCES"] == 0
                assert config.captured.captured is None
        given = replace(problem, metadata_words=16 * (config.split.parts + 1))
        assert hopper.config_for(given, target).constants["SEQUENCES"] == 0
        assert hopper.config_for(given, target).captured is not None
        for change in (
            {"num_splits": 3},
            {"batch_invariant": True},
            {"max_seqlen_q": 200},
            {"max_keys": 1 << 31},  # 32 bits do not hold its costs
        ):
            config = hopper.config_for(replace(problem, **change), target)
            assert config.constants["SEQUENCES"] == 0, change
            assert config.captured is None, change


def main_loops(sass: str, consumers: int) -> list[str]:
    """Instructions of the innermost loops with products: those over tiles, one of each consumer."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/(.*)", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in found]
    products = [address for address, text in code if "HGMMA" in text]
    loops = set()
    for address, text in code:
        branch = re.search(r"@.* BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)  # back from where a wait spins: no @
        if branch and any(int(branch[1], 16) <= product <= address for product in products):
            loops.add((int(branch[1], 16), address))
    inner = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    assert len(inner) == consumers, "a loop for each warpgroup that computes"
    return [text for address, text in code if any(begin <= address <= end for begin, end in inner)]


def spills(lines: list[str]) -> int:
    """Accesses to the stack."""
    return sum(re.search(r"\b(LDL|STL)\b", line) is not None for line in lines)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_and_fits(name: str) -> None:
    binaries = compiled(name)
    names = [binary.kernel for binary in binaries]
    decode = decode_kernel(name)
    # Parts that the schedule did not make count no arrivals: a launch of its own combines them. Few sequences
    # need no schedule.
    others = {"combine_kernel"} if name.endswith("splits") else {"schedule_kernel"}
    assert {*names} == {decode.kernel} | (set() if name.endswith("alone") else others)
    fp8 = "_fp8" if "fp8" in name else ""
    kernel = f"mla_wide{fp8}_kernel" if name in WIDE else f"mla_narrow{fp8}_kernel"
    if name in GQA:
        kernel = "gqa_kernel"
    assert decode.kernel == kernel
    two = name in GQA and name not in ALONE  # programs on a processor; 1 KB of each is the system's
    assert decode.shared_bytes <= (113 << 10 if two else 232448)
    assert (".maxnreg 128" in decode.assembly) == two
    assert "wgmma.mma_async" in decode.assembly
    assert ("cp.async.bulk.tensor.5d" in decode.assembly) == (name in BY_TMA)
    assert decode.assembly.count("setmaxnreg") >= 4, "the registers asked for were not granted"


def test_the_combine_kernel_waits_even_if_nothing_was_cut() -> None:
    assembly = compiled("splits")[-1].assembly
    first_wait = assembly.index("griddepcontrol.wait")
    assert first_wait < assembly.index("ld.global"), "a program may leave before it has waited"
    assert assembly.count("griddepcontrol.wait") == 2  # the second: for those who combine


@pytest.mark.parametrize("name", COMPILED)
def test_nothing_is_spilled_where_it_matters(name: str) -> None:
    decode = decode_kernel(name)
    loops = main_loops(decode.sass, 1 if name in GQA else 2)
    assert sum("HGMMA" in line for line in loops) >= (8 if name in GQA else 10)
    assert spills(loops) <= ALLOWED.get(name, 0), "spilled in a main loop"
    if name in CLEAN and name not in ALLOWED and TRITON < 9:
        assert decode.spilled_bytes == 0


@pytest.mark.parametrize("elements", [4, 2])
@pytest.mark.parametrize("name", ["h16", "speculative", "h128"])
def test_compiles_for_rows_of_8_and_of_4_bytes(name: str, elements: int) -> None:
    kwargs = SHAPES[name].kwargs()
    k = kwargs["k"]
    flat = torch.empty(elements + k.shape[0] * (64 * 576 + elements), dtype=k.dtype)
    k = flat.as_strided(k.shape, (64 * 576 + elements, 576, 576, 1), elements)
    decode = compile_call(kwargs | {"k": k, "v": k[..., :512]}, "sm_90", "hopper")[-1]
    assert "cp.async.ca.shared.global [ %r" in decode.assembly
    assert f", 0x{2 * elements:x}" in decode.assembly
    assert spills(main_loops(decode.sass, 2)) <= ALLOWED.get(name, 0)


# On a device


@gpu
@pytest.mark.parametrize(("case", "layout"), list(meetings()))
def test_case_in_layout_is_right_and_its_bits_are_those_of_packed(case: Case, layout: Layout) -> None:
    for rank in range(case.cp.world_size if case.cp else 1):
        inputs = make_inputs(case, layout, DEVICE, rank=rank)
        if layout.name in NOT_TAKEN and "hopper" in explain(**inputs.kwargs).refusals:
            with pytest.raises(UnsupportedError):
                attend(inputs, "hopper")
            assert_same_bits(attend(inputs, None), run(inputs, "triton"))  # the floor runs it
            continue
        result = run(inputs, "hopper")
        twin = packed_twin(inputs, DEVICE)
        if twin is not None:
            assert_same_bits(result, run(twin, "hopper"))


@gpu
@pytest.mark.parametrize(("case", "layout"), [x for x in meetings() if is_wide(x.values[0])])
def test_tma_changes_no_bit(case: Case, layout: Layout) -> None:
    inputs = make_inputs(case, layout, DEVICE)
    if layout.name in NOT_TAKEN:
        pytest.skip("refused")
    with by_tma():
        result = run(inputs, "hopper")
    assert_same_bits(result, attend(inputs, "hopper"))


@gpu
@pytest.mark.parametrize("exponent", [60, 20, -20, -60])
@pytest.mark.parametrize(
    "name", ["deepseek-v3-h16-fp8", "deepseek-v3-q_v-fp8", "kimi-k2-fp8", "gpt-oss-fp8", "d-96-fp8"]
)
def test_queries_beyond_float16_change_no_bit(name: str, exponent: int) -> None:
    (case,) = (x for x in AS_FP8 if x.name == name)
    case = replace(case, softmax_scale=0.1, sinks=False, window=(-1, -1))
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    power = 2.0**exponent
    queries = {x: y * power for x in ("q", "q_v") if (y := inputs.kwargs.get(x)) is not None}
    others = attend(inputs, "hopper", **queries, softmax_scale=0.1 / power)
    assert_same_bits(run(inputs, "hopper"), others)


@gpu
@pytest.mark.parametrize("rows", ROW_RECIPES)
@pytest.mark.parametrize("name", ["deepseek-v3-mtp", "deepseek-v3-q_v", "d-96", "gpt-oss"])
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
    "h64": Case("long-h64", "test", (8192, 5000, 64, 0, 20000), (1,), 64, 1, 576, 512, "row", 64),
    "h128": Case("long-h128", "test", (9000, 129, 40000, 63), (1,), 128, 1, 576, 512, "row", 48),
    "h128-tokens": Case("long-h128-q", "test", (9000, 129, 63), (2,), 128, 1, 576, 512, "row", 64),
    "h40": Case("long-h40", "test", (3000, 1, 70000), (1,), 40, 1, 576, 512, "row", 16),
    "h128-q_v": Case("long-h128-q_v", "test", (9000, 129, 4000), (1,), 128, 1, 64, 512, "q_v", 64),
    "h128-window": Case(
        "long-h128-w", "test", (9000, 129, 400), (3,), 64, 1, 576, 512, "row", 64, window=(700, 0)
    ),
    "h128-sinks": Case(
        "long-h128-s", "test", (9000, 129, 0), (1,), 128, 1, 576, 512, "row", 64, sinks=True, softcap=20.0
    ),
    "rank-256": Case("long-256", "test", (9000, 129, 0), (3,), 32, 1, 320, 256, "row", 64, dtype="float16"),
    "prefill": Case("long-prefill", "test", (900, 300, 77), (200,), 16, 1, 576, 512, "row", 64),
    "float16": Case("long-half", "test", (9000, 129), (1,), 16, 1, 576, 512, "row", 64, dtype="float16"),
    "h16-fp8": Case(
        "long-h16-fp8",
        "test",
        (8192, 5000, 64, 0, 20000),
        (1,),
        16,
        1,
        576,
        512,
        "row",
        64,
        kv_dtype="float8_e4m3fn",
        descales="per_head",
    ),
    "h32-fp8": Case(
        "long-h32-fp8",
        "test",
        (9000, 129, 40000, 63),
        (1,),
        32,
        1,
        576,
        512,
        "row",
        528,
        kv_dtype="float8_e5m2",
    ),
    "q_v-fp8": Case(
        "long-q_v-fp8",
        "test",
        (9000, 129, 4000),
        (2,),
        16,
        1,
        64,
        512,
        "q_v",
        48,
        kv_dtype="float8_e4m3fn",
        scale_caches="groups",
        rope_as_q=True,
        window=(700, 0),
        sinks=True,
    ),
    "gqa-fp8": Case(
        "long-gqa-fp8",
        "test",
        (8192, 5000, 64, 0, 20000),
        (1,),
        32,
        8,
        128,
        128,
        block_size=64,
        kv_dtype="float8_e4m3fn",
        scale_caches="rows",
        descales="scalar",
    ),
    "gqa-fp8-d256": Case(
        "long-gqa-fp8-d256",
        "test",
        (9000, 129, 40000, 63),
        (2,),
        16,
        4,
        256,
        256,
        block_size=16,
        kv_dtype="float8_e4m3fn",
        window=(700, 0),
        softcap=20.0,
    ),
    "gqa": Case("long-gqa", "test", (8192, 5000, 64, 0, 20000), (1,), 32, 8, 128, 128, block_size=64),
    "gqa-tokens": Case("long-gqa-q", "test", (9000, 129, 40000, 63), (8,), 16, 2, 128, 128, block_size=16),
    "gqa-window": Case(
        "long-gqa-w", "test", (9000, 129, 400), (2,), 64, 8, 64, 64, window=(127, 0), sinks=True
    ),
    "gqa-alibi": Case("long-gqa-a", "test", (3000, 129), (3,), 8, 2, 96, 96, block_size=48, alibi="heads"),
    "gqa-softcap": Case("long-gqa-s", "test", (9000, 129), (1,), 16, 8, 256, 256, softcap=50.0),
    "gqa-d192": Case("long-gqa-192", "test", (9000, 129, 4000), (1,), 4, 4, 192, 128, block_size=528),
    "gqa-one-head": Case("long-mqa", "test", (9000, 129, 70000, 1), (1,), 8, 1, 128, 128, block_size=16),
    "gqa-mha": Case("long-mha", "test", (3000, 129, 63), (1,), 32, 32, 128, 128, block_size=16),
    "gqa-d256-tokens": Case("long-gqa-256", "test", (3000, 129), (32,), 4, 2, 256, 256, block_size=64),
    "gqa-prefill": Case("long-gqa-p", "test", (900, 300, 77), (77,), 16, 4, 128, 128, dtype="float16"),
}


@gpu
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_are_right_cut_and_whole(name: str) -> None:
    case = replace(LONG[name], q_lens=LONG[name].q_lens * len(LONG[name].seqused_k))
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE, guard=False)
    result = run(inputs, "hopper")
    shared = run(inputs, "hopper", scheduler_metadata=metadata_of(inputs))
    if case.form == "kv" or case.num_kv_heads == 1:  # else nobody would know this for MLA before the call
        assert_same_bits(result, shared)
    for splits in (1, 3, 40):
        run(inputs, "hopper", num_splits=splits)
    run(inputs, "hopper", batch_invariant=True)


@gpu
@pytest.mark.parametrize(
    "name", ["deepseek-v3-h16", "deepseek-v3-mtp", "deepseek-v3-q_v", "deepseek-v3-h128", "llama-3-8b"]
)
def test_every_run_gives_the_same_bits(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    first = run(inputs, "hopper")
    for _ in range(50):
        assert_same_bits(first, attend(inputs, "hopper"))


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "d-96"])
@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_of_another_step_gives_nan(fault: str, name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE)
    assert_spoilt_gives_nan(inputs, fault, "hopper")


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "deepseek-v3-mtp", "deepseek-v3-h128", "llama-3-8b"])
def test_a_schedule_is_left_as_it_was(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[1], DEVICE)
    metadata = metadata_of(inputs)
    before = metadata.clone()
    for _ in range(3):
        run(inputs, "hopper", scheduler_metadata=metadata)
        assert torch.equal(metadata, before)


@gpu
@pytest.mark.parametrize("name", ["h16", "h128", "gqa"])
def test_nobody_waits_for_ever_under_a_schedule_for_other_lengths(name: str) -> None:
    case = replace(LONG[name], q_lens=LONG[name].q_lens * len(LONG[name].seqused_k))
    inputs = make_inputs(case, layouts_of(case)[0], DEVICE, guard=False)
    right = run(inputs, "hopper")
    real = case.seqused_k
    # Shorter ones only: what a table says behind a sequence's end may be anything.
    for lengths in ([min(1, n) for n in real], [0] * len(real), [n // 2 for n in real], [real[0]]):
        lengths += [0] * (case.batch - len(lengths))
        other = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        attend(inputs, "hopper", scheduler_metadata=metadata_of(inputs, seqused_k=other))
    torch.cuda.synchronize()
    assert_same_bits(right, attend(inputs, "hopper"))


FEW_SEQUENCES = {
    "narrow": Case("few-narrow", "test", (1,), (1,), 16, 1, 576, 512, "row", 64),
    "wide": Case("few-wide", "test", (1,), (1,), 128, 1, 576, 512, "row", 64),
    "gqa": Case("few-gqa", "test", (1,), (1,), 32, 8, 128, 128, block_size=16),
    "window": Case("few-window", "test", (1,), (1,), 64, 8, 64, 64, window=(127, 0), sinks=True),
}


@gpu
@pytest.mark.parametrize("name", FEW_SEQUENCES)
def test_parts_that_programs_find_give_the_bits_of_a_schedule(name: str) -> None:
    source = random.Random(0)
    for batch in (1, 2, 3, 5, 7, 8):
        lengths = [source.choice((0, 1, 64, 700, 5000, source.randint(1, 9000))) for _ in range(batch)]
        case = replace(FEW_SEQUENCES[name], seqused_k=tuple(lengths), q_lens=(1,) * batch)
        inputs = make_inputs(case, layouts_of(case)[0], DEVICE, guard=False)
        assert_same_bits(run(inputs, "hopper"), run(inputs, "hopper", scheduler_metadata=metadata_of(inputs)))


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "llama-3-8b"])
def test_threads_may_share_a_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the poison: a launch is then the first thing that a new thread asks of the device.
    monkeypatch.setattr(memory, "kept_scratch", KEPT_SCRATCH)
    case = find_case(name)
    work = []
    for lengths in (case.seqused_k, case.seqused_k[::-1]):
        inputs = make_inputs(replace(case, seqused_k=lengths), layouts_of(case)[0], DEVICE)
        right, _lse = run(inputs, "hopper")
        outs = [[torch.zeros_like(right) for _ in range(20)] for _ in range(4)]
        attend(inputs, "hopper", out=outs[0][0], return_softmax_lse=False)  # compiles
        work.append((inputs, right, outs))
    torch.cuda.synchronize()

    def calls(inputs: Inputs, outs: list[torch.Tensor]) -> None:
        for out in outs:
            attend(inputs, "hopper", out=out, return_softmax_lse=False)

    with ThreadPoolExecutor(8) as pool:
        started = [pool.submit(calls, inputs, some) for inputs, _right, outs in work for some in outs]
    for future in started:
        future.result()
    for _inputs, right, outs in work:
        assert all(torch.equal(out, right) for some in outs for out in some)


@gpu
@pytest.mark.parametrize("name", ["row", "gqa"])
def test_a_graph_may_run_beside_calls(name: str) -> None:
    engine = Engine(*CAPTURES[name], "none", "hopper")
    inputs = make_inputs(engine.inputs.case, find_layout(CAPTURES[name][1]), DEVICE)
    right = run(inputs, "hopper")
    beside = torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        with torch.cuda.stream(beside):
            engine.graph.replay()
        results.append(attend(inputs, "hopper"))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(right, result)
    assert_right(engine.inputs, *engine.result)


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "llama-3-8b"])
def test_two_streams_with_schedules_of_their_own_do_not_disturb_each_other(name: str) -> None:
    case = find_case(name)
    inputs = make_inputs(case, layouts_of(case)[1], DEVICE)
    right = run(inputs, "hopper")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(attend(inputs, "hopper"))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(right, result)


@gpu
@pytest.mark.parametrize("name", ["row-batch-invariant", "batch-invariant"])
def test_batch_invariant_bits_do_not_depend_on_neighbours(name: str) -> None:
    assert_alone_is_the_same(name, "hopper")


CAPTURES = {
    "row": (Case("graph-mla", "test", (700,) * 6, (1,) * 6, 16, 1, 576, 512, "row", 64), "M2"),
    "h128": (Case("graph-h128", "test", (700,) * 6, (1,) * 6, 128, 1, 576, 512, "row", 64), "M2"),
    "h32": (Case("graph-h32", "test", (700,) * 6, (1,) * 6, 32, 1, 576, 512, "row", 64), "M3"),
    "q_v": (Case("graph-q_v", "test", (700,) * 6, (2,) * 6, 16, 1, 64, 512, "q_v", 64), "M9"),
    "small": (Case("graph-64", "test", (700,) * 6, (3,) * 6, 10, 2, 96, 64, "row", 16), "M1"),
    "gqa": (Case("graph-gqa", "test", (700,) * 6, (1,) * 6, 32, 8, 128, 128, block_size=16), "G4"),
    "gqa-d64": (Case("graph-gqa-64", "test", (700,) * 6, (3,) * 6, 12, 2, 64, 64, sinks=True), "G2"),
}


@gpu
@pytest.mark.parametrize("metadata", ["none", "captured", "copied"])
@pytest.mark.parametrize("name", CAPTURES)
def test_graph_replays_right_at_other_lengths(name: str, metadata: str) -> None:
    Engine(*CAPTURES[name], metadata, "hopper").replay_at_all_lengths()


@gpu
@pytest.mark.filterwarnings("default")  # warnings of torch's own about itself
@pytest.mark.parametrize("name", ["deepseek-v3-mtp", "deepseek-v3-q_v", "llama-3-8b"])
def test_operator_passes_opcheck(name: str) -> None:
    case = find_case(name)
    layout = find_layout({"row": "M2", "q_v": "M7", "kv": "G2"}[case.form])
    inputs = make_inputs(case, layout, DEVICE, guard=False)
    with OperatorArguments() as seen:  # type: ignore[no-untyped-call]
        # Not by name: opcheck copies K and V apart, and then they are no longer one row.
        attend(inputs, None)
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
@pytest.mark.parametrize("form", ["row", "kv"])
def test_lengths_strides_and_batches_compile_nothing_new(form: str) -> None:
    cases = {
        "row": Case("again", "test", (1,), (1,), 16, 1, 576, 512, "row", 64),
        "kv": Case("again", "test", (1,), (1,), 8, 2, 128, 128, block_size=64),
    }
    packed, layer, other = ("M1", "M2", "M3") if form == "row" else ("G16", "G4", "G2")

    def call(batch: int, layout: str, lengths: tuple[int, ...], longest: int) -> None:
        case = replace(cases[form], seqused_k=lengths * batch, q_lens=(1,) * batch * len(lengths))
        run(make_inputs(case, find_layout(layout), DEVICE), "hopper", max_seqlen_k=longest)

    call(20, packed, (300, 7, 100), 1 << 16)
    with compilations() as compiled:
        call(20, packed, (5, 400, 0), 1 << 16)
        call(19, packed, (300, 7, 100), 1 << 16)
        call(20, layer, (300, 7, 100), (1 << 16) - 1000)
        call(20, other, (300, 7, 1), 1 << 16)
    assert compiled == []


@gpu
@pytest.mark.parametrize("name", ["deepseek-v3-h16", "deepseek-v3-q_v", "llama-3-8b"])
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
    assert explain(**inputs.kwargs).backend == "hopper"
    inputs = make_inputs(find_case("d-80"), find_layout("G2"), DEVICE)
    explanation = explain(**inputs.kwargs)
    assert explanation.backend == "triton"
    (reason,) = explanation.refusals["hopper"]
    assert reason.startswith("K and V are separate, of 80 and 80 dimensions")
    with pytest.raises(UnsupportedError, match="K and V are separate"):
        attend(inputs, "hopper")
    assert plan.AUTOMATIC[0] == "hopper"
