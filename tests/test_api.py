"""The promises of the entry, one by one, on the back ends that need no GPU."""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import anystride
from anystride import flash_attn_varlen_func, get_scheduler_metadata
from anystride.testing import Case, Inputs, find_case, find_layout, make_inputs
from anystride.testing.judgement import assert_close_as_plain, assert_right, attend, plain, reference
from anystride.testing.rows import GARBAGE, ROW_RECIPES, TABLE_RECIPES

BACKENDS = ("cpu", "reference")
both_backends = pytest.mark.parametrize("backend", BACKENDS)

INF = float("inf")
INTERLEAVED, MLA_ROW, TWO_BUFFERS = find_layout("G2"), find_layout("M2"), find_layout("M9")
GQA, ROW, SPLIT = find_case("tiny-gqa"), find_case("tiny-row"), find_case("tiny-q_v")
KINDS = [(GQA, INTERLEAVED), (ROW, MLA_ROW), (SPLIT, TWO_BUFFERS)]
every_kind = pytest.mark.parametrize(("case", "layout"), KINDS, ids=lambda x: x.name)


def assert_same_bits(left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


# The signature


def test_the_arguments_are_those_of_vllm_in_order_and_default() -> None:
    parameters = inspect.signature(flash_attn_varlen_func).parameters.values()
    empty = inspect.Parameter.empty
    wanted = {
        "q": empty, "k": empty, "v": empty, "max_seqlen_q": empty, "cu_seqlens_q": empty,
        "max_seqlen_k": empty, "cu_seqlens_k": None, "seqused_k": None, "q_v": None, "dropout_p": 0.0,
        "softmax_scale": None, "causal": False, "window_size": None, "softcap": 0.0, "alibi_slopes": None,
        "deterministic": False, "return_attn_probs": False, "block_table": None, "return_softmax_lse": False,
        "out": None, "scheduler_metadata": None, "q_descale": None, "k_descale": None, "v_descale": None,
        "num_splits": 0, "fa_version": None, "s_aux": None, "cp_world_size": 1, "cp_rank": 0,
        "cp_tot_seqused_k": None,
    }  # fmt: skip
    by_place = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    by_name = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert list(by_place.items()) == list(wanted.items())
    own = {"cp_interleave": 1, "batch_invariant": False, "k_scale_cache": None, "v_scale_cache": None}
    assert by_name == own | {"backend": None}


def test_the_package_exports_what_it_says() -> None:
    for name in anystride.__all__:
        assert hasattr(anystride, name), name


@both_backends
def test_a_call_returns_out_and_with_lse_a_pair(backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    arguments = inputs.kwargs | {"backend": backend}
    alone = flash_attn_varlen_func(**arguments | {"return_softmax_lse": False})
    pair = flash_attn_varlen_func(**arguments | {"return_softmax_lse": True})
    assert isinstance(alone, Tensor)
    assert isinstance(pair, tuple)
    out, lse = pair
    q = inputs.kwargs["q"]
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[1::-1], torch.float32)
    assert torch.equal(alone, out)


# 1. Strides are data


@both_backends
@every_kind
@pytest.mark.parametrize("recipe", [name for name in ROW_RECIPES if name != "packed"])
def test_any_strides_of_q_and_q_v(case: Case, layout: Any, recipe: str, backend: str) -> None:
    packed = attend(make_inputs(case, layout), backend)
    inputs = make_inputs(case, layout, rows=recipe)
    strides = make_inputs(case, layout).kwargs["q"].stride()
    assert recipe == "off_by_one" or inputs.kwargs["q"].stride() != strides
    assert_same_bits(attend(inputs, backend), packed)


@both_backends
@every_kind
@pytest.mark.parametrize("recipe", ROW_RECIPES)
def test_out_is_written_in_place_whatever_its_strides(
    case: Case, layout: Any, recipe: str, backend: str
) -> None:
    inputs = make_inputs(case, layout, out=recipe)
    before = inputs.kwargs["out"].stride()
    out, lse = attend(inputs, backend)
    assert out is inputs.kwargs["out"]
    assert out.stride() == before
    inputs.assert_untouched()  # nothing around it
    assert_same_bits((out, lse), attend(make_inputs(case, layout), backend))


@both_backends
@pytest.mark.parametrize("recipe", [name for name in TABLE_RECIPES if name != "packed"])
def test_any_strides_of_the_block_table(recipe: str, backend: str) -> None:
    inputs, packed = make_inputs(GQA, INTERLEAVED, table=recipe), make_inputs(GQA, INTERLEAVED)
    assert inputs.kwargs["block_table"].stride() != packed.kwargs["block_table"].stride()
    assert_same_bits(attend(inputs, backend), attend(packed, backend))


@both_backends
def test_a_table_that_all_sequences_share_by_stride_0(backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    row = inputs.kwargs["block_table"][2]  # of the longest sequence: it covers the others
    results = [
        attend(inputs, backend, block_table=table)
        for table in (row.expand(3, -1), row.expand(3, -1).contiguous())
    ]
    assert_same_bits(*results)
    assert not torch.equal(results[0][0], attend(inputs, backend)[0])


@both_backends
def test_vectors_need_not_be_packed_either(backend: str) -> None:
    case = replace(find_case("tiny-all-features"), num_splits=0)
    inputs = make_inputs(case, INTERLEAVED)
    strided = {}
    for name, value in inputs.kwargs.items():
        if isinstance(value, Tensor) and name in ("cu_seqlens_q", "seqused_k", "s_aux", "alibi_slopes"):
            wide = torch.full((*value.shape, 2), GARBAGE[0], dtype=value.dtype)
            wide[..., 1] = value
            strided[name] = wide[..., 1]
    assert len(strided) == 4
    assert_same_bits(attend(inputs, backend, **strided), attend(inputs, backend))


@both_backends
def test_query_heads_may_be_one_by_stride_0(backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    head = inputs.kwargs["q"][:, :1]
    one, four = head.expand(-1, 4, -1), head.repeat(1, 4, 1)
    assert_same_bits(attend(inputs, backend, q=one), attend(inputs, backend, q=four))


@both_backends
def test_sequences_may_share_blocks(backend: str) -> None:
    # Prefix caching: both sequences begin with the same blocks.
    case = Case("shared", "prefix caching", (20, 31), (1, 1), 4, 2, 16, 16, block_size=8, causal=True)
    inputs = make_inputs(case, INTERLEAVED)
    table = inputs.kwargs["block_table"]
    table[0, :2] = table[1, :2]
    table[0, 2] = table[1, 3]
    own = inputs.kwargs | {"seqused_k": torch.tensor([20, 31], dtype=torch.int32)}
    out = attend(inputs, backend, **own)[0]
    # The first sequence alone, from a cache in which nobody shares.
    k, v = (inputs.kwargs[name][table[0, :3].long()].clone() for name in "kv")
    alone = own | {
        "q": own["q"][:1], "k": k, "v": v, "cu_seqlens_q": own["cu_seqlens_q"][:2],
        "seqused_k": own["seqused_k"][:1], "block_table": torch.arange(3, dtype=torch.int32)[None],
    }  # fmt: skip
    right = flash_attn_varlen_func(**alone | {"backend": "reference", "return_softmax_lse": False})
    assert isinstance(right, Tensor)
    torch.testing.assert_close(out[:1], right, rtol=2**-6, atol=2**-6)
    assert not out.isnan().any()


def peak_bytes(inputs: Inputs, backend: str) -> int:
    """The most that is allocated at once during a call, ``out`` and ``lse`` included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    attend(inputs, backend)  # plans and whatever else happens once
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        attend(inputs, backend)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def long_case(tokens: int, **change: Any) -> Case:
    plain_case = Case(
        f"long-{tokens}", "memory", (tokens, 100), (1, 2), 8, 8, 128, 128, block_size=16, causal=True
    )
    return replace(plain_case, **change)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (long_case(16384), "G5"),
        (long_case(16384), "A-inner-step-2"),
        (long_case(32768, kv_dtype="float8_e4m3fn"), "G3"),
        (long_case(62000, num_kv_heads=1, d_qk=576, d_v=512, form="row", block_size=64), "M2"),
        (long_case(62000, num_kv_heads=1, d_qk=64, d_v=512, form="q_v", block_size=64), "M9"),
        (long_case(16384, paged=False), "A-inner-step-2"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_cache_is_never_copied(case: Case, layout: str) -> None:
    inputs = make_inputs(case, find_layout(layout), layers=1, guard=False)
    held = sum(flat.numel() * flat.itemsize for flat in inputs.storage.buffers)
    assert held >= 64 * 2**20  # otherwise the bound says nothing
    assert 0 < peak_bytes(inputs, "cpu") <= 64 * 2**20


def test_memory_in_use_is_seen_by_the_test_above() -> None:
    inputs = make_inputs(long_case(4096), INTERLEAVED, layers=1, guard=False)
    # The reference gathers a sequence in float64, which is four times as much.
    assert peak_bytes(inputs, "reference") > 4 * 2 * 4096 * 8 * 128


@both_backends
@every_kind
def test_the_cache_is_only_read(case: Case, layout: Any, backend: str) -> None:
    inputs = make_inputs(case, layout)
    copies = {name: t.clone() for name, t in inputs.kwargs.items() if isinstance(t, Tensor)}
    attend(inputs, backend)
    inputs.assert_untouched()
    for name, before in copies.items():
        after = inputs.kwargs[name]
        assert torch.equal(before.nan_to_num(7), after.nan_to_num(7)), name


# 3. Nothing outside the valid tokens matters


@both_backends
@every_kind
@pytest.mark.parametrize("poison", [float("nan"), INF, -INF, 3e38])
def test_what_lies_around_the_valid_tokens_changes_no_bit(
    case: Case, layout: Any, poison: float, backend: str
) -> None:
    zeros, poisoned = (make_inputs(case, layout) for _ in range(2))
    for inputs, filler in ((zeros, 0.0), (poisoned, poison)):
        for flat in inputs.storage.buffers:
            flat.masked_fill_(flat.isnan(), filler)
        table = inputs.kwargs["block_table"]
        # The entries past the end: a block that holds poison, or no block at all.
        inside = filler == 0.0
        table[(table < 0) | (table > 1000)] = 0 if inside else GARBAGE[0]
    assert_same_bits(attend(zeros, backend), attend(poisoned, backend))


@both_backends
@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_keys_that_a_mask_hides_may_be_poison(poison: float, backend: str) -> None:
    # Two queries at tokens 10 and 11 see tokens 6 to 11. Tokens 0 to 5 are out of the window of both.
    case = Case("hidden", "window", (12,), (2,), 4, 2, 16, 16, block_size=4, window=(4, 0))
    clean, dirty = (make_inputs(case, INTERLEAVED) for _ in range(2))
    table = dirty.kwargs["block_table"]
    for cache in (dirty.kwargs["k"], dirty.kwargs["v"]):
        cache[int(table[0, 0])] = poison
        cache[int(table[0, 1]), :2] = poison
    assert_same_bits(attend(clean, backend), attend(dirty, backend))


# 4. Empty rows are defined


@both_backends
@pytest.mark.parametrize("sinks", [False, True])
@every_kind
def test_rows_without_a_visible_key_are_zero_and_minus_infinity(
    case: Case, layout: Any, sinks: bool, backend: str
) -> None:
    # Empty, more queries than keys, and neither.
    case = replace(case, seqused_k=(0, 2, 9), q_lens=(2, 4, 1), sinks=sinks)
    out, lse = attend(make_inputs(case, layout), backend)
    assert lse is not None
    empty = torch.tensor([True, True, True, True, False, False, False])
    assert out[empty].eq(0).all()
    assert lse[:, empty].eq(-INF).all()
    assert out[~empty].ne(0).any(-1).all()
    assert lse[:, ~empty].isfinite().all()


@both_backends
def test_a_window_that_ends_before_the_first_key_leaves_an_empty_row(backend: str) -> None:
    case = Case("off", "window", (3,), (5,), 4, 2, 16, 16, block_size=8, causal=False, window=(-1, 0))
    out, lse = attend(make_inputs(case, INTERLEAVED), backend)
    assert lse is not None
    assert lse[:, :2].eq(-INF).all()
    assert out[:2].eq(0).all()
    assert lse[:, 2:].isfinite().all()


@both_backends
def test_every_sequence_may_be_empty_and_the_cache_too(backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    none: dict[str, Any] = {"seqused_k": torch.zeros(3, dtype=torch.int32)}
    none["block_table"] = torch.empty(3, 0, dtype=torch.int32)
    none |= {"k": inputs.kwargs["k"][:0], "v": inputs.kwargs["v"][:0], "max_seqlen_k": 0}
    out, lse = attend(inputs, backend, **none)
    assert lse is not None
    assert out.eq(0).all()
    assert lse.eq(-INF).all()


@both_backends
def test_no_query_and_no_sequence(backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    starts = torch.zeros(4, dtype=torch.int32)
    out, lse = attend(inputs, backend, q=inputs.kwargs["q"][:0], cu_seqlens_q=starts)
    assert lse is not None
    assert (out.shape, lse.shape) == ((0, 4, 16), (4, 0))
    nobody = {"cu_seqlens_q": torch.zeros(1, dtype=torch.int32), "seqused_k": inputs.kwargs["seqused_k"][:0]}
    nobody |= {"block_table": inputs.kwargs["block_table"][:0], "q": inputs.kwargs["q"][:0]}
    assert attend(inputs, backend, **nobody)[0].shape == (0, 4, 16)


@both_backends
def test_rows_of_no_sequence_are_left_unwritten(backend: str) -> None:
    case = replace(GQA, padded_q=3)
    inputs = make_inputs(case, INTERLEAVED, out="padded_rows")
    inputs.kwargs["out"][case.total_q :] = 7.0  # assert_untouched looks for NaN there
    out, _ = attend(inputs, backend)
    assert out[case.total_q :].eq(7.0).all()
    assert not out[: case.total_q].eq(7.0).any()
    assert not out[: case.total_q].isnan().any()


@both_backends
def test_padded_sequences_of_a_graph_have_no_row(backend: str) -> None:
    # As engines pad a batch: the last entries of cu_seqlens_q repeat, lengths are 0, the table is garbage.
    inputs = make_inputs(GQA, INTERLEAVED)
    a = inputs.kwargs
    garbage = torch.full((2, a["block_table"].shape[1]), GARBAGE[0], dtype=torch.int32)
    more = {
        "cu_seqlens_q": torch.cat([a["cu_seqlens_q"], a["cu_seqlens_q"][-1:].expand(2)]),
        "seqused_k": torch.cat([a["seqused_k"], torch.tensor([0, 9], dtype=torch.int32)]),
        "block_table": torch.cat([a["block_table"], garbage]),
    }
    assert_same_bits(attend(inputs, backend, **more), attend(inputs, backend))


# 5. Lengths and tables are read when the call is made, never remembered


@both_backends
@every_kind
def test_lengths_and_tables_may_change_between_calls(case: Case, layout: Any, backend: str) -> None:
    inputs = make_inputs(case, layout)
    first = attend(inputs, backend)
    lengths, table = inputs.kwargs["seqused_k"], inputs.kwargs["block_table"]
    kept = lengths.clone(), table.clone()
    lengths.sub_(torch.tensor([0, 2, 11]).int())
    table[2] = table[2].roll(-1)  # the block of tokens 0 to 7 is now another
    second = attend(inputs, backend)
    assert not torch.equal(first[0], second[0])
    right = attend(inputs, "reference")
    torch.testing.assert_close(second[0], right[0], rtol=2**-6, atol=2**-6)
    lengths.copy_(kept[0])
    table.copy_(kept[1])
    assert_same_bits(attend(inputs, backend), first)


@both_backends
@pytest.mark.parametrize("bound", [33, 34, 64, 1000, 2**31 - 1])
def test_the_upper_bounds_need_not_be_tight(bound: int, backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    out, lse = attend(inputs, backend, max_seqlen_k=bound, max_seqlen_q=5)
    assert_right(inputs, out, lse)


@both_backends
@every_kind
def test_scheduler_metadata_changes_no_bit(case: Case, layout: Any, backend: str) -> None:
    inputs = make_inputs(case, layout)
    a = inputs.kwargs
    metadata = get_scheduler_metadata(
        case.batch, a["max_seqlen_q"], a["max_seqlen_k"], case.num_q_heads, case.num_kv_heads, case.d_qk,
        a["seqused_k"], case.torch_dtype, case.d_v, a["cu_seqlens_q"], page_size=case.block_size, causal=True,
    )  # fmt: skip
    assert (metadata.dtype, metadata.dim()) == (torch.int32, 1)
    assert_same_bits(attend(inputs, backend, scheduler_metadata=metadata), attend(inputs, backend))


# Numbers and flags


@both_backends
def test_a_call_gives_the_same_bits_every_time(backend: str) -> None:
    inputs = make_inputs(find_case("mixed"), INTERLEAVED)
    first = attend(inputs, backend)
    for change in ({}, {"deterministic": True}, {"fa_version": 2}, {"fa_version": 3}):
        assert_same_bits(attend(inputs, backend, **change), first)


@both_backends
def test_windows_come_in_any_sequence_and_minus_one_is_none(backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    unbounded = attend(inputs, backend)
    for window in (None, (-1, -1), [-1, -1], (-1, 5)):
        assert_same_bits(attend(inputs, backend, window_size=window), unbounded)
    cut = attend(inputs, backend, window_size=(3, 0))
    assert not torch.equal(cut[0], unbounded[0])
    assert_same_bits(attend(inputs, backend, window_size=[3, 7]), cut)  # causal hides what is right


@both_backends
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", ""])
def test_descales_are_the_same_as_numbers_scalars_and_views(kv_dtype: str, backend: str) -> None:
    case = replace(GQA, kv_dtype=kv_dtype)
    inputs = make_inputs(case, INTERLEAVED)
    forms = []
    for form in (float, torch.tensor, lambda x: torch.tensor([x]), lambda x: torch.tensor(x).expand(3, 2)):
        given = {"q_descale": form(0.75), "k_descale": form(0.5), "v_descale": form(1.5)}
        forms.append(attend(inputs, backend, **given))
    for other in forms[1:]:
        assert_same_bits(other, forms[0])
    assert not torch.equal(forms[0][0], attend(inputs, backend)[0])


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sinks_and_slopes_of_any_float_dtype(dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    sinks, slopes = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 0.25, 0.125, 0.0])
    exact = attend(inputs, backend, s_aux=sinks, alibi_slopes=slopes)
    given = attend(inputs, backend, s_aux=sinks.to(dtype), alibi_slopes=slopes.to(dtype))
    assert_same_bits(given, exact)


@both_backends
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 100])
@every_kind
def test_any_number_of_splits_is_right(case: Case, layout: Any, num_splits: int, backend: str) -> None:
    inputs = make_inputs(case, layout)
    assert_right(inputs, *attend(inputs, backend, num_splits=num_splits))


@both_backends
@every_kind
def test_batch_invariant_rows_do_not_depend_on_neighbours(case: Case, layout: Any, backend: str) -> None:
    case = replace(case, seqused_k=(33, 5, 40), q_lens=(2, 1, 3))
    inputs = make_inputs(case, layout)
    a = inputs.kwargs
    out, lse = attend(inputs, backend, batch_invariant=True)
    assert lse is not None
    starts = a["cu_seqlens_q"].tolist()
    for seq, (begin, end) in enumerate(pairwise(starts)):
        alone: dict[str, Any] = {name: a[name][begin:end] for name in ("q", "q_v") if name in a}
        alone |= {name: a[name][seq : seq + 1] for name in ("seqused_k", "block_table")}
        alone["cu_seqlens_q"] = torch.tensor([0, end - begin], dtype=torch.int32)
        mine = attend(inputs, backend, batch_invariant=True, **alone)
        assert_same_bits(mine, (out[begin:end], lse[:, begin:end]))


@both_backends
def test_the_softmax_scale_has_the_documented_default(backend: str) -> None:
    for case, layout, row in ((GQA, INTERLEAVED, 16), (SPLIT, TWO_BUFFERS, 16 + 32), (ROW, MLA_ROW, 48)):
        inputs = make_inputs(case, layout)
        by_default = attend(inputs, backend, softmax_scale=None)
        assert_same_bits(attend(inputs, backend, softmax_scale=row**-0.5), by_default)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("which", ["q", "k", "v", "s_aux"])
def test_no_gradient_is_recorded(which: str, backend: str | None) -> None:
    inputs = make_inputs(replace(GQA, sinks=True, dtype="float32"), INTERLEAVED)
    tensor = inputs.kwargs[which].detach().requires_grad_()
    out, lse = attend(inputs, backend, **{which: tensor})
    assert lse is not None
    assert not out.requires_grad
    assert not lse.requires_grad


@both_backends
def test_inference_mode_and_parameters_are_welcome(backend: str) -> None:
    inputs = make_inputs(replace(GQA, sinks=True), INTERLEAVED)
    wanted = attend(inputs, backend)
    with torch.inference_mode():
        assert_same_bits(attend(inputs, backend), wanted)
    sinks = torch.nn.Parameter(inputs.kwargs["s_aux"])
    assert_same_bits(attend(inputs, backend, s_aux=sinks), wanted)


def test_threads_may_call_at_the_same_time() -> None:
    calls: list[tuple[Inputs, list[Any]]] = [
        (make_inputs(case, layout), []) for case, layout in KINDS for _ in range(2)
    ]
    wanted = [attend(inputs, "cpu") for inputs, _ in calls]

    def work(inputs: Inputs, results: list[Any]) -> None:
        results.extend(attend(inputs, "cpu") for _ in range(10))

    threads = [threading.Thread(target=work, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, results), right in zip(calls, wanted, strict=True):
        assert len(results) == 10
        for result in results:
            assert_same_bits(result, right)


def test_the_automatic_choice_on_a_cpu_is_the_cpu_back_end() -> None:
    inputs = make_inputs(GQA, INTERLEAVED)
    assert_same_bits(attend(inputs, None), attend(inputs, "cpu"))


@both_backends
def test_lengths_of_a_dense_cache_come_from_seqused_k_if_given(backend: str) -> None:
    case = find_case("tiny-dense")
    inputs = make_inputs(case, find_layout("G16"))
    shorter = torch.tensor([0, 3, 30], dtype=torch.int32)
    out, lse = attend(inputs, backend, seqused_k=shorter)
    cut = replace(case, seqused_k=(0, 3, 30))
    right_out, right_lse = attend(inputs, "reference", seqused_k=shorter)
    # The same rows from caches that are no longer than that.
    a = inputs.kwargs
    keep = torch.cat([torch.arange(3), torch.arange(5, 35)])
    short = {"k": a["k"][keep], "v": a["v"][keep], "cu_seqlens_k": torch.tensor([0, 0, 3, 33]).int()}
    packed = attend(inputs, "reference", **short)
    assert_same_bits((right_out, right_lse), packed)
    assert cut.total_q == out.shape[0]
    torch.testing.assert_close(out, right_out, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(lse, right_lse, rtol=2**-6, atol=2**-6)


def test_the_tolerance_finds_a_wrong_mask() -> None:
    # The tests of numbers are worth as much as this: a key too few or too many is found.
    inputs = make_inputs(replace(GQA, seqused_k=(7, 5, 33), causal=False), INTERLEAVED)
    right, rough = reference(inputs)[0], plain(inputs)[0]
    fewer = attend(inputs, "reference", seqused_k=inputs.kwargs["seqused_k"] - 1)[0]
    with pytest.raises(AssertionError, match="out: off by more than twice"):
        assert_close_as_plain("out", fewer, rough, right, torch.bfloat16)
