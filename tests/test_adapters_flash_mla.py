"""``anystride.adapters.flash_mla`` against what FlashMLA is documented to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import (
    MLA_LAYOUTS,
    WHERE,
    assert_as_stated,
    assert_refused,
    mla_inputs,
    never_waits,
    one_sequence,
    sequences,
)
from torch import Tensor

from anystride import InvalidInputError, UnsupportedError
from anystride.adapters.flash_mla import (
    REFUSED,
    ROWS_OF_656_BYTES,
    FlashMLASchedMeta,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from anystride.testing import Inputs


def stated(inputs: Inputs, dtype: torch.dtype, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    """V is the head of K's row; scale by the row's width; out 0 and lse +inf for what sees nothing."""
    scale = inputs.case.d_qk**-0.5 if scale is None else scale
    both = [
        one_sequence(inputs.kwargs["q"][rows], k, k[..., : inputs.case.d_v], scale, dtype, causal=causal)
        for rows, k, _ in sequences(inputs)
    ]
    out = torch.stack([out for out, _ in both])  # [batch, seq_len_q, heads, d_v]
    lse = torch.stack([lse.t() for _, lse in both])  # [batch, heads, seq_len_q]
    return out, torch.where(lse == float("-inf"), float("inf"), lse)


def arguments(inputs: Inputs, metadata: FlashMLASchedMeta | None = None) -> dict[str, Any]:
    given = inputs.kwargs
    return {
        "q": given["q"].unflatten(0, (inputs.case.batch, -1)),
        "k_cache": given["k"],
        "block_table": given["block_table"],
        "cache_seqlens": given["seqused_k"],
        "head_dim_v": inputs.case.d_v,
        "tile_scheduler_metadata": get_mla_metadata()[0] if metadata is None else metadata,
    }


@pytest.mark.parametrize("layout", [*MLA_LAYOUTS, "M3b"])
@pytest.mark.parametrize("where", WHERE)
def test_decode_is_as_documented_in_every_layout(where: tuple[str, bool], layout: str) -> None:
    inputs = mla_inputs(where, layout, blocks_per_page=2 if layout == "M3b" else 1)
    with never_waits(where[0]):
        out, lse = flash_mla_with_kvcache(**arguments(inputs))
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert_as_stated(lambda dtype: stated(inputs, dtype, None, False), out, lse, torch.bfloat16)
    assert (out[0] == 0).all()
    assert (lse[0] == float("inf")).all()
    inputs.assert_untouched()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("where", WHERE[:2])
def test_query_tokens_are_masked_from_the_bottom_right(
    where: tuple[str, bool], dtype: str, causal: bool
) -> None:
    # One key and three query tokens: causal, two of them see nothing.
    inputs = mla_inputs(where, "M2", seqused_k=(1, 9, 33), q_lens=(3, 3, 3), dtype=dtype)
    out, lse = flash_mla_with_kvcache(**arguments(inputs), softmax_scale=0.3, causal=causal)
    assert_as_stated(lambda d: stated(inputs, d, 0.3, causal), out, lse, inputs.case.torch_dtype)
    assert int((lse == float("inf")).sum()) == (2 * 4 if causal else 0)


@pytest.mark.parametrize("where", WHERE)
def test_layers_share_the_metadata_of_either_interface(where: tuple[str, bool]) -> None:
    inputs = mla_inputs(where, "M1")
    given = inputs.kwargs
    metadata, num_splits = get_mla_metadata(given["seqused_k"], inputs.case.num_q_heads, 1)
    assert num_splits is None
    first = flash_mla_with_kvcache(**arguments(inputs, metadata), num_splits=num_splits)
    schedule = metadata.schedule
    second = flash_mla_with_kvcache(**arguments(inputs, metadata))
    assert metadata.schedule is schedule
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(InvalidInputError, match="serves calls of the same shapes only"):
        flash_mla_with_kvcache(**arguments(inputs, metadata), causal=True)
    with pytest.raises(InvalidInputError, match="must come from this module's get_mla_metadata"):
        flash_mla_with_kvcache(**(arguments(inputs) | {"tile_scheduler_metadata": given["seqused_k"]}))


@pytest.mark.parametrize("query_len", [1, 2])
@pytest.mark.parametrize("where", WHERE[:2])
def test_a_given_out_is_written_in_place(where: tuple[str, bool], query_len: int) -> None:
    inputs = mla_inputs(where, "M1", q_lens=(query_len,) * 3)
    q = inputs.kwargs["q"]
    expected, _ = flash_mla_with_kvcache(**arguments(inputs))
    shape = expected.shape
    padded = q.new_full((shape[0], shape[1] + 1, *shape[2:]), float("nan"))  # no strides run through both
    for out in (q.new_empty(shape), padded[:, 1:]):
        result, _ = flash_mla_with_kvcache(**arguments(inputs), out=out)
        assert result is out
        assert torch.equal(out, expected)
    assert padded[:, 0].isnan().all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name: str) -> None:
    given = arguments(mla_inputs(("cpu", False), "M1"))
    value = torch.zeros(1, dtype=torch.int32)
    assert_refused(REFUSED, name, value, lambda **more: flash_mla_with_kvcache(**given, **more))


def test_an_fp8_cache_is_read_and_rows_of_656_bytes_are_refused() -> None:
    inputs = mla_inputs(("cpu", False), "M14", kv_dtype="float8_e4m3fn")
    out, lse = flash_mla_with_kvcache(**arguments(inputs), is_fp8_kvcache=True)
    assert_as_stated(lambda dtype: stated(inputs, dtype, None, False), out, lse, torch.bfloat16)
    given = arguments(mla_inputs(("cpu", False), "M1"))
    assert_refused(
        ROWS_OF_656_BYTES, "is_fp8_kvcache", True, lambda **more: flash_mla_with_kvcache(**given, **more)
    )


def test_several_refusals_come_together() -> None:
    given = arguments(mla_inputs(("cpu", False), "M1"))
    some = torch.zeros(1)
    with pytest.raises(UnsupportedError, match="indices and attn_sink cannot be passed on") as caught:
        flash_mla_with_kvcache(**given, indices=some, attn_sink=some)
    assert list(caught.value.refusals) == ["indices", "attn_sink"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": None}, "dense attention needs block_table and cache_seqlens"),
        ({"cache_seqlens": None}, "dense attention needs block_table and cache_seqlens"),
        ({"q": torch.zeros(3, 4, 48)}, "q must have 4 dimensions"),
    ],
)
def test_a_wrong_call_is_told_so(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        flash_mla_with_kvcache(**(arguments(mla_inputs(("cpu", False), "M1")) | change))


def test_the_example_decodes_as_plain_pytorch_does() -> None:
    script = Path(__file__).parents[1] / "examples" / "flash_mla_drop_in.py"
    command = [sys.executable, str(script), "--device", "cpu", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a layer's cache: [24, 16, 1, 576], strides (36864, 576, 576, 1)" in done.stdout
