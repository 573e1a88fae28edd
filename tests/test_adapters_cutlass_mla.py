"""``anystride.adapters.cutlass_mla`` against what vLLM's and SGLang's calls are documented to do."""

from __future__ import annotations

import pytest
import torch
from originals import MLA_LAYOUTS, WHERE, assert_as_stated, mla_inputs, never_waits, one_sequence, sequences
from torch import Tensor

from anystride import InvalidInputError
from anystride.adapters.cutlass_mla import (
    cutlass_mla_decode,
    cutlass_mla_get_workspace_size,
    sm100_cutlass_mla_decode,
    sm100_cutlass_mla_get_workspace_size,
)
from anystride.testing import Inputs

SCALE = 0.17


def stated(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One query token; K the latent and the rope part, V the latent part; natural lse by batch and head."""
    both = [
        one_sequence(inputs.kwargs["q"][rows], k, k[..., : inputs.case.d_v], SCALE, dtype)
        for rows, k, _ in sequences(inputs)
    ]
    return torch.cat([out for out, _ in both]), torch.cat([lse for _, lse in both])


def arguments(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, workspace``."""
    given, rank = inputs.kwargs, inputs.case.d_v
    size = sm100_cutlass_mla_get_workspace_size(1024, inputs.case.batch, 132, num_kv_splits=-1)
    assert size == cutlass_mla_get_workspace_size(1024, inputs.case.batch) == 0
    workspace = torch.empty(size, dtype=torch.uint8, device=given["q"].device)
    q_nope, q_pe = given["q"][..., :rank], given["q"][..., rank:]
    return q_nope, q_pe, given["k"].squeeze(-2), given["seqused_k"], given["block_table"], workspace


@pytest.mark.parametrize("layout", [*MLA_LAYOUTS, "M3b"])
@pytest.mark.parametrize("where", WHERE)
def test_decode_is_as_documented_in_every_layout(where: tuple[str, bool], layout: str) -> None:
    inputs = mla_inputs(where, layout, blocks_per_page=2 if layout == "M3b" else 1)
    given, case = arguments(inputs), inputs.case
    q = given[0]
    # Heads padded as in vLLM, of which the call fills those of the query.
    out = q.new_full((case.batch, case.num_q_heads + 3, case.d_v), float("nan"))
    lse = q.new_full(out.shape[:2], float("nan"), dtype=torch.float32)
    with never_waits(where[0]):
        result = sm100_cutlass_mla_decode(out, lse, *given, SCALE, -1)
        other = cutlass_mla_decode(*given, SCALE)
    assert result is out
    heads = case.num_q_heads
    assert_as_stated(lambda dtype: stated(inputs, dtype), out[:, :heads], lse[:, :heads], torch.bfloat16)
    assert_as_stated(lambda dtype: stated(inputs, dtype), other, None, torch.bfloat16)
    assert out[:, heads:].isnan().all()
    assert lse[:, heads:].isnan().all()
    assert (out[0, :heads] == 0).all()
    assert (lse[0, :heads] == float("-inf")).all()
    inputs.assert_untouched()


@pytest.mark.parametrize("where", WHERE[:2])
def test_an_empty_lse_is_not_wanted_and_a_wider_out_is_converted_to(where: tuple[str, bool]) -> None:
    inputs = mla_inputs(where, "M2")
    given = arguments(inputs)
    q = given[0]
    out = q.new_full(q.shape, float("nan"), dtype=torch.float32)
    sm100_cutlass_mla_decode(out, torch.Tensor().to(q.device), *given, SCALE, 4)
    assert torch.equal(out, cutlass_mla_decode(*given, SCALE).float())


def test_a_place_for_every_head_is_demanded() -> None:
    given = arguments(mla_inputs(("cpu", False), "M1"))
    q = given[0]
    with pytest.raises(InvalidInputError, match="a place for every query head"):
        sm100_cutlass_mla_decode(q.new_empty(3, 2, 32), torch.Tensor(), *given, SCALE, 1)
    with pytest.raises(InvalidInputError, match="a place for every query head"):
        sm100_cutlass_mla_decode(q.new_empty(3, 4, 32), torch.zeros(3, 2), *given, SCALE, 1)
