"""A cache that is sharded over ranks gives the rows of the whole cache, on every rank that they belong to.

Processes with gloo among them make real calls; the oracle and the tolerance are those of the whole cache on
one rank. ``multi_gpu.py`` does the same with NCCL, where there are several GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import assert_close_as_plain, plain, reference
from ranks import Ranks
from torch import Tensor

from anystride import InvalidInputError
from anystride.distributed import ShardedDecode, shard_lengths
from anystride.testing import Case, Inputs, Values, find_layout, make_inputs, select
from anystride.testing.cases import Parallel
from anystride.testing.storage import read

LENS, QUERIES = (0, 1, 65, 200, 33), (1, 1, 3, 2, 1)
GQA = Case("sharded-gqa", "context parallelism", LENS, QUERIES, num_q_heads=8, cp=Parallel(4, 1))
ROW = replace(
    GQA, name="sharded-row", num_q_heads=4, num_kv_heads=1, d_qk=96, d_v=64, form="row", cp=Parallel(2, 4)
)
SPLIT = replace(ROW, name="sharded-q_v", d_qk=32, form="q_v")
E4M3 = "float8_e4m3fn"
MORE = (
    GQA,
    replace(GQA, name="sharded-one-query", q_lens=(1, 1, 1, 1, 1)),
    replace(GQA, name="sharded-16", cp=Parallel(4, 16)),
    replace(GQA, name="sharded-window", window=(40, 0), cp=Parallel(4, 4)),
    replace(GQA, name="sharded-window-both", causal=False, window=(30, 5), cp=Parallel(2, 4)),
    replace(GQA, name="sharded-window-one-query", q_lens=(1, 1, 1, 1, 1), window=(40, 0)),
    replace(GQA, name="sharded-sinks", sinks=True),
    replace(GQA, name="sharded-sinks-window", sinks=True, window=(20, 0), cp=Parallel(4, 4)),
    replace(GQA, name="sharded-softcap", softcap=3.0, cp=Parallel(2, 1)),
    replace(GQA, name="sharded-alibi-batch", alibi="batch"),
    replace(GQA, name="sharded-fp8", kv_dtype=E4M3, descales="per_head"),
    replace(GQA, name="sharded-scales", kv_dtype=E4M3, scale_caches="rows", cp=Parallel(4, 4)),
    replace(GQA, name="sharded-float32", dtype="float32"),
    replace(GQA, name="sharded-float16-odd", dtype="float16", d_qk=24, d_v=33, q_lens=(1, 1, 3, 1, 1)),
    replace(GQA, name="sharded-dense", paged=False),
    replace(GQA, name="sharded-pages", blocks_per_page=4),
    replace(GQA, name="sharded-padded-q", padded_q=3),
    replace(GQA, name="sharded-short", seqused_k=(1, 2, 3), q_lens=(1, 2, 1)),  # ranks without a token
    replace(GQA, name="sharded-empty", seqused_k=(0, 0), q_lens=(1, 2), sinks=True),
    replace(GQA, name="sharded-alone", cp=Parallel(1, 1)),
    ROW,
    replace(ROW, name="sharded-row-16", cp=Parallel(4, 16)),
    replace(ROW, name="sharded-row-groups", kv_dtype=E4M3, scale_caches="groups"),
    SPLIT,
    replace(SPLIT, name="sharded-q_v-4", cp=Parallel(4, 1)),
)
# Of each sequence, the part of its tokens that each rank holds, in sixteenths: uneven, and nothing at all.
SHARES = {"even": (4, 4, 4, 4), "uneven": (1, 9, 2, 4), "holes": (0, 11, 0, 5), "one": (16, 0, 0, 0)}
RUNS = (
    GQA,
    replace(GQA, name="runs-one-query", q_lens=(1, 1, 1, 1, 1)),
    replace(GQA, name="runs-window", window=(40, 0)),
    replace(GQA, name="runs-window-both", causal=False, window=(30, 5), sinks=True),
    replace(GQA, name="runs-alibi", alibi="heads", causal=False),
    replace(GQA, name="runs-many-queries", q_lens=(1, 1, 60, 190, 30)),
    replace(ROW, name="runs-row", cp=Parallel(4, 1)),
    replace(SPLIT, name="runs-q_v", cp=Parallel(4, 1)),
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


def on_one_rank(case: Case) -> Case:
    """The same values, all on one rank."""
    return replace(case, cp=None)


def layout_of(case: Case) -> Any:
    name = {"kv": "G16" if not case.paged else "G3", "row": "M2", "q_v": "M7"}[case.form]
    return find_layout("G11" if case.blocks_per_page > 1 else name)


def construction(case: Case, **others: Any) -> dict[str, Any]:
    """The arguments of ``ShardedDecode`` for a case whose heads are on every rank."""
    assert case.cp is not None
    return {
        "num_q_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "d_qk": case.d_qk,
        "d_v": case.d_v,
        "dtype": case.torch_dtype,
        "q_v": case.form == "q_v",
        "softmax_scale": case.scale,
        "causal": case.causal,
        "window_size": None if case.window == (-1, -1) else case.window,
        "softcap": case.softcap,
        "cp_interleave": case.cp.interleave,
        "gather_heads": False,
    } | others


def call(inputs: Inputs, decode: ShardedDecode, **others: Any) -> tuple[Tensor, Tensor]:
    """The rank's call, of its own heads if they are gathered."""
    given = {
        name: value
        for name, value in inputs.kwargs.items()
        if name not in decode.facts and name not in ("cp_world_size", "cp_rank")
    }
    given |= {"q_v": inputs.kwargs.get("q_v"), "return_softmax_lse": True} | others
    if decode.gather_heads:
        mine = slice(decode.rank * decode.num_q_heads, (decode.rank + 1) * decode.num_q_heads)
        for name, dim in (("q", 1), ("q_v", 1), ("s_aux", 0)):
            if given.get(name) is not None:
                given[name] = given[name].movedim(dim, 0)[mine].movedim(0, dim)
    result = decode(**given)
    assert isinstance(result, tuple)
    inputs.assert_untouched()
    return result


