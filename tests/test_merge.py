"""Merging partial results: one cache in parts, whatever the parts, equals the cache in one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from formula import second_formula
from torch import Tensor

from anystride.merge import merge
from anystride.testing import Case, find_case, find_layout, make_inputs, select
from anystride.testing.judgement import assert_close_as_plain, attend, plain, reference
from anystride.testing.law import law

INF = float("inf")


def parts_of_rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float64 ``[count, 3 tokens, 2 heads, 5]`` and ``[count, 2 heads, 3 tokens]``."""
    torch.manual_seed(seed)
    return torch.randn(count, 3, 2, 5).double(), 4 * torch.randn(count, 2, 3).double()


def test_two_parts_weigh_as_the_exponents_of_their_lse() -> None:
    outs = torch.tensor([4.0, 8.0]).reshape(2, 1, 1, 1)
    lses = torch.tensor([0.0, math.log(3)]).reshape(2, 1, 1)
    out, lse = merge(outs, lses)
    assert out.item() == pytest.approx(7)
    assert lse.item() == pytest.approx(math.log(4))


def test_a_sink_is_one_more_part_without_a_value() -> None:
    outs = torch.tensor([6.0, 12.0]).reshape(2, 1, 1, 1)
    out, lse = merge(outs, torch.zeros(2, 1, 1), s_aux=torch.zeros(1))
    assert out.item() == pytest.approx(6)
    assert lse.item() == pytest.approx(math.log(3))


def test_each_head_has_its_own_sink() -> None:
    outs, lses = torch.ones(1, 1, 2, 1), torch.zeros(1, 2, 1)
    out, lse = merge(outs, lses, s_aux=torch.tensor([0.0, -INF]))
    assert out.flatten().tolist() == pytest.approx([0.5, 1])
    assert lse.flatten().tolist() == pytest.approx([math.log(2), 0])


def test_one_part_alone_is_what_it_was() -> None:
    outs, lses = parts_of_rows(1)
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, outs[0])
    torch.testing.assert_close(lse, lses[0])


def test_a_part_that_saw_no_key_is_ignored_whatever_it_holds() -> None:
    outs, lses = parts_of_rows(3)
    outs[1], lses[1] = float("nan"), -INF
    got = merge(outs, lses)
    wanted = merge(outs[::2], lses[::2])
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-14, atol=1e-14)


def test_rows_that_no_part_saw_are_zero_and_minus_infinity_also_with_sinks() -> None:
    outs, lses = parts_of_rows(2)
    lses[:, 1, 2] = -INF
    outs[:, 2, 1] = float("nan")
    for sinks in (None, torch.tensor([1.0, 2.0])):
        out, lse = merge(outs, lses, s_aux=sinks)
        assert out[2, 1].tolist() == [0] * 5
        assert lse[1, 2] == -INF
        assert out.isfinite().all()
        assert (lse.isfinite().sum()) == lse.numel() - 1


def test_merging_in_two_steps_is_merging_in_one() -> None:
    outs, lses = parts_of_rows(4)
    lses[0, 0, 0] = -INF
    lses[:2, 0, 1] = -INF
    whole = merge(outs, lses)
    for cut in (1, 2, 3):
        pairs = [merge(outs[:cut], lses[:cut]), merge(outs[cut:], lses[cut:])]
        for sinks in (None, torch.tensor([0.5, -1.0])):
            got = merge(torch.stack([o for o, _ in pairs]), torch.stack([s for _, s in pairs]), sinks)
            wanted = whole if sinks is None else merge(outs, lses, sinks)
            for mine, right in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13)


