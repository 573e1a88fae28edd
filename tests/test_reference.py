"""The law itself: held to sums done by hand, to PyTorch, and to the formula written a second time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from formula import second_formula
from torch import Tensor

from anystride import flash_attn_varlen_func
from anystride.testing.law import law

INF = float("inf")


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def column(*numbers: float) -> Tensor:
    """``[tokens, 1 head, 1]``: rows of one number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None]


def tiny(queries: int, keys: list[float], values: list[float], **others: Any) -> dict[str, Any]:
    """One sequence of rows of one number; each query is 1, so that a key is its own score."""
    arguments = {
        "q": torch.ones(queries, 1, 1),
        "k": column(*keys),
        "v": column(*values),
        "max_seqlen_q": queries,
        "cu_seqlens_q": ints(0, queries),
        "max_seqlen_k": len(keys),
        "cu_seqlens_k": ints(0, len(keys)),
        "softmax_scale": 1.0,
    }
    return arguments | others


def assert_rows(arguments: dict[str, Any], outs: list[float], lses: list[float]) -> None:
    """Both the law and the second formula give these, one number a query."""
    for out, lse in (law(arguments), second_formula(arguments, torch.float64)):
        # The inputs are float32: ln 3 is right to seven digits.
        assert out.flatten().tolist() == pytest.approx(outs, rel=1e-6, abs=1e-6)
        assert lse.flatten().tolist() == pytest.approx(lses, rel=1e-6, abs=1e-6)


LN2, LN3 = math.log(2), math.log(3)


def test_two_keys_weigh_as_the_exponents_of_their_scores() -> None:
    assert_rows(tiny(1, [0, LN3], [4, 8]), [7], [math.log(4)])


def test_the_scale_multiplies_scores() -> None:
    assert_rows(tiny(1, [0, 2 * LN3], [4, 8], softmax_scale=0.5), [7], [math.log(4)])


def test_the_default_scale_is_one_over_the_root_of_the_row() -> None:
    arguments = tiny(1, [0], [0])
    arguments |= {"q": torch.ones(1, 1, 4), "k": torch.tensor([0.0, LN3])[:, None, None].expand(2, 1, 4) / 2}
    arguments |= {"v": column(4, 8), "cu_seqlens_k": ints(0, 2), "softmax_scale": None}
    # 4 * ln(3) / 2 / sqrt(4)
    assert_rows(arguments, [7], [math.log(4)])


def test_causal_is_aligned_to_the_bottom_right() -> None:
    arguments = tiny(2, [0, 0, 0], [3, 6, 12], causal=True)
    assert_rows(arguments, [4.5, 7], [math.log(2), math.log(3)])


def test_without_causal_every_query_sees_every_key() -> None:
    assert_rows(tiny(2, [0, 0, 0], [3, 6, 12]), [7, 7], [math.log(3)] * 2)


def test_a_window_counts_both_of_its_ends() -> None:
    keys, values = [0.0] * 5, [1.0, 2.0, 4.0, 8.0, 16.0]
    # Queries stand at tokens 2, 3 and 4.
    one_left = tiny(3, keys, values, window_size=(1, 0))
    assert_rows(one_left, [3, 6, 12], [LN2] * 3)
    one_right = tiny(3, keys, values, window_size=(0, 1))
    assert_rows(one_right, [6, 12, 16], [LN2, LN2, 0])
    any_left = tiny(3, keys, values, window_size=(-1, 0))
    assert_rows(any_left, [7 / 3, 15 / 4, 31 / 5], [LN3, math.log(4), math.log(5)])
    causal_cuts_right = tiny(3, keys, values, window_size=(1, 3), causal=True)
    assert_rows(causal_cuts_right, [3, 6, 12], [LN2] * 3)


def test_softcap_bends_the_scaled_scores() -> None:
    bent = 2 * math.atanh(LN3 / 2)  # 2 * tanh(bent / 2) = ln 3
    assert_rows(tiny(1, [0, bent], [4, 8], softcap=2.0), [7], [math.log(4)])
    scaled = tiny(1, [0, 2 * bent], [4, 8], softcap=2.0, softmax_scale=0.5)
    assert_rows(scaled, [7], [math.log(4)])


def test_alibi_takes_the_slope_for_each_token_of_distance() -> None:
    slopes = torch.tensor([LN2])
    # Weights 1/4, 1/2, 1 of 7/4.
    assert_rows(tiny(1, [0, 0, 0], [7, 14, 28], alibi_slopes=slopes), [21], [math.log(7 / 4)])
    # A query before the last token: distances 1, 0, 1.
    two = tiny(2, [0, 0, 0], [4, 8, 16], alibi_slopes=slopes)
    assert_rows(two, [9, (4 / 4 + 8 / 2 + 16) * 4 / 7], [LN2, math.log(7 / 4)])