def attend(group: Any, case: Case, gather_heads: bool) -> tuple[Tensor, Tensor]:
    """One rank's result for a case of the table."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    heads = case.num_q_heads // (world_size if gather_heads else 1)
    decode = ShardedDecode(group, **construction(case, num_q_heads=heads, gather_heads=gather_heads))
    return call(make_inputs(case, layout_of(case), rank=rank, rows="padded_rows"), decode)


def shard_bounds(case: Case, shares: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of each sequence, where the ranks' runs begin, and where the last one ends."""
    ends = list(itertools.accumulate(shares, initial=0))
    return [tuple(length * end // 16 for end in ends) for length in case.seqused_k]


def runs_of(case: Case, shares: tuple[int, ...], rank: int) -> tuple[Inputs, Tensor]:
    """A rank's run of each sequence in a cache of its own, and where the runs begin."""
    alone = make_inputs(on_one_rank(case), layout_of(case))
    lengths = torch.tensor(case.seqused_k, dtype=torch.int32)
    k, v = read(alone.storage, alone.kwargs["block_table"], lengths, None)
    bounds = shard_bounds(case, shares)
    first = (0, *itertools.accumulate(case.seqused_k))
    mine = [slice(at + b[rank], at + b[rank + 1]) for at, b in zip(first, bounds, strict=False)]
    values = Values(torch.cat([k[rows] for rows in mine]), torch.cat([v[rows] for rows in mine]))
    own = replace(on_one_rank(case), seqused_k=tuple(b[rank + 1] - b[rank] for b in bounds))
    starts = torch.tensor([b[rank] for b in bounds], dtype=torch.int32)
    return make_inputs(own, layout_of(case), values=values), starts


def attend_to_runs(
    group: Any, case: Case, shares: tuple[int, ...], gather_heads: bool
) -> tuple[Tensor, Tensor]:
    """One rank's result where each rank holds one run of tokens."""
    inputs, starts = runs_of(case, shares, dist.get_rank(group))
    heads = case.num_q_heads // (dist.get_world_size(group) if gather_heads else 1)
    facts = construction(case, num_q_heads=heads, gather_heads=gather_heads, cp_interleave=None)
    totals = torch.tensor(case.seqused_k, dtype=torch.int32)
    return call(inputs, ShardedDecode(group, **facts), cp_tot_seqused_k=totals, shard_starts=starts)


def assert_whole(case: Case, results: list[tuple[Tensor, Tensor]], gather_heads: bool) -> None:
    """Fail unless the ranks' rows are those of the whole cache, to the tolerance of one rank."""
    if gather_heads:
        outs, lses = zip(*results, strict=True)
        results = [(torch.cat(outs, 1), torch.cat(lses, 0))]
    else:
        for out, lse in results[1:]:
            assert torch.equal(out[: case.total_q], results[0][0][: case.total_q]), "ranks differ in a bit"
            assert torch.equal(lse[:, : case.total_q], results[0][1][:, : case.total_q])
    out, lse = results[0]
    assert out.dtype == case.torch_dtype
    assert lse.dtype == torch.float32
    alone = make_inputs(on_one_rank(case), layout_of(case))
    right_out, right_lse = reference(alone)
    plain_out, plain_lse = plain(alone)
    assert_close_as_plain("out", out, plain_out, right_out, out.dtype)
    assert_close_as_plain("lse", lse, plain_lse, right_lse, torch.float32)


@pytest.mark.parametrize("gather_heads", [True, False], ids=["own-heads", "all-heads"])
@pytest.mark.parametrize("case", [*select("cp"), *MORE], ids=lambda case: case.name)
def test_dealt_out_tokens_give_the_rows_of_the_whole_cache(
    ranks: Ranks, case: Case, gather_heads: bool
) -> None:
    assert case.cp is not None
    world_size = case.cp.world_size
    if gather_heads and case.num_q_heads % world_size:
        case = replace(case, num_q_heads=2 * world_size)
    assert_whole(case, ranks.run(attend, world_size, case, gather_heads), gather_heads)


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_runs_of_tokens_give_the_rows_of_the_whole_cache(
    ranks: Ranks, case: Case, shares: tuple[int, ...]
) -> None:
    gather_heads = sum(shares[::2]) % 4 == 0  # either way meets every case
    assert_whole(case, ranks.run(attend_to_runs, 4, case, shares, gather_heads), gather_heads)


def one_wrong_start(group: Any, case: Case) -> tuple[Tensor, Tensor]:
    inputs, starts = runs_of(case, SHARES["uneven"], dist.get_rank(group))
    decode = ShardedDecode(group, **construction(case, cp_interleave=None))
    totals = torch.tensor(case.seqused_k, dtype=torch.int32)
    return call(inputs, decode, cp_tot_seqused_k=totals, shard_starts=starts.clamp(max=32))


def test_the_starts_of_runs_matter(ranks: Ranks) -> None:
    case = replace(GQA, name="runs-window", window=(40, 0))
    with pytest.raises(AssertionError, match="off by more than twice"):
        assert_whole(case, ranks.run(one_wrong_start, 4, case), gather_heads=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("interleave", [1, 4, 5, 16])
def test_shard_lengths_are_what_counting_gives(world_size: int, interleave: int) -> None:
    totals = torch.arange(100, dtype=torch.int32)
    for rank in range(world_size):
        owner = torch.arange(100) // interleave % world_size
        counted = torch.tensor([0, *(owner == rank).cumsum(0)[:-1].tolist()], dtype=torch.int32)
        lengths = shard_lengths(totals, world_size, rank, interleave)
        assert lengths.dtype == torch.int32
        assert torch.equal(lengths, counted)


def with_everything_else(group: Any, case: Case) -> tuple[bool, bool, bool]:
    """``out=``, no ``lse``, and a shared schedule give the same bits; no query token gives no row."""
    rank = dist.get_rank(group)
    inputs = make_inputs(case, layout_of(case), rank=rank, out="padded_rows")
    decode = ShardedDecode(group, **construction(case))
    out, lse = call(inputs, decode)
    fresh = make_inputs(case, layout_of(case), rank=rank)
    metadata = decode.scheduler_metadata(
        fresh.kwargs["seqused_k"],
        fresh.kwargs["max_seqlen_q"],
        fresh.kwargs["max_seqlen_k"],
        fresh.kwargs["cu_seqlens_q"],
    )
    again, lse_again = call(fresh, decode, scheduler_metadata=metadata)
    starts = torch.zeros(case.batch + 1, dtype=torch.int32)
    none, _ = call(fresh, decode, q=fresh.kwargs["q"][:0], cu_seqlens_q=starts)
    same = torch.equal(out, again) and torch.equal(lse, lse_again)
    return out is inputs.kwargs["out"], same, none.shape == (0, case.num_q_heads, case.d_v)


def test_a_given_out_is_written_and_a_schedule_is_used(ranks: Ranks) -> None:
    assert ranks.run(with_everything_else, 2, replace(GQA, cp=Parallel(2, 4))) == [(True,) * 3] * 2


def attempt(group: Any, facts: dict[str, Any], changes: dict[int, dict[str, Any]]) -> str:
    """What a rank is told when it constructs with its own facts."""
    with pytest.raises(InvalidInputError) as refusal:
        ShardedDecode(group, **(facts | changes.get(dist.get_rank(group), {})))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("softmax_scale", 0.25, "0.125 on rank 0, 2, 3; 0.25 on rank 1"),
        ("num_q_heads", 2, "8 on rank 0, 2, 3; 2 on rank 1"),
        ("num_kv_heads", 1, "2 on rank 0, 2, 3; 1 on rank 1"),
        ("d_qk", 96, "64 on rank 0, 2, 3; 96 on rank 1"),
        ("d_v", 32, "64 on rank 0, 2, 3; 32 on rank 1"),
        ("dtype", torch.float16, "torch.bfloat16 on rank 0, 2, 3; torch.float16 on rank 1"),
        ("q_v", True, "False on rank 0, 2, 3; True on rank 1"),
        ("causal", False, "True on rank 0, 2, 3; False on rank 1"),
        ("window_size", (3, 0), "(-1, -1) on rank 0, 2, 3; (3, 0) on rank 1"),
        ("softcap", 5.0, "0.0 on rank 0, 2, 3; 5.0 on rank 1"),
        ("cp_interleave", None, "1 on rank 0, 2, 3; None on rank 1"),
        ("gather_heads", True, "False on rank 0, 2, 3; True on rank 1"),
    ],
)
def test_every_rank_is_told_about_what_they_disagree(ranks: Ranks, name: str, value: Any, text: str) -> None:
    facts = construction(GQA)
    assert name in facts
    (told, *others) = ranks.run(attempt, 4, facts, {1: {name: value}})
    assert others == [told] * 3
    assert told.startswith(f"ShardedDecode: the ranks disagree about {name}.")
    assert text in told


def test_every_disagreement_is_told_and_the_group_still_works(ranks: Ranks) -> None:
    changes: dict[int, dict[str, Any]] = {0: {"softcap": 1.0}, 3: {"d_v": 32}}
    (told, *others) = ranks.run(attempt, 4, construction(GQA), changes)
    assert others == [told] * 3
    assert "disagree about softcap" in told
    assert "disagree about d_v" in told
    assert_whole(GQA, ranks.run(attend, 4, GQA, True), gather_heads=True)


def wrong_call(group: Any, case: Case, changes: dict[str, Any], facts: dict[str, Any]) -> str:
    """What a rank is told about a call: before any collective, so ranks 1, 2 and 3 need not take part."""
    inputs = make_inputs(case, layout_of(case), rank=dist.get_rank(group))
    decode = ShardedDecode(group, **construction(case, **facts))
    if decode.rank > 0:
        return ""
    with pytest.raises(InvalidInputError) as refusal:
        call(inputs, decode, **changes)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "facts", "text"),
    [
        ({"q": torch.zeros(8, 8, 64, dtype=torch.float16)}, {}, "q must be as the ranks have agreed"),
        ({"q": torch.zeros(8, 4, 64, dtype=torch.bfloat16)}, {}, "needs  torch.bfloat16 [total_q, 8, 64]"),
        ({"v": torch.zeros(9, 16, 2, 32, dtype=torch.bfloat16)}, {}, "the cache must be as the ranks have"),
        ({"q_v": torch.zeros(8, 8, 64, dtype=torch.bfloat16)}, {}, "q_v must be given if and only if"),
        ({"softcap": 3.0}, {}, "softcap is not an argument of a call"),
        ({"cp_rank": 1}, {}, "cp_rank is not an argument of a call"),
        ({"cp_tot_seqused_k": None}, {}, "masks by position need to know where this rank's tokens stand"),
        (
            {"shard_starts": torch.zeros(5, dtype=torch.int32)},
            {},
            "shard_starts is not None, cp_interleave = 1",
        ),
        ({}, {"cp_interleave": None}, "shard_starts is None, cp_interleave = None"),
    ],
)
def test_a_wrong_call_is_refused_before_the_first_collective(
    ranks: Ranks, changes: dict[str, Any], facts: dict[str, Any], text: str
) -> None:
    assert text in ranks.run(wrong_call, 4, GQA, changes, facts)[0]