def test_the_order_of_the_parts_does_not_matter() -> None:
    outs, lses = parts_of_rows(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    for mine, right in zip(merge(outs[order], lses[order]), merge(outs, lses), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_large_lse_do_not_overflow(level: float) -> None:
    outs, lses = parts_of_rows(3)
    sinks = torch.tensor([0.5, -1.0])
    out, lse = merge(outs, lses + level, sinks + level)
    wanted_out, wanted_lse = merge(outs, lses, sinks)
    torch.testing.assert_close(out, wanted_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, wanted_lse + level, rtol=1e-9, atol=1e-3)


def test_a_sink_far_above_the_rows_takes_all() -> None:
    outs, lses = (tensor.float() for tensor in parts_of_rows(2))
    out, lse = merge(outs, lses - 100, torch.tensor([100.0, 100.0]))  # exp(200) is no float32
    assert out.abs().max() < 1e-30
    assert lse.eq(100).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_have_the_dtypes_of_the_parts(dtype: torch.dtype) -> None:
    outs, lses = parts_of_rows(3)
    outs, lses = outs.to(dtype), lses.float()
    out, lse = merge(outs, lses, torch.tensor([0.5, -1.0], dtype=dtype))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    right, right_lse = merge(outs.double(), lses.double(), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(out.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-6, atol=1e-6)


def test_parts_of_any_strides_and_no_part_is_written() -> None:
    outs, lses = parts_of_rows(3)
    wanted = merge(outs, lses)
    strided = outs.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    lses_strided = torch.full((3, 2, 6), float("nan")).double()[..., ::2]
    lses_strided.copy_(lses)
    before, lses_before = strided.clone(), lses_strided.clone()
    for mine, right in zip(merge(strided, lses_strided), wanted, strict=True):
        assert torch.equal(mine, right)
    assert torch.equal(strided, before)
    assert torch.equal(lses_strided, lses_before)


def test_rows_of_queries_that_no_sequence_has_may_be_anything() -> None:
    outs, lses = parts_of_rows(2)
    outs[:, 2], lses[..., 2] = float("nan"), float("nan")
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out[:2], merge(outs[:, :2], lses[..., :2])[0])
    torch.testing.assert_close(lse[:, :2], merge(outs[:, :2], lses[..., :2])[1])


# One sequence after the other dealt out to ranks; queries at the end of each.
TOTALS, QUERIES = (0, 1, 5, 18, 40), (1, 1, 3, 1, 4)


def dealt_out(world: int, run: int, **features: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A call over whole sequences, and the same as one call a rank: 2 KV heads, 4 query heads."""
    torch.manual_seed(world * 100 + run)
    total = sum(TOTALS)
    starts = torch.tensor((0, *TOTALS)).cumsum(0).int()
    rows = {"k": torch.randn(total, 2, 6), "v": torch.randn(total, 2, 5)}
    whole: dict[str, Any] = {
        "q": torch.randn(sum(QUERIES), 4, 6),
        "max_seqlen_q": max(QUERIES),
        "cu_seqlens_q": torch.tensor((0, *QUERIES)).cumsum(0).int(),
        "max_seqlen_k": max(TOTALS),
        "cu_seqlens_k": starts,
        "causal": True,
    } | rows  # fmt: skip
    whole |= features
    place = torch.cat([torch.arange(n) for n in TOTALS])
    owner = place // run % world
    ranks = []
    for rank in range(world):
        lengths = [int((owner[starts[i] : starts[i + 1]] == rank).sum()) for i in range(len(TOTALS))]
        mine = {name: tensor[owner == rank] for name, tensor in rows.items()}
        mine["cu_seqlens_k"] = torch.tensor([0, *lengths]).cumsum(0).int()
        mine["cp_tot_seqused_k"] = torch.tensor(TOTALS).int()
        ranks.append(whole | mine | {"cp_world_size": world, "cp_rank": rank, "cp_interleave": run})
    return whole, ranks


@pytest.mark.parametrize("run", [1, 2, 4, 16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_of_a_cache_merge_to_the_whole(world: int, run: int) -> None:
    slopes = torch.rand(4) / 4
    alibi = {"alibi_slopes": slopes, "softcap": 2.0}
    for features in ({}, {"causal": False}, {"window_size": (7, 0)}, alibi):
        whole, ranks = dealt_out(world, run, **features)
        results = [law(rank) for rank in ranks]
        got = merge(torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results]))
        for mine, right in zip(got, law(whole), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


def test_sinks_are_applied_once_when_ranks_are_merged() -> None:
    sinks = torch.randn(4)
    whole, ranks = dealt_out(3, 2)
    results = [law(rank) for rank in ranks]
    outs, lses = (torch.stack(parts) for parts in zip(*results, strict=True))
    right = law(whole | {"s_aux": sinks})
    for mine, wanted in zip(merge(outs, lses, s_aux=sinks), right, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merge(outs, lses)[0], right[0])
    # Sinks in every part, as if ranks had taken them, would be another answer.
    twice = [second_formula(rank | {"s_aux": sinks}, torch.float64) for rank in ranks]
    outs, lses = (torch.stack(parts) for parts in zip(*twice, strict=True))
    assert not torch.allclose(merge(outs, lses)[0], right[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", select("cp"), ids=lambda case: case.name)
def test_ranks_of_a_paged_cache_merge_to_the_whole(case: Case, backend: str) -> None:
    assert case.cp is not None
    layout = find_layout("G3" if case.form == "kv" else "M7" if case.form == "q_v" else "M2")
    ranks = [make_inputs(case, layout, rank=rank) for rank in range(case.cp.world_size)]
    results = [attend(rank, backend) for rank in ranks]
    outs = torch.stack([out for out, _ in results])
    lses = torch.stack([lse for _, lse in results if lse is not None])
    # The oracle and the tolerance are those of the whole cache on one rank.
    alone = make_inputs(_on_one_rank(case), layout)
    right_out, right_lse = reference(alone)
    plain_out, plain_lse = plain(alone)
    out, lse = merge(outs, lses)
    assert_close_as_plain("out", out, plain_out, right_out, out.dtype)
    assert_close_as_plain("lse", lse, plain_lse, right_lse, torch.float32)


def _on_one_rank(case: Case) -> Case:
    """The case without ranks; it keeps the name, from which the values are drawn."""
    return replace(case, cp=None)


def test_values_of_a_rank_are_those_of_the_whole() -> None:
    # What the test above rests on.
    case, layout = find_case("cp-2-1"), find_layout("G3")
    assert torch.equal(
        make_inputs(case, layout, rank=1).values.k, make_inputs(_on_one_rank(case), layout).values.k
    )
