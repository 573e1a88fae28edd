"""A cache that is sharded over ranks gives the rows of the whole cache, on every rank that they belong to.

Processes with gloo among them make real calls; the oracle and the tolerance are those of the whole cache on
one rank. ``multi_gpu.py`` does the same with NCCL, where there are several GPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded import (
    GQA,
    MORE,
    RUNS,
    SHARES,
    Result,
    assert_whole,
    attend,
    attend_to_runs,
    call,
    construction,
    layout_of,
    runs_of,
)

from anystride import InvalidInputError
from anystride.distributed import ShardedDecode, shard_lengths
from anystride.testing import Case, make_inputs, select
from anystride.testing.cases import Parallel


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


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


def one_wrong_start(group: Any, case: Case) -> Result:
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
        ({"s_aux": torch.zeros(4)}, {}, "s_aux must fit q"),
        ({"out": torch.zeros(8, 8, 64)}, {}, "out must fit q"),
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


def without_positions(group: Any, case: Case) -> Result:
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


@pytest.mark.parametrize("options", [(), ("--ranks", "4", "--interleave", "16")], ids=["2", "4"])
def test_the_example_decodes_as_over_a_whole_cache(options: tuple[str, ...]) -> None:
    script = Path(__file__).parents[1] / "examples" / "sharded_decode.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", str(script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "5 steps, sequences of [55, 12, 5] tokens"
    found = [re.fullmatch(r"rank \d holds \[(.+)\] of them; off by (.+) roundings at most", x) for x in lines]
    held = [[int(n) for n in match[1].split(", ")] for match in found if match]
    assert [sum(tokens) for tokens in zip(*held, strict=True)] == [55, 12, 5]
    assert len(held) == (int(options[1]) if options else 2)
    # Each of the two results may be off by three, as checks.py has it for float32.
    assert all(float(match[2]) <= 2 * 3 for match in found if match)