def test_alibi_comes_after_the_softcap() -> None:
    bent = 2 * math.atanh(LN3 / 2)
    arguments = tiny(1, [bent, 0], [4, 8], softcap=2.0, alibi_slopes=torch.tensor([LN3]))
    assert_rows(arguments, [6], [LN2])  # ln 3 - ln 3 and 0


def test_alibi_of_each_sequence_is_its_own() -> None:
    arguments = tiny(2, [0, 0, 0, 0], [4, 8, 4, 8], alibi_slopes=torch.tensor([[LN2], [LN3]]))
    arguments |= {"cu_seqlens_q": ints(0, 1, 2), "cu_seqlens_k": ints(0, 2, 4)}
    assert_rows(arguments, [20 / 3, 7], [math.log(3 / 2), math.log(4 / 3)])


def test_a_sink_is_one_more_logit_without_a_value() -> None:
    arguments = tiny(1, [0, 0], [6, 12], s_aux=torch.tensor([0.0]))
    assert_rows(arguments, [6], [LN3])


def test_descales_multiply_the_stored_values() -> None:
    arguments = tiny(1, [0, LN3 / 6], [4, 8], q_descale=2.0, k_descale=3.0, v_descale=5.0)
    assert_rows(arguments, [35], [math.log(4)])
    each = {name: torch.tensor([[x]]) for name, x in (("q_descale", 2.0), ("k_descale", 3.0))}
    assert_rows(arguments | each, [35], [math.log(4)])


def test_q_v_adds_scores_with_the_values() -> None:
    arguments = tiny(1, [0, LN3], [4, 8], q_v=column(0))
    assert_rows(arguments, [7], [math.log(4)])
    arguments = tiny(1, [0, LN3 - 8], [0, 8], q_v=column(1))
    assert_rows(arguments, [6], [math.log(4)])  # scores 0 and ln 3 - 8 + 8
    by_default = arguments | {"softmax_scale": None, "q": column(2**0.5), "q_v": column(2**0.5)}
    assert_rows(by_default, [6], [math.log(4)])  # d_qk + d_v = 2


def test_q_v_meets_the_descale_of_v_and_k_that_of_k() -> None:
    arguments = tiny(1, [0, LN3 / 2], [0, 1], q_v=column(1), q_descale=1.0, k_descale=6.0, v_descale=-1.0)
    # Scores 0 and 6 ln 3 / 2 - 1.
    weight = math.exp(3 * LN3 - 1)
    assert_rows(arguments, [-weight / (1 + weight)], [math.log(1 + weight)])


def test_a_rank_masks_by_the_places_in_the_whole_sequence() -> None:
    cp = {"cp_world_size": 2, "cp_tot_seqused_k": ints(5), "causal": True}
    # Tokens 0, 2, 4 live on rank 0, tokens 1, 3 on rank 1; queries stand at tokens 3 and 4.
    first = tiny(2, [0, 0, 0], [1, 2, 6], cp_rank=0, **cp)
    assert_rows(first, [1.5, 3], [LN2, LN3])
    second = tiny(2, [0, 0], [1, 3], cp_rank=1, **cp)
    assert_rows(second, [2, 2], [LN2, LN2])
    # In runs of two: tokens 0, 1, 4 and tokens 2, 3.
    first = tiny(2, [0, 0, 0], [1, 2, 6], cp_rank=0, cp_interleave=2, **cp)
    assert_rows(first, [1.5, 3], [LN2, LN3])
    second = tiny(2, [0, 0], [1, 3], cp_rank=1, cp_interleave=2, **cp | {"window_size": (1, 0)})
    assert_rows(second, [2, 3], [LN2, 0])


def test_rows_without_a_visible_key_are_zero_and_minus_infinity() -> None:
    nothing = tiny(1, [], [])
    more_queries_than_keys = tiny(3, [0], [5], causal=True)
    window_off_the_end = tiny(3, [0], [5], window_size=(0, 0))
    for sinks in (None, torch.tensor([3.0])):
        assert_rows(nothing | {"s_aux": sinks}, [0], [-INF])
        lse = 0.0 if sinks is None else math.log(1 + math.exp(3))
        out = 5.0 if sinks is None else 5 / (1 + math.exp(3))
        assert_rows(more_queries_than_keys | {"s_aux": sinks}, [0, 0, out], [-INF, -INF, lse])
        assert_rows(window_off_the_end | {"s_aux": sinks}, [0, 0, out], [-INF, -INF, lse])


