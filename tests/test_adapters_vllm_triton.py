"""``anystride.adapters.vllm_triton`` against what vLLM's Triton decode kernel does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from originals import (
    GQA_LAYOUTS,
    MLA_LAYOUTS,
    WHERE,
    assert_as_stated,
    gqa_inputs,
    mla_inputs,
    never_waits,
    one_sequence,
    sequences,
)
from torch import Tensor

from anystride import InvalidInputError, flash_attn_varlen_func
from anystride.adapters import vllm_triton
from anystride.adapters.vllm_triton import decode_attention_fwd
from anystride.testing import Inputs

SCALE, SPLITS = 0.21, 4


def stated(
    inputs: Inputs, dtype: torch.dtype, cap: float = 0.0, factors: tuple[float, float] = (1.0, 1.0)
) -> Any:
    """One query token, natural lse by batch and head; stored numbers times their factor.

    The original divides by zero for an empty sequence; the adapter says 0 and -inf.
    """
    both = [
        one_sequence(inputs.kwargs["q"][rows], factors[0] * k.to(dtype), v, SCALE, dtype, softcap=cap)
        for rows, k, v in sequences(inputs)
    ]
    return torch.cat([out * factors[1] for out, _ in both]), torch.cat([lse for _, lse in both])


def call(inputs: Inputs, lse_dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Tensor, Tensor]:
    given, case = inputs.kwargs, inputs.case
    q = given["q"]
    o = q.new_full((case.batch, case.num_q_heads, case.d_v), float("nan"))
    lse = q.new_full(o.shape[:2], float("nan"), dtype=lse_dtype)
    buffers = {
        "k_buffer": given["k"],
        "v_buffer": given["v"],
        "num_kv_splits": SPLITS,
        "page_size": case.block_size,
    }
    size = (case.batch, case.num_q_heads, SPLITS, case.d_v + 1)
    logits = q.new_full(size, float("nan"), dtype=torch.float32)
    with never_waits(q.device.type):
        decode_attention_fwd(
            q=q, o=o, lse=lse, req_to_token=given["block_table"], b_seq_len=given["seqused_k"],
            attn_logits=logits, sm_scale=SCALE, **(buffers | more),
        )  # fmt: skip
    assert logits.isnan().all()
    return o, lse


@pytest.mark.parametrize("layout", GQA_LAYOUTS)
@pytest.mark.parametrize("where", WHERE)
def test_gqa_is_as_documented_in_every_layout(where: tuple[str, bool], layout: str) -> None:
    inputs = gqa_inputs(where, layout)
    o, lse = call(inputs)
    assert_as_stated(lambda dtype: stated(inputs, dtype), o, lse, torch.bfloat16)
    assert (o[0] == 0).all()
    assert (lse[0] == float("-inf")).all()
    inputs.assert_untouched()


@pytest.mark.parametrize("layout", MLA_LAYOUTS)
@pytest.mark.parametrize("where", WHERE)
def test_mla_is_as_documented_in_every_layout(where: tuple[str, bool], layout: str) -> None:
    inputs = mla_inputs(where, layout)
    o, lse = call(inputs, is_mla=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype), o, lse, torch.bfloat16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_pages_may_lie_in_the_dimension_of_tokens(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G16")
    flat: dict[str, Any] = {name: inputs.kwargs[name[0]].flatten(0, 1) for name in ("k_buffer", "v_buffer")}
    assert flat["k_buffer"].data_ptr() == inputs.kwargs["k"].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(call(inputs, **flat), call(inputs), strict=True))


@pytest.mark.parametrize("where", WHERE[:2])
def test_the_logit_cap_and_an_lse_in_bfloat16(where: tuple[str, bool]) -> None:
    inputs = gqa_inputs(where, "G6")
    o, lse = call(inputs, torch.bfloat16, logit_cap=1.5)
    assert_as_stated(lambda dtype: stated(inputs, dtype, 1.5), o, lse, torch.bfloat16)


@pytest.mark.parametrize("where", WHERE[:2])
def test_scales_count_for_fp8_caches_only(where: tuple[str, bool]) -> None:
    device = where[0]
    scales: dict[str, Any] = {
        "k_scale": torch.tensor(0.5, device=device),
        "v_scale": torch.tensor([1.5], device=device),
    }
    fp8 = gqa_inputs(where, "G2", kv_dtype="float8_e4m3fn")
    assert_as_stated(lambda d: stated(fp8, d, factors=(0.5, 1.5)), *call(fp8, **scales), torch.bfloat16)
    row = mla_inputs(where, "M14", kv_dtype="float8_e4m3fn")  # V is K's row, and so is its scale
    o, lse = call(row, is_mla=True, **scales)
    assert_as_stated(lambda d: stated(row, d, factors=(0.5, 0.5)), o, lse, torch.bfloat16)
    wide = gqa_inputs(where, "G2")
    assert all(torch.equal(a, b) for a, b in zip(call(wide, **scales), call(wide), strict=True))


@pytest.mark.parametrize("where", WHERE[:2])
def test_one_split_keeps_a_sequence_in_one_piece(where: tuple[str, bool]) -> None:
    # What vLLM's batch-invariant mode relies on: the bits of a sequence do not depend on its neighbours.
    inputs = gqa_inputs(where, "G2")
    o, lse = call(inputs, num_kv_splits=1)
    given = inputs.kwargs
    alone = torch.full_like(o[2:], float("nan")), torch.full_like(lse[2:], float("nan"))
    decode_attention_fwd(
        given["q"][2:], given["k"], given["v"], *alone, given["block_table"][2:], given["seqused_k"][2:],
        alone[0], 1, SCALE, inputs.case.block_size,
    )  # fmt: skip
    assert torch.equal(o[2:], alone[0])
    assert torch.equal(lse[2:], alone[1])


def test_a_page_size_that_is_not_the_buffers_is_told() -> None:
    inputs = gqa_inputs(("cpu", False), "G16")
    with pytest.raises(InvalidInputError, match="page_size must be that of k_buffer"):
        call(inputs, page_size=1)
    flat: dict[str, Any] = {
        name: inputs.kwargs[name[0]].flatten(0, 1)[:-1] for name in ("k_buffer", "v_buffer")
    }
    with pytest.raises(InvalidInputError, match="k_buffer must hold whole pages"):
        call(inputs, **flat)


@pytest.mark.parametrize(("num_kv_splits", "passed_on"), [(1, 1), (4, 0), (32, 0)])
def test_of_the_number_of_splits_only_one_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, num_kv_splits: int, passed_on: int
) -> None:
    # A CPU does not split, so that results cannot tell.
    seen = []

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(more["num_splits"])
        return flash_attn_varlen_func(*args, **more)

    monkeypatch.setattr(vllm_triton, "flash_attn_varlen_func", watched)
    call(gqa_inputs(("cpu", False), "G2"), num_kv_splits=num_kv_splits)
    assert seen == [passed_on]