def without_positions(group: Any, case: Case) -> tuple[Tensor, Tensor]:
    """With one query token, no length over all ranks is needed: causal hides nothing."""
    inputs = make_inputs(case, layout_of(case), rank=dist.get_rank(group))
    decode = ShardedDecode(group, **construction(case, cp_interleave=None))
    return call(inputs, decode, cp_tot_seqused_k=None)


def test_one_query_token_needs_no_positions(ranks: Ranks) -> None:
    case = replace(GQA, name="sharded-one-query", q_lens=(1, 1, 1, 1, 1))
    assert_whole(case, ranks.run(without_positions, 4, case), gather_heads=False)


def while_capturing(group: Any, facts: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return attempt(group, facts, {})


def test_ranks_do_not_agree_inside_a_capture(ranks: Ranks) -> None:
    (told,) = ranks.run(while_capturing, 1, construction(GQA))
    assert "ranks cannot agree while a CUDA graph is captured" in told


def not_a_member(group: Any) -> str:
    others = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        return ""
    with pytest.raises(InvalidInputError) as refusal:
        ShardedDecode(others, **construction(GQA))
    return str(refusal.value)


def test_a_rank_outside_of_the_group_is_told(ranks: Ranks) -> None:
    assert ["not in the group" in told for told in ranks.run(not_a_member, 4)] == [False, False, True, True]


def test_without_a_process_group_the_message_says_how_to_make_one() -> None:
    assert not dist.is_initialized()
    with pytest.raises(InvalidInputError, match="there is no process group") as refusal:
        ShardedDecode(**construction(GQA))
    assert "init_process_group" in str(refusal.value)
