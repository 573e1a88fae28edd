"""Cases of a sharded cache, the ranks' calls, and how they are held to the law: with gloo and with NCCL."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anystride.distributed import ShardedDecode
from anystride.testing import Case, Inputs, Values, find_layout, make_inputs
from anystride.testing.cases import Parallel
from anystride.testing.judgement import assert_close_as_plain, plain, reference
from anystride.testing.storage import read

__all__ = [
    "GQA", "MORE", "RUNS", "SHARES", "Result", "assert_whole", "attend", "attend_to_runs", "call",
    "construction", "layout_of", "runs_of",
]  # fmt: skip

Result = tuple[Tensor, Tensor]

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


def call(inputs: Inputs, decode: ShardedDecode, **others: Any) -> Result:
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


def attend(group: Any, case: Case, gather_heads: bool, device: str = "cpu") -> Result:
    """One rank's result for a case of the table."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    heads = case.num_q_heads // (world_size if gather_heads else 1)
    decode = ShardedDecode(group, **construction(case, num_q_heads=heads, gather_heads=gather_heads))
    return call(make_inputs(case, layout_of(case), device, rank=rank, rows="padded_rows"), decode)


def shard_bounds(case: Case, shares: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of each sequence, where the ranks' runs begin, and where the last one ends."""
    ends = list(itertools.accumulate(shares, initial=0))
    return [tuple(length * end // 16 for end in ends) for length in case.seqused_k]


def runs_of(case: Case, shares: tuple[int, ...], rank: int, device: str = "cpu") -> tuple[Inputs, Tensor]:
    """A rank's run of each sequence in a cache of its own, and where the runs begin."""
    alone = make_inputs(on_one_rank(case), layout_of(case))
    lengths = torch.tensor(case.seqused_k, dtype=torch.int32)
    k, v = read(alone.storage, alone.kwargs["block_table"], lengths, None)
    bounds = shard_bounds(case, shares)
    first = (0, *itertools.accumulate(case.seqused_k))
    mine = [slice(at + b[rank], at + b[rank + 1]) for at, b in zip(first, bounds, strict=False)]
    k, v = (torch.cat([x[rows] for rows in mine]).to(device) for x in (k, v))
    values = Values(k, v)
    own = replace(on_one_rank(case), seqused_k=tuple(b[rank + 1] - b[rank] for b in bounds))
    starts = torch.tensor([b[rank] for b in bounds], dtype=torch.int32)
    return make_inputs(own, layout_of(case), device, values=values), starts.to(device)


def attend_to_runs(
    group: Any, case: Case, shares: tuple[int, ...], gather_heads: bool, device: str = "cpu"
) -> Result:
    """One rank's result where each rank holds one run of tokens."""
    inputs, starts = runs_of(case, shares, dist.get_rank(group), device)
    heads = case.num_q_heads // (dist.get_world_size(group) if gather_heads else 1)
    facts = construction(case, num_q_heads=heads, gather_heads=gather_heads, cp_interleave=None)
    totals = torch.tensor(case.seqused_k, dtype=torch.int32, device=device)
    return call(inputs, ShardedDecode(group, **facts), cp_tot_seqused_k=totals, shard_starts=starts)


def assert_whole(case: Case, results: list[Result], gather_heads: bool) -> None:
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