def test_rows_of_no_sequence_are_not_defined() -> None:
    arguments = tiny(3, [0], [5]) | {"cu_seqlens_q": ints(0, 2)}
    for out, lse in (law(arguments), second_formula(arguments, torch.float64)):
        assert out.isnan().flatten().tolist() == [False, False, True]
        assert lse.isnan().flatten().tolist() == [False, False, True]


def test_query_heads_of_a_group_share_the_kv_head() -> None:
    arguments = tiny(1, [0], [0])
    values = torch.tensor([[[1.0], [2.0]]])  # 1 token, 2 KV heads
    arguments |= {"q": torch.ones(1, 6, 1), "k": torch.zeros(1, 2, 1), "v": values}
    assert_rows(arguments, [1, 1, 1, 2, 2, 2], [0] * 6)


def test_a_table_says_where_the_blocks_are() -> None:
    k = torch.zeros(4, 2, 1, 1)
    v = torch.arange(8.0).reshape(4, 2, 1, 1)
    arguments = tiny(2, [], []) | {"cu_seqlens_q": ints(0, 1, 2), "cu_seqlens_k": None, "k": k, "v": v}
    arguments |= {"block_table": torch.tensor([[3, 1], [0, -9]]).int(), "seqused_k": ints(3, 2)}
    # Tokens 6, 7, 2, and tokens 0, 1.
    assert_rows(arguments, [5, 0.5], [LN3, LN2])
    pages = arguments | {"k": k.reshape(2, 2, 2, 1, 1), "v": v.reshape(2, 2, 2, 1, 1)}
    assert_rows(pages, [5, 0.5], [LN3, LN2])


def test_blocks_of_a_padded_page_lie_where_the_page_says() -> None:
    flat = torch.full((20,), float("nan"))
    v = flat.as_strided((2, 2, 2, 1, 1), (10, 3, 1, 1, 1), 1)
    v.copy_(torch.arange(8.0).reshape(2, 2, 2, 1, 1))
    arguments = tiny(1, [], []) | {"cu_seqlens_k": None, "k": torch.zeros(2, 2, 2, 1, 1), "v": v}
    arguments |= {"block_table": torch.tensor([[3, 1]]).int(), "seqused_k": ints(3)}
    assert_rows(arguments, [5], [LN3])


# One random call with every feature that goes with every other, then changes of it.
LENGTHS, QUERIES = (0, 5, 33, 20), (1, 3, 2, 1)
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 2)},
    "causal_window": {"causal": True, "window_size": [4, -1]},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": 1},
    "alibi_of_each_sequence": {"alibi": 2, "causal": True},
    "sinks": {"sinks": True},
    "floats": {"descales": "floats"},
    "descale_of_each_head": {"descales": "heads"},
    "q_v": {"q_v": True},
    "q_v_descales": {"q_v": True, "descales": "heads"},
    "rank_1_of_3": {"cp": (3, 1, 1), "causal": True},
    "rank_1_of_2_by_4": {"cp": (2, 1, 4), "causal": True, "window_size": (9, 0), "alibi": 1},
    "rank_0_of_2": {"cp": (2, 0, 1), "window_size": (5, 5)},
    "pages": {"blocks_per_page": 3},
    "dense": {"dense": True, "causal": True},
    "dense_with_slack": {"dense": True, "slack": 4, "sinks": True},
    "everything": {
        "causal": True, "window_size": (11, 0), "softcap": 2.0, "alibi": 2, "sinks": True, "q_v": True,
        "descales": "heads", "blocks_per_page": 3, "softmax_scale": 0.3,
    },
}  # fmt: skip


