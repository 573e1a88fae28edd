"""``anystride.adapters.flash_attn`` against what FlashAttention-3 is documented to do."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from originals import (
    GQA_LAYOUTS,
    WHERE,
    assert_as_stated,
    assert_refused,
    gqa_inputs,
    mla_inputs,
    never_waits,
    one_sequence,
    sequences,
)
from torch import Tensor

from anystride import InvalidInputError, UnsupportedError
from anystride.adapters import flash_attn
from anystride.adapters.flash_attn import METADATA_REFUSED, QUANTISED, REFUSED, get_scheduler_metadata
from anystride.testing import Inputs

CPU = ("cpu", False)
flash_attn_with_kvcache: Any = flash_attn.flash_attn_with_kvcache  # what it returns hangs on an argument


def stated(
    inputs: Inputs, dtype: torch.dtype, scale: float | None = None, **more: Any
) -> tuple[Tensor, Tensor]:
    """Scale by the width of q and qv; lse ``[batch, heads, seqlen_q]``, natural, -inf where empty."""
    given = inputs.kwargs
    both = []
    for rows, k, v in sequences(inputs):
        q = given["q"][rows]
        if "q_v" in given:
            q, k = torch.cat([q, given["q_v"][rows]], -1), torch.cat([k, v], -1)
        both.append(one_sequence(q, k, v, scale or q.shape[-1] ** -0.5, dtype, **more))
    return torch.stack([out for out, _ in both]), torch.stack([lse.t() for _, lse in both])


def arguments(inputs: Inputs) -> dict[str, Any]:
    given = inputs.kwargs
    named = {
        "q": given["q"].unflatten(0, (inputs.case.batch, -1)),
        "k_cache": given["k"],
        "v_cache": given["v"],
        "cache_seqlens": given["seqused_k"],
        "page_table": given["block_table"],
    }
    if "q_v" in given:
        named["qv"] = given["q_v"].unflatten(0, (inputs.case.batch, -1))
    return named


@pytest.mark.parametrize("layout", [*GQA_LAYOUTS, "G11"])
@pytest.mark.parametrize("where", WHERE)
def test_attention_is_as_documented_in_every_layout(where: tuple[str, bool], layout: str) -> None:
    inputs = gqa_inputs(where, layout, blocks_per_page=2 if layout == "G11" else 1)
    with never_waits(where[0]):
        out, lse = flash_attn_with_kvcache(**arguments(inputs), return_softmax_lse=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)
    assert (out[0] == 0).all()
    assert (lse[0] == float("-inf")).all()
    alone = flash_attn_with_kvcache(**arguments(inputs))
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out)
    inputs.assert_untouched()


@pytest.mark.parametrize("layout", ["M7", "M9", "M10"])
@pytest.mark.parametrize("where", WHERE)
def test_qv_adds_to_the_scores_and_to_the_default_scale(where: tuple[str, bool], layout: str) -> None:
    changes = {"d_qk": 64, "d_v": 512} if where[1] else {"d_qk": 16, "d_v": 32}
    inputs = mla_inputs(where, layout, form="q_v", q_lens=(2, 2, 2), **changes)
    out, lse = flash_attn_with_kvcache(**arguments(inputs), causal=True, return_softmax_lse=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype, causal=True), out, lse, torch.bfloat16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_windows_caps_and_scales(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G6", seqused_k=(1, 9, 33), q_lens=(3, 3, 3), dtype="float16")
    out, lse = flash_attn_with_kvcache(
        **arguments(inputs), softmax_scale=0.3, causal=True, window_size=(4, -1), softcap=1.5, num_splits=2,
        return_softmax_lse=True,
    )  # fmt: skip
    options = {"causal": True, "window_left": 4, "softcap": 1.5}
    assert_as_stated(lambda d: stated(inputs, d, 0.3, **options), out, lse, torch.float16)
    assert int((lse == float("-inf")).sum()) == 2 * 4  # one key, three tokens: two of them see nothing


@pytest.mark.parametrize("where", WHERE[:2])
def test_rows_of_unequal_queries_come_one_after_the_other(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G2", q_lens=(2, 1, 3))
    given = arguments(inputs) | {"q": inputs.kwargs["q"], "cu_seqlens_q": inputs.kwargs["cu_seqlens_q"]}
    out, lse = flash_attn_with_kvcache(**given, max_seqlen_q=3, causal=True, return_softmax_lse=True)

    def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = inputs.case.d_qk**-0.5
        both = [
            one_sequence(inputs.kwargs["q"][r], k, v, scale, dtype, causal=True)
            for r, k, v in sequences(inputs)
        ]
        return torch.cat([o for o, _ in both]), torch.cat([x for _, x in both]).t()

    assert_as_stated(rows, out, lse, torch.bfloat16)
    with pytest.raises(InvalidInputError, match="rows with cu_seqlens_q and max_seqlen_q"):
        flash_attn_with_kvcache(**given)


@pytest.mark.parametrize("where", WHERE[:2])
def test_a_cache_without_a_page_table_keeps_each_sequence_in_one_piece(where: tuple[str, bool]) -> None:
    device = where[0]
    q, rows = torch.randn(3, 1, 4, 16, device=device), torch.randn(2, 5, 9, 2, 16, device=device)
    k, v = rows.movedim(-1, 0).movedim(0, -1)  # [5 sequences, 9 tokens, 2 heads, 16] each

    def expected(which: list[int], lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        both = [
            one_sequence(q[b], k[i, :n], v[i, :n], 0.25, dtype)
            for b, (i, n) in enumerate(zip(which, lengths, strict=True))
        ]
        return torch.stack([o for o, _ in both]), torch.stack([x.t() for _, x in both])

    lengths = torch.tensor([4, 0, 9], dtype=torch.int32, device=device)
    which = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    for more, named, counts in (
        ({"cache_seqlens": lengths}, [0, 1, 2], [4, 0, 9]),
        ({"cache_seqlens": lengths, "cache_batch_idx": which}, [4, 0, 2], [4, 0, 9]),
        ({"cache_seqlens": 5}, [0, 1, 2], [5, 5, 5]),
        ({}, [0, 1, 2], [9, 9, 9]),
    ):
        out, lse = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **more)
        assert_as_stated(partial(expected, named, counts), out, lse, torch.float32)
    with pytest.raises(InvalidInputError, match="must have a row for each sequence"):
        flash_attn_with_kvcache(q, k[:2], v[:2])


@pytest.mark.parametrize("layout", ["G2", "G6", "G9", "A-inner-step-2"])
@pytest.mark.parametrize("where", WHERE[:2])
def test_new_rows_are_appended_before_anything_is_read(where: tuple[str, bool], layout: str) -> None:
    # The rows of two tokens are taken out of a full cache, and handed in as new ones.
    inputs = gqa_inputs(where, layout, seqused_k=(2, 9, 33), q_lens=(2, 2, 2))
    given = arguments(inputs)
    pieces = [(k[-2:], v[-2:]) for _, k, v in sequences(inputs)]
    k, v = (torch.stack(new) for new in zip(*pieces, strict=True))
    expected = flash_attn_with_kvcache(**given, causal=True, return_softmax_lse=True)
    table, size = given["page_table"].long(), inputs.case.block_size
    for b, length in enumerate(inputs.lengths):
        for token in (length - 2, length - 1):
            for cache in (given["k_cache"], given["v_cache"]):
                cache[table[b, token // size], token % size] = float("nan")
    before = given["cache_seqlens"] - 2
    with never_waits(where[0]):
        result = flash_attn_with_kvcache(
            **(given | {"cache_seqlens": before}), k=k, v=v, causal=True, return_softmax_lse=True
        )
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    inputs.assert_untouched()  # the same rows are where they were, and nothing else was written


@pytest.mark.parametrize("where", WHERE)
def test_metadata_is_shared_and_counts_the_rows_to_come(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G2")
    case, given = inputs.case, arguments(inputs)
    facts = (case.batch, 1, max(case.seqused_k), case.num_q_heads, case.num_kv_heads, case.d_qk)
    lengths = given["cache_seqlens"]
    metadata = get_scheduler_metadata(*facts, lengths, page_size=case.block_size)
    out, lse = flash_attn_with_kvcache(**given, scheduler_metadata=metadata, return_softmax_lse=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype), out, lse, torch.bfloat16)
    assert torch.equal(get_scheduler_metadata(*facts, lengths - 3, max_seqlen_k_new=3), metadata)


def test_the_metadata_is_made_for_the_lengths_after_appending(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU schedules nothing, so that the metadata itself cannot tell.
    made = mock.Mock(return_value=torch.zeros(16))
    monkeypatch.setattr("anystride.get_scheduler_metadata", made)
    get_scheduler_metadata(2, 1, 9, 4, 2, 16, torch.tensor([4, 0]), max_seqlen_k_new=3, sm_margin=2)
    assert made.call_args.args[6].tolist() == [7, 3]
    assert made.call_args.kwargs["sm_margin"] == 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name: str) -> None:
    given = arguments(gqa_inputs(CPU, "G2"))
    assert_refused(REFUSED, name, torch.ones(1), lambda **more: flash_attn_with_kvcache(**given, **more))


@pytest.mark.parametrize("name", METADATA_REFUSED)
def test_what_the_metadata_has_no_counterpart_for_is_refused_by_name(name: str) -> None:
    lengths = torch.ones(1, dtype=torch.int32)
    assert_refused(
        METADATA_REFUSED,
        name,
        torch.ones(1),
        lambda **more: get_scheduler_metadata(1, 1, 9, 4, 2, 16, lengths, **more),
    )


def test_new_rows_come_in_pairs_and_are_not_quantised() -> None:
    given = arguments(gqa_inputs(CPU, "G2"))
    new = torch.zeros(3, 1, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(InvalidInputError, match="k and v are appended together"):
        flash_attn_with_kvcache(**given, k=new)
    fp8 = arguments(gqa_inputs(CPU, "G2", kv_dtype="float8_e4m3fn"))
    with pytest.raises(UnsupportedError, match=QUANTISED["k"].why):
        flash_attn_with_kvcache(**fp8, k=new, v=new)