def random_call(seed: int = 0, **change: Any) -> dict[str, Any]:
    """4 query heads on 2 KV heads, ``d_qk`` 6, ``d_v`` 5, blocks of 4 tokens."""
    torch.manual_seed(seed)
    heads, kv_heads, d_qk, d_v, block_size, blocks = 4, 2, 6, 5, 4, 30
    totals, total_q = LENGTHS, sum(QUERIES)
    lengths: tuple[int, ...] = totals
    arguments: dict[str, Any] = {
        "q": torch.randn(total_q, heads, d_qk),
        "max_seqlen_q": max(QUERIES),
        "cu_seqlens_q": torch.tensor((0, *QUERIES)).cumsum(0).int(),
        "max_seqlen_k": max(LENGTHS),
    }
    if change.pop("q_v", False):
        arguments["q_v"] = torch.randn(total_q, heads, d_v)
    if change.pop("sinks", False):
        arguments["s_aux"] = torch.randn(heads)
    if alibi := change.pop("alibi", 0):
        arguments["alibi_slopes"] = torch.rand((len(LENGTHS),) * (alibi == 2) + (heads,)) / 4
    if descales := change.pop("descales", ""):
        for name in "qkv":
            tensor = 0.5 + torch.rand(len(LENGTHS), kv_heads)
            arguments[f"{name}_descale"] = float(tensor[0, 0]) if descales == "floats" else tensor
    if cp := change.pop("cp", ()):
        world, rank, run = cp
        lengths = tuple(sum(1 for p in range(n) if p // run % world == rank) for n in totals)
        arguments |= {"cp_world_size": world, "cp_rank": rank, "cp_interleave": run}
        arguments["cp_tot_seqused_k"] = ints(*totals)
    if change.pop("dense", False):
        slack = change.pop("slack", 0)
        starts = torch.tensor([0, *(n + slack for n in lengths)]).cumsum(0).int()
        arguments |= {"k": torch.randn(int(starts[-1]), kv_heads, d_qk), "cu_seqlens_k": starts}
        arguments["v"] = torch.randn(int(starts[-1]), kv_heads, d_v)
        if slack:
            arguments["seqused_k"] = ints(*lengths)
    else:
        sub = change.pop("blocks_per_page", 1)
        sizes = (blocks, block_size) if sub == 1 else (blocks // sub, sub, block_size)
        arguments |= {"k": torch.randn(*sizes, kv_heads, d_qk), "v": torch.randn(*sizes, kv_heads, d_v)}
        arguments["block_table"] = torch.randperm(blocks)[:28].int().reshape(4, 7).repeat(1, 2)
        arguments["seqused_k"] = ints(*lengths)
    return arguments | change


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_law_agrees_with_the_second_formula(name: str, seed: int) -> None:
    arguments = random_call(seed, **CHANGES[name])
    for got, wanted in zip(law(arguments), second_formula(arguments, torch.float64), strict=True):
        # Both are float64: what is left is the order of the sums.
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_every_feature_changes_the_answer() -> None:
    # Otherwise the agreement above would be about nothing.
    plain = law(random_call())[0]
    for name in ("causal", "window", "softcap", "alibi", "sinks", "floats"):
        assert not torch.allclose(law(random_call(**CHANGES[name]))[0], plain), name


@pytest.mark.parametrize("causal", [False, True])
def test_the_law_agrees_with_pytorch(causal: bool) -> None:
    torch.manual_seed(0)
    n, heads, kv_heads, d = 9, 6, 2, 8
    q, k, v = torch.randn(n, heads, d), torch.randn(n, kv_heads, d), torch.randn(n, kv_heads, d)
    arguments = {
        "q": q, "k": k, "v": v, "max_seqlen_q": n, "cu_seqlens_q": ints(0, n), "max_seqlen_k": n,
        "cu_seqlens_k": ints(0, n), "causal": causal,
    }  # fmt: skip
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(law(arguments)[0], wanted[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_moving_blocks_together_with_the_table_changes_nothing() -> None:
    arguments = random_call(causal=True)
    order = torch.randperm(arguments["k"].shape[0])
    moved = arguments | {"k": arguments["k"][order], "v": arguments["v"][order]}
    moved["block_table"] = order.argsort()[arguments["block_table"].long()].int()
    for before, after in zip(law(arguments), law(moved), strict=True):
        assert torch.equal(before, after)


def test_the_same_added_to_all_scores_shifts_lse_alone() -> None:
    arguments = random_call(causal=True, softmax_scale=1.0)
    shifted = dict(arguments)
    for name, ends in (("q", 2.0), ("k", 1.5)):  # one more dimension adds 3 to every score
        last = torch.full((*arguments[name].shape[:-1], 1), ends)
        shifted[name] = torch.cat([arguments[name], last], -1)
    (out, lse), (out_shifted, lse_shifted) = law(arguments), law(shifted)
    torch.testing.assert_close(out_shifted, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse_shifted, lse + 3, rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    assert_rows(tiny(1, [1000, 1000], [4, 8]), [6], [1000 + LN2])
    assert_rows(tiny(1, [-1000, -1000], [4, 8]), [6], [LN2 - 1000])
    assert_rows(tiny(1, [1000, -1000], [4, 8]), [4], [1000])
    assert_rows(tiny(1, [0], [4], s_aux=torch.tensor([1000.0])), [0], [1000])


def test_the_law_writes_out_and_lse_in_the_dtypes_of_the_contract() -> None:
    arguments = random_call(causal=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cast = arguments | {name: arguments[name].to(dtype) for name in ("q", "k", "v")}
        out, lse = flash_attn_varlen_func(**cast, return_softmax_lse=True, backend="reference")
        right_out, right_lse = law(cast)
        assert torch.equal(out, right_out.to(dtype))
        assert torch.equal(lse, right_lse.float())
